"""The command line, called in this process."""

from __future__ import annotations

import pytest

from loradeploy.cli import main as cli
from tests.cli.calling import Run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A function (*arguments) → exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what making the fixtures had to say
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        status = ended.value.code
        assert isinstance(status, int)
        return status, out, err

    return run
