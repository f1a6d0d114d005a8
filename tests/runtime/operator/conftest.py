"""The tiny Llama whose nodes are calls of operators, in several forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loradeploy.export.api import export
from tests.conftest import once

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
    "in place": {"attention": "gqa"},
    "dora and embeddings": {"side_inputs": ("dora", "bias", "embedding")},
    "rows": {"layout": "rows"},
    "branches": {"layout": "slots", "branches": True, "precision": "int8"},
    "rows in branches": {"layout": "rows", "branches": True, "precision": "int4"},
}


@pytest.fixture(scope="module", params=FORMS)
def operator_bundle(request: pytest.FixtureRequest, tiny_llama_bundle: Path, shared: Path) -> Path:
    """A bundle in each form."""
    form: str = request.param
    return once(
        shared / f"operator-{form.replace(' ', '-')}",
        lambda place: export(tiny_llama_bundle, place, operator=True, **FORMS[form]),
    )


@pytest.fixture(scope="session")
def in_place_operator(tiny_llama_bundle: Path, shared: Path) -> Path:
    """The bundle of the form "in place"."""
    return once(
        shared / "operator-in-place",
        lambda place: export(tiny_llama_bundle, place, operator=True, **FORMS["in place"]),
    )
