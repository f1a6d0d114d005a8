"""Every exported graph was opened, run, and compared with its source before it is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.errors import ExportError
from loradeploy.export.api import export
from loradeploy.export.building import adapted, merged
from loradeploy.export.graph.edit import constant_of, set_constant
from loradeploy.export.graph.file import load_graph
from loradeploy.export.passes.side_inputs import inject
from loradeploy.export.read.opsets import LEAST_OPSET, convert_opset
from loradeploy.export.trial import bundle as trial_of_bundle
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter
from tests.export import others
from tests.export.graphs import Builder, numbers, ops, run
from tests.export.others import IDS
from tests.export.reference import difference, onnx_output, torch_output
from tests.tolerances import tolerance

Spoil = Callable[[pytest.MonkeyPatch], None]

# -- mistakes in a graph ---------------------------------------------------------------------------


def _another_weight(patch: pytest.MonkeyPatch) -> None:
    """Change a weight of the base."""

    def spoiled(*given: Any, **options: Any) -> Any:
        added = inject.inject_side_inputs(*given, **options)
        graph = given[0].graph
        name = next(n for n in graph.initializers if "down_proj" in n and "lora" not in n)
        set_constant(graph.initializers[name], -constant_of(graph.initializers[name]))
        return added

    patch.setattr(adapted, "inject_side_inputs", spoiled)


def _no_update(patch: pytest.MonkeyPatch) -> None:
    """Leave the factors unconnected."""
    patch.setattr(inject, "_add", lambda *given: None)
    patch.setattr(inject, "remove_unused", lambda *given, **options: None)


def _twice(patch: pytest.MonkeyPatch) -> None:
    """Add the update twice."""
    add = inject._add

    def doubled(surgery: Any, chain: Any, rows: Any, y: ir.Value, update: ir.Value, n: int) -> None:
        add(surgery, chain, rows, y, chain.add("Add", "lora_twice", [update, update]), n)

    patch.setattr(inject, "_add", doubled)


def _no_such_input(patch: pytest.MonkeyPatch) -> None:
    """Remove a required input of a node."""

    def spoiled(*given: Any, **options: Any) -> Any:
        added = inject.inject_side_inputs(*given, **options)
        node = next(node for node in given[0].graph if node.op_type == "Gather")
        node.replace_input_with(1, None)
        return added

    patch.setattr(adapted, "inject_side_inputs", spoiled)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_another_weight, "its output logits differs by .* from the source's"),
        (_no_update, "side inputs change nothing"),
        (_twice, "with an adapter its output .* from PyTorch's"),
        (_no_such_input, "onnxruntime cannot open model.onnx"),
    ],
)
def test_a_wrong_graph_is_refused_and_nothing_is_written(
    spoil: Spoil, message: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    with pytest.raises(ExportError, match=message) as raised:
        export(tiny_llama, tmp_path / "b")
    assert len(str(raised.value)) < 400
    assert not list(tmp_path.iterdir())


def test_a_wrong_merge_is_refused(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tiny_llama, r=4, scale=0.3)
    merge = merged.merge_adapter

    def doubled(model: Any, linears: Any, adapter: Any, **options: Any) -> Any:
        return merge(model, linears, _doubled(adapter), **options)

    monkeypatch.setattr(merged, "merge_adapter", doubled)
    with pytest.raises(ExportError, match="from PyTorch's"):
        export(tiny_llama, tmp_path / "m", adapters={"own": adapter}, merge=True)


def _doubled(adapter: Any) -> Any:
    factors = {m: dataclasses.replace(f, B=2 * f.B) for m, f in adapter.factors.items()}
    return dataclasses.replace(adapter, factors=factors)


# -- older versions of ONNX ------------------------------------------------------------------------


def _old(*, squeeze: bool = True) -> ir.Model:
    """Return y = squeeze(unsqueeze(gelu(x W))) in opset 11, with a node of com.microsoft."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", 48])
    product = b.node("MatMul", [x, b.weight("w", 48, 32)], name="product")
    wide = b.node("Unsqueeze", [product], name="wide", axes=[0])
    y = b.node("Squeeze", [wide], ["batch", "sequence", 32], name="y", axes=[0])
    model = b.model(y)
    gelu = ir.node("Gelu", [product], domain="com.microsoft", name="gelu")
    gelu.outputs[0].name = "gelu"
    model.graph.insert_after(product.producer(), gelu)  # type: ignore[arg-type]
    wide.producer().replace_input_with(0, gelu.outputs[0])  # type: ignore[union-attr]
    model.opset_imports.update({"": 11, "com.microsoft": 1})
    return ir.Model(model.graph, ir_version=6)


