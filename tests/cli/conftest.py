"""The command line, called in this process."""

from __future__ import annotations

import pytest

from tests.cli.calling import Run, exit_status


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A function (*arguments) → exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # discard the output of fixtures
        status = exit_status(*arguments)
        out, err = capsys.readouterr()
        return status, out, err

    return run
