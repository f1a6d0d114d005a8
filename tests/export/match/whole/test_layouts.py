"""Fully trained weights of Conv1D layers (GPT-2), which are [in, out], also if they are square."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from loradeploy import export
from loradeploy.adapter import Adapter, AdapterConfig
from loradeploy.adapter.files.tensors import read_arrays
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import AdapterMismatchError, BundleError
from loradeploy.export.match.linears import Linear
from loradeploy.export.match.whole.layouts import is_conv1d, settle_layouts
from loradeploy.export.passes.side_inputs.inject import remove_side_inputs
from tests.conftest import MakeAdapter
from tests.export.reference import apart, factors, onnx_output, torch_output
from tests.tolerances import tolerance

IDS = np.arange(3, 27).reshape(2, 12)
SETTINGS: dict[str, Any] = {"target_modules": ["c_attn"], "modules_to_save": ["attn.c_proj"]}


def _output(bundle: Path, adapter: Path | None) -> NDArray[np.float32]:
    """The logits [batch, tokens, vocabulary] of a bundle, with the side inputs of `adapter`."""
    return onnx_output(bundle, IDS, side=None if adapter is None else factors(bundle, adapter))


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
    actual = _output(tmp_path / "b", None if merge else adapter)
    expected = torch_output(tiny_gpt2, IDS, adapter=adapter)
    assert np.abs(actual - expected).max() < tolerance("torch-onnx-tiny")
    assert np.abs(expected - torch_output(tiny_gpt2, IDS)).max() > 0.5, "it has no effect"


def _without_record(bundle: Path, place: Path) -> Path:
    """The graph of a bundle as another exporter's: without side inputs, manifest and layouts."""
    model = ir.load(bundle / "model.onnx")
    remove_side_inputs(model, read_manifest(bundle))
    for node in model.graph:
        node.metadata_props.pop("loradeploy.layout", None)
    place.mkdir()
    ir.save(model, place / "model.onnx", external_data="model.onnx.data")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (bundle / name).exists():
            shutil.copy(bundle / name, place)
    return place


def _trained(model: Path, adapter: Path, place: Path, *, noise: float = 0.3) -> Path:
    """`adapter` with saved weights near the base's, and a config that says nothing of Conv1D."""
    shutil.copytree(adapter, place)
    base, _ = read_arrays(model / "model.safetensors", error=BundleError)
    file = place / "adapter_model.safetensors"
    arrays = load_file(file)
    changed = 0
    for name, values in arrays.items():
        own = base.get(name.removeprefix("base_model.model.").removeprefix("transformer."))
        own = base.get(name.removeprefix("base_model.model."), own)
        if own is not None and own.ndim == 2:
            step = np.random.default_rng(0).standard_normal(own.shape, np.float32)
            arrays[name] = own + noise * own.std() * step
            assert arrays[name].shape == values.shape
            changed += 1
    assert changed
    save_file(arrays, file)
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": False}))
    return place


