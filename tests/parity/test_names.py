"""Names of backends, phases, metrics, …: defined once, and all listed in the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from loradeploy.parity.backends.table import BACKENDS
from loradeploy.parity.names import ALL_PHASES, BACKEND_NAMES, LEVELS
from tests.cli.calling import command

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "parity.md"
PHASES = [phase.replace(" ", "-") for phase in ALL_PHASES]


def test_the_table_has_a_row_for_each_backend() -> None:
    assert tuple(backend.name for backend in BACKENDS) == BACKEND_NAMES


@pytest.mark.parametrize("name", [*BACKEND_NAMES, *PHASES, *LEVELS])
def test_the_help_and_the_documentation_list_the_names(name: str) -> None:
    options = " ".join(str(getattr(o, "help", "")) for o in command("parity").params)
    assert name in options
    text = DOCUMENTATION.read_text(encoding="utf-8")
    assert f"`{name}`" in text or name.replace("-", " ") in text
