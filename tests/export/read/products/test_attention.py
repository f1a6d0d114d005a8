"""The q, k and v projections are separated from onnxruntime's fused Attention and take adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from loradeploy.export.graph.edit import constant_of
from loradeploy.export.match.linears import find_linears
from loradeploy.export.match.modules.identity import CheckpointWeights
from loradeploy.export.match.modules.naming import by_graph
from loradeploy.export.match.operators import MICROSOFT
from loradeploy.export.passes.side_inputs.inject import inject_side_inputs
from loradeploy.export.read.products.attention import separate_projections
from tests.export.graphs import Arrays, Builder, near, numbers, ops, run

IN, HEADS, BATCH, LENGTH = 16, 2, 2, 5
PARTS = ("query", "key", "value")
WEIGHTS = {part: numbers(IN, IN, seed=seed) for seed, part in enumerate(PARTS)}  # [out, in]
BIASES = {part: numbers(IN, seed=seed + 3) for seed, part in enumerate(PARTS)}


def attention(
    given: str = "", weights: Arrays = WEIGHTS, **attributes: Any
) -> tuple[ir.Model, Arrays]:
    """Return an Attention with a mask, an attention bias, or neither, and inputs for it."""
    b = Builder()
    x = b.input("x", [BATCH, LENGTH, IN])
    packed = np.concatenate([weights[part].T for part in PARTS], axis=1)
    inputs: list[Any] = [x, b.constant("w", np.ascontiguousarray(packed))]
    inputs.append(b.constant("b", np.concatenate([BIASES[part] for part in PARTS])))
    feeds: Arrays = {"x": numbers(BATCH, LENGTH, IN)}
    if given == "mask":
        inputs.append(b.input("mask", [BATCH, LENGTH], ir.DataType.INT32))
        feeds["mask"] = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)
    elif given == "lengths":
        inputs.append(b.input("mask", [BATCH], ir.DataType.INT32))
        feeds["mask"] = np.array([5, 3], np.int32)
    elif given == "counted":  # the same, as onnxruntime's optimizer computes them
        mask = b.input("mask", [BATCH, LENGTH], ir.DataType.INT32)
        axes = b.constant("axes", np.array([1], np.int64))
        counts = b.node("ReduceSum", [mask, axes], ["other"], keepdims=0)
        counts.dtype = ir.DataType.INT32
        inputs.append(counts)
        feeds["mask"] = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)
    elif given == "ranges":  # the end of each row, then the start of each
        inputs.append(b.input("mask", [2 * BATCH], ir.DataType.INT32))
        feeds["mask"] = np.array([5, 4, 0, 1], np.int32)
    elif given == "scores":
        inputs += [None, None, b.input("bias", [BATCH, HEADS, LENGTH, LENGTH])]
        feeds["bias"] = numbers(BATCH, HEADS, LENGTH, LENGTH, seed=9)
    attributes = {"num_heads": HEADS, **attributes}
    y = b.node("Attention", inputs, [BATCH, LENGTH, IN], domain=MICROSOFT, **attributes)
    model = b.model(y)
    model.graph.opset_imports[MICROSOFT] = 1
    return model, feeds


@pytest.mark.parametrize("attributes", [{}, {"unidirectional": 1}, {"scale": 0.1}], ids=str)
@pytest.mark.parametrize("given", ["", "mask", "lengths", "counted", "scores"])
def test_the_projections_become_separate_products(given: str, attributes: Any) -> None:
    model, feeds = attention(given, **attributes)
    before = run(model, feeds)
    separate_projections(model.graph)
    separated = [op for op in ops(model) if op != "ReduceSum"]
    assert separated == ["MatMul", "Add"] * 3 + ["MultiHeadAttention"]
    assert near(run(model, feeds), before)


def test_an_adapter_can_change_a_single_projection(tmp_path: Path) -> None:
    tensors = {f"{part}.weight": WEIGHTS[part] for part in PARTS}
    save_file(tensors | {f"{p}.bias": BIASES[p] for p in PARTS}, tmp_path / "model.safetensors")
    model, feeds = attention("mask")
    separate_projections(model.graph)
    found = find_linears(model, CheckpointWeights(tmp_path, PARTS).namer(by_graph)).linears
    assert set(found) == set(PARTS)
    for part, linear in found.items():
        assert linear.bias is not None
        assert np.array_equal(constant_of(linear.bias), BIASES[part])
    inject_side_inputs(model, list(found.values()))
    A, B = numbers(IN, 2, seed=11), numbers(2, IN, seed=12)
    base, _ = attention("mask")
    adapted, _ = attention("mask", WEIGHTS | {"value": WEIGHTS["value"] + (A @ B).T})
    expected = run(adapted, feeds)
    side = {"value.lora_A": A[None], "value.lora_B": B[None]}
    assert near(run(model, feeds | side), expected)
    assert near(run(model, feeds), run(base, feeds))
    assert not near(expected, run(base, feeds)), "the adapter did nothing"


@pytest.mark.parametrize("attributes", [{"do_rotary": 1}, {"qkv_hidden_sizes": [IN, IN]}], ids=str)
def test_an_attention_that_multiheadattention_cannot_express_is_not_changed(
    attributes: Any,
) -> None:
    model, _ = attention(**attributes)
    separate_projections(model.graph)
    assert ops(model) == ["Attention"]


@pytest.mark.parametrize("size", [2 * BATCH, "ranges"])
def test_an_attention_with_a_mask_of_ranges_is_not_changed_and_runs(size: int | str) -> None:
    model, feeds = attention("ranges")
    before = run(model, feeds)
    model.graph.inputs[1].shape = ir.Shape([size])
    separate_projections(model.graph)
    assert ops(model) == ["Attention"]
    assert np.array_equal(run(model, feeds), before)