@pytest.mark.parametrize("saved", [["attn.c_proj"], ["mlp.c_proj"]])
@pytest.mark.parametrize("merge", [True, False])
def test_a_trained_weight_shows_its_layout_where_the_graph_does_not(
    saved: list[str],
    merge: bool,
    tiny_gpt2: Path,
    tiny_gpt2_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    graph = _without_record(tiny_gpt2_bundle, tmp_path / "graph")
    made = make_adapter(tiny_gpt2, **(SETTINGS | {"modules_to_save": saved}))
    adapter = _trained(tiny_gpt2, made, tmp_path / "adapter")
    export(graph, tmp_path / "b", adapters=[adapter], merge=merge)
    actual = _output(tmp_path / "b", None if merge else adapter)
    expected = torch_output(tiny_gpt2, IDS, adapter=adapter)
    assert np.abs(actual - expected).max() < tolerance("torch-onnx-tiny")
    assert np.abs(expected - torch_output(tiny_gpt2, IDS)).max() > 0.05, "it has no effect"


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("merge", [True, False])
def test_a_square_weight_that_resembles_the_graphs_in_no_layout_is_refused(
    declared: bool,
    merge: bool,
    tiny_gpt2: Path,
    tiny_gpt2_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    graph = _without_record(tiny_gpt2_bundle, tmp_path / "graph")
    adapter = tmp_path / "adapter"
    shutil.copytree(make_adapter(tiny_gpt2, **SETTINGS), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"]
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": declared}))
    with pytest.raises(AdapterMismatchError, match=r"adapter: .*attn\.c_proj\.weight is square"):
        export(graph, tmp_path / "m", adapters=[adapter], merge=merge)


@pytest.mark.parametrize("merge", [True, False])
def test_a_checkpoint_shows_the_layout_of_any_weight(
    merge: bool,
    tiny_gpt2: Path,
    tiny_gpt2_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    graph = _without_record(tiny_gpt2_bundle, tmp_path / "graph")
    adapter = make_adapter(tiny_gpt2, **SETTINGS)
    export(graph, tmp_path / "b", adapters=[adapter], merge=merge, checkpoint=tiny_gpt2)
    actual = _output(tmp_path / "b", None if merge else adapter)
    expected = torch_output(tiny_gpt2, IDS, adapter=adapter)
    assert np.abs(actual - expected).max() < tolerance("torch-onnx-tiny")


def test_a_weight_that_is_a_side_input_keeps_its_layout_in_a_second_export(
    tiny_gpt2: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_gpt2, **SETTINGS)
    export(tiny_gpt2, tmp_path / "first", adapters=[adapter])
    export(tmp_path / "first", tmp_path / "second", adapters=[adapter], merge=True)
    actual = onnx_output(tmp_path / "second", IDS)
    expected = torch_output(tiny_gpt2, IDS, adapter=adapter)
    assert np.abs(actual - expected).max() < tolerance("torch-onnx-tiny")


def _linear(module: str, W: NDArray[np.float32]) -> dict[str, Linear]:
    weight = ir.Value(name="W", const_value=ir.tensor(W))
    x = ir.Value(name="x")
    node = ir.node("MatMul", [x, weight])
    out, size = W.shape
    return {module: Linear(module, (node,), weight, True, size, out, "test")}


def _saving(module: str, values: NDArray[np.float32]) -> Adapter:
    return Adapter(AdapterConfig(), {}, saved={f"{module}.weight": values})


W = np.random.default_rng(0).standard_normal((8, 8), np.float32)
OTHER = np.random.default_rng(1).standard_normal((8, 8), np.float32)


@pytest.mark.parametrize(
    ("module", "W", "saved", "conv1d"),
    [
        ("h.0.q", W, W + OTHER / 5, False),
        ("h.0.q", W, W.T + OTHER / 5, True),
        ("h.0.q", W, W, False),
        ("h.0.q", W + 9 * np.eye(8, dtype=np.float32), W.T + 9 * np.eye(8, dtype=np.float32), True),
        ("h.0.q", W[:, :4], W[:, :4].T + OTHER[:4] / 5, True),
        ("h.0.q", W[:, :4], OTHER[:4], False),  # the fit to the graph refuses its shape
        ("h.0.q", W[:, :4], 9 * OTHER[:, :4], False),
        ("classifier.dense", W, OTHER, False),
        ("h.0.q", W, OTHER + OTHER.T, False),  # both layouts are the same
        ("h.0.q", W, OTHER, None),
        ("h.0.q", W, np.full_like(W, np.nan), None),
    ],
)
def test_the_layout_is_that_in_which_a_weight_resembles_the_graphs(
    module: str, W: NDArray[np.float32], saved: NDArray[np.float32], conv1d: bool | None
) -> None:
    linears = _linear(module, W)
    if conv1d is None:
        with pytest.raises(AdapterMismatchError, match="is square and does not resemble"):
            settle_layouts(linears, _saving(module, saved))
        return
    settle_layouts(linears, _saving(module, saved))
    assert is_conv1d(linears[module]) == conv1d


def test_a_quantized_layer_keeps_its_layout_when_it_is_made_float(
    tiny_gpt2: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_gpt2, **SETTINGS)
    export(tiny_gpt2, tmp_path / "int8", precision="int8")
    export(tmp_path / "int8", tmp_path / "b", adapters=[adapter])
    actual = _output(tmp_path / "b", adapter)
    expected = torch_output(tiny_gpt2, IDS, adapter=adapter)
    base = torch_output(tiny_gpt2, IDS)
    assert apart(actual, expected) <= tolerance("export-int8")
    assert apart(base, expected) > 10 * tolerance("export-int8"), "it has no effect"