def test_a_converted_older_graph_computes_the_same() -> None:
    x = numbers(2, 3, 48)
    before = run(_old(), {"x": x})
    model = convert_opset(_old())
    assert model.opset_imports == {"": LEAST_OPSET, "com.microsoft": 1}
    np.testing.assert_array_equal(run(model, {"x": x}), before)
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert "Gelu" in ops(model)


def test_weights_of_an_older_graph_stay_on_disk(tmp_path: Path) -> None:
    ir.save(_old(), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=64)
    held = convert_opset(load_graph(tmp_path / "m.onnx")).graph.initializers["w"].const_value
    assert isinstance(held, ir.ExternalTensor)


def test_a_newer_graph_is_not_changed() -> None:
    model = _old()
    model.opset_imports[""] = 17
    assert convert_opset(model) is model


def test_a_graph_without_an_opset_version_is_refused() -> None:
    model = _old()
    model.opset_imports.pop("")
    with pytest.raises(ExportError, match="does not specify which opset"):
        convert_opset(model)


def test_a_graph_that_cannot_be_converted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise RuntimeError("No adapter for Upsample")

    monkeypatch.setattr("onnx.version_converter.convert_version", refuse)
    with pytest.raises(ExportError, match="opset 11 and cannot be converted to 13: No adapter"):
        convert_opset(_old())


def test_an_adapter_is_merged_into_a_graph_of_opset_11(
    tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_bert, r=4, scale=0.3, task="feature-extraction")
    others.export_with_torch(tiny_bert, tmp_path / "old", dynamo=False, opset=11)
    evidence = {"checkpoint": tiny_bert}
    export(tmp_path / "old", tmp_path / "m", adapters={"own": adapter}, merge=True, **evidence)
    task = "feature-extraction"
    expected = torch_output(tiny_bert, IDS, task=task, adapter=adapter)
    got = onnx_output(tmp_path / "m", IDS)
    assert difference(got, expected) < tolerance("torch-onnx-tiny")
    assert difference(torch_output(tiny_bert, IDS, task=task), expected) > 0.1


# -- weights that are dequantized in blocks --------------------------------------------------------


def test_blocks_of_four_bits_take_side_inputs_without_branches(
    tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_bert, r=4, scale=0.3, task="feature-extraction")
    others.export_with_torch(tiny_bert, tmp_path / "plain", dynamo=False, opset=21)
    others.dequantise_in_blocks(tmp_path / "plain" / "model.onnx", tmp_path / "blocks")
    evidence = {"adapters": {"own": adapter}, "checkpoint": tiny_bert}
    manifest = export(tmp_path / "blocks", tmp_path / "b", **evidence)  # type: ignore[arg-type]
    assert (manifest.precision, manifest.branches) == ("int4", False)
    session = AdapterSession(tmp_path / "b")
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    base, own = (session.run(None, feeds, use)[0] for use in (None, "own"))
    assert difference(base, onnx_output(tmp_path / "blocks", IDS)) < tolerance("torch-onnx-tiny")
    assert difference(base, own) > 0.1
    with pytest.raises(ExportError, match="export with `branches=False`"):
        export(tmp_path / "blocks", tmp_path / "c", branches=True, checkpoint=tiny_bert)


def test_the_noise_by_neighbors_is_measured_at_all_rows() -> None:
    """At one row of a single number it can be 0 by chance, and a right bundle would be refused."""

    def run(feeds: dict[str, Any], side_inputs: object) -> dict[str, Any]:
        step = np.abs(feeds["x"]).max() / 10  # one scale for the batch, as in dynamic quantization
        return {"y": np.round(feeds["x"] / step) * step}

    feeds = {"x": np.array([[1.0], [0.46]])}
    outputs = run(feeds, None)["y"]
    noise = trial_of_bundle._noise(SimpleNamespace(run=run), feeds, None, outputs, "y")  # type: ignore[arg-type]
    assert noise == pytest.approx(0.04)
    assert outputs[0] == run({"x": feeds["x"][:1]}, None)["y"], "the first row shows none"
