"""Fully trained weights of Conv1D layers (GPT-2), which are [in, out], also if they are square."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy import export
from loradeploy.errors import AdapterMismatchError
from tests.conftest import MakeAdapter
from tests.export.reference import factors, onnx_output, torch_output
from tests.tolerances import tolerance

IDS = np.arange(3, 27).reshape(2, 12)
SETTINGS: dict[str, Any] = {"target_modules": ["c_attn"], "modules_to_save": ["attn.c_proj"]}


@pytest.mark.parametrize("saved", [["attn.c_proj"], ["mlp.c_proj"], ["c_proj"]])
@pytest.mark.parametrize("form", ["side inputs", "merged", "merged into a bundle"])
def test_a_weight_stored_transposed_replaces_that_of_the_graph(
    saved: list[str],
    form: str,
    tiny_gpt2: Path,
    tiny_gpt2_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    adapter = make_adapter(tiny_gpt2, **(SETTINGS | {"modules_to_save": saved}))
    model = tiny_gpt2_bundle if form == "merged into a bundle" else tiny_gpt2
    merge = form != "side inputs"
    export(model, tmp_path / "b", adapters=[adapter], merge=merge)
    actual = onnx_output(
        tmp_path / "b", IDS, side=None if merge else factors(tmp_path / "b", adapter)
    )
    expected = torch_output(tiny_gpt2, IDS, adapter=adapter)
    assert np.abs(actual - expected).max() < tolerance("torch-onnx-tiny")
    assert np.abs(expected - torch_output(tiny_gpt2, IDS)).max() > 0.5, "it has no effect"


def test_a_square_weight_of_unknown_layout_is_refused(
    tiny_gpt2: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    export(tiny_gpt2, tmp_path / "b")
    model = ir.load(tmp_path / "b" / "model.onnx")
    for node in model.graph:
        node.metadata_props.pop("loradeploy.layout", None)
    ir.save(model, tmp_path / "b" / "model.onnx", external_data="model.onnx.data")
    adapter = make_adapter(tiny_gpt2, **SETTINGS)
    with pytest.raises(AdapterMismatchError, match=r"attn\.c_proj\.weight is square"):
        export(tmp_path / "b", tmp_path / "m", adapters=[adapter], merge=True)
