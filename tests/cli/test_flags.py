"""Parameter names in messages of the library are shown as flags by the command line."""

from __future__ import annotations

import pytest

from loradeploy.cli.flags import with_flags
from loradeploy.cli.main import VERBS
from tests.cli.calling import Run


@pytest.mark.parametrize(
    ("verb", "named", "typed"),
    [
        ("export", "`merge`", "--merge"),
        ("export", "`merge=True`", "--merge"),
        ("export", "`branches=False`", "--no-branches"),
        ("export", '`layout="rows"`', "--layout rows"),
        ("export", '`side_inputs=["dora", "bias"]`', "--side-inputs dora,bias"),
        ("export", '`fixed={"batch": 1, "sequence": 128}`', "--fixed batch=1,sequence=128"),
        ("export", '`adapters=["sport=DIR", "DIR"]`', "--adapter sport=DIR --adapter DIR"),
        ("parity", "`model=DIR`", "--model DIR"),
        ("parity", "`reference`", "--against"),
        ("run", '`providers="cuda"`', "--provider cuda"),
        ("run", "`branches=False`", "--no-branches"),  # a flag of the earlier export
        (None, "`merge`", "--merge"),
        ("train", '`lora_alpha`, `precision="bf16"`', "`lora_alpha`, --precision bf16"),
        ("parity", "`certificate=False`", "`certificate=False`"),  # there is no flag for it
        ("parity", "`loradeploy parity bundle`", "`loradeploy parity bundle`"),
    ],
)
def test_a_parameter_is_shown_as_its_flag(verb: str | None, named: str, typed: str) -> None:
    assert with_flags(f"give {named} again", verb, VERBS) == f"give {typed} again"


def test_an_error_of_the_library_reaches_the_terminal_with_flags(run: Run) -> None:
    status, _, error = run("parity", "bundle", "--trust-remote-code")
    assert status == 2
    assert error == (
        "Error: --trust-remote-code needs --model: a bundle may name any model as its base\n"
    )
