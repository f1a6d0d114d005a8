"""Merged bundles with calls of operators: the same with and without the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.bundle.names import (
    ATTENTION_OPERATOR,
    GROUP_QUERY_ATTENTION_OPERATOR,
    MAT_MUL_N_BITS_OPERATOR,
    SWIGLU_OPERATOR,
)
from loradeploy.export.api import export
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.conftest import once
from tests.export.reference import apart
from tests.runtime.feeds import logits, random_ids
from tests.tolerances import tolerance

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32 in place": {"attention": "gqa"},
    "int8": {"precision": "int8"},
    "int4 in place": {"precision": "int4", "attention": "gqa"},
}


@pytest.fixture(params=FORMS)
def merged(
    request: pytest.FixtureRequest,
    tiny_llama_bundle: Path,
    llama_adapters: dict[str, Path],
    shared: Path,
) -> Path:
    form: str = request.param
    return once(
        shared / f"operator-merged-{form.replace(' ', '-')}",
        lambda place: export(
            tiny_llama_bundle,
            place,
            adapters={"large": llama_adapters["large"]},
            merge=True,
            operator=True,
            **FORMS[form],
        ),
    )


def test_the_kernels_compute_what_the_standard_nodes_compute(
    merged: Path, tiny_llama_bundle: Path, operator_library: Path
) -> None:
    ids = random_ids(2, 9)
    with (
        AdapterSession(merged) as plain,
        AdapterSession(merged, operator=operator_library) as fast,
        AdapterSession(tiny_llama_bundle) as base,
    ):
        attention = GROUP_QUERY_ATTENTION_OPERATOR if "place" in merged.name else ATTENTION_OPERATOR
        packed = [MAT_MUL_N_BITS_OPERATOR] if "int" in merged.name else []
        assert plain.manifest.operators == (*packed, attention, SWIGLU_OPERATOR)
        expected, found = logits(plain, ids), logits(fast, ids)
        assert apart(found, expected) <= tolerance("export-int8" if packed else "torch-onnx-tiny")
        assert np.abs(found - logits(base, ids)).max() > 0.05  # the adapter has an effect
        texts = [
            TextGenerator(session).generate([[5, 6, 7], [8, 9]], max_new_tokens=12)
            for session in (plain, fast)
        ]
        assert [t.token_ids for t in texts[0]] == [t.token_ids for t in texts[1]]
