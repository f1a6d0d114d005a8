"""Layers whose features the graph reorders take adapters only with proof by the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import AdapterConfig
from loradeploy.errors import ExportError
from loradeploy.export.read.modules.find import Evidence, find_modules
from tests.export.graphs import Builder

HEADS, SIZE = 2, 4
WIDTH = HEADS * SIZE
MODULE = "model.layers.0.self_attn.q_proj"
PAIR = Factors(np.ones((2, WIDTH), np.float32), np.ones((WIDTH, 2), np.float32))
ADAPTER = Adapter(AdapterConfig(r=2, lora_alpha=4, target_modules=("q_proj",)), {MODULE: PAIR})
Form = Callable[[Builder, ir.Value], ir.Value]


def _ints(b: Builder, *numbers: int) -> ir.Value:
    return b.constant(f"ints_{len(b.constants)}", np.array(numbers, np.int64))


def _parts(b: Builder, y: ir.Value, *bounds: tuple[int, int], step: int = 1) -> list[ir.Value]:
    axis, steps = _ints(b, -1), _ints(b, step)
    return [
        b.node("Slice", [y, _ints(b, begin), _ints(b, end), axis, steps]) for begin, end in bounds
    ]


def _heads(b: Builder, y: ir.Value) -> ir.Value:
    split = b.node("Reshape", [y, _ints(b, 0, 0, HEADS, SIZE)])
    return b.node("Transpose", [split], perm=[0, 2, 1, 3])


def _dynamic_heads(b: Builder, y: ir.Value) -> ir.Value:
    """Split into heads by computed batch and sequence sizes, as torch's older exporter does."""
    shape = b.node("Shape", [y])
    sizes = [b.node("Gather", [shape, _ints(b, axis)]) for axis in (0, 1)]
    target = b.node("Concat", [*sizes, _ints(b, HEADS, SIZE)], axis=0)
    return b.node("Transpose", [b.node("Reshape", [y, target])], perm=[0, 2, 3, 1])


def _rotated(b: Builder, y: ir.Value, *, negated: bool = True) -> ir.Value:
    first, second = _parts(b, y, (0, WIDTH // 2), (WIDTH // 2, WIDTH))
    second = b.node("Neg", [second]) if negated else second
    turned = b.node("Concat", [second, first], axis=-1)
    cos, sin = (b.node("Cos", [b.inputs[0]]), b.node("Sin", [b.inputs[0]]))
    return b.node("Add", [b.node("Mul", [y, cos]), b.node("Mul", [turned, sin])])


def _gathered(b: Builder, y: ir.Value) -> ir.Value:
    return b.node("Gather", [y, _ints(b, *reversed(range(WIDTH)))], axis=-1)


def _gathered_heads(b: Builder, y: ir.Value) -> ir.Value:
    return b.node("Gather", [_heads(b, y), _ints(b, *reversed(range(HEADS)))], axis=1)


def _joined(b: Builder, y: ir.Value) -> ir.Value:
    return b.node("Concat", _parts(b, y, (WIDTH // 2, WIDTH), (0, WIDTH // 2)), axis=-1)


def _transposed(b: Builder, y: ir.Value) -> ir.Value:
    pairs = b.node("Reshape", [y, _ints(b, 0, 0, SIZE, HEADS)])
    turned = b.node("Transpose", [pairs], perm=[0, 1, 3, 2])
    return b.node("Reshape", [turned, _ints(b, 0, 0, -1)])


def _by_kind(b: Builder, y: ir.Value) -> ir.Value:
    """Reorder rows from q and k of each head to all q, then all k, as in Qwen3-Next."""
    heads = b.node("Reshape", [y, _ints(b, 0, 0, HEADS, SIZE)])
    parts = _parts(b, heads, (0, SIZE // 2), (SIZE // 2, SIZE))
    flat = [b.node("Reshape", [part, _ints(b, 0, 0, -1)]) for part in parts]
    return b.node("Concat", flat, axis=-1)


def _multiplied(b: Builder, y: ir.Value) -> ir.Value:
    return b.node("MatMul", [y, b.constant("order", np.eye(WIDTH, dtype=np.float32)[::-1].copy())])


def _behind_bias_and_activation(b: Builder, y: ir.Value) -> ir.Value:
    return _gathered(b, b.node("Relu", [b.node("Add", [y, b.weight("bias", WIDTH)])]))


def _then_rotated(b: Builder, y: ir.Value) -> ir.Value:
    return _rotated(b, _gathered(b, y))


def _halves(b: Builder, y: ir.Value) -> ir.Value:
    return b.node("Sub", _parts(b, y, (0, WIDTH // 2), (WIDTH // 2, WIDTH)))


def _alone(b: Builder, y: ir.Value) -> ir.Value:
    return b.node("Softmax", [y])


def _signed_rotation(b: Builder, y: ir.Value) -> ir.Value:
    return _rotated(b, y, negated=False)


def _indexed(b: Builder, y: ir.Value) -> ir.Value:
    """Select one part of each group, as torch.onnx writes y[:, :, :, 1]."""
    groups = b.node("Reshape", [y, _ints(b, 0, 0, HEADS, 2, SIZE // 2)])
    front = b.node("Transpose", [groups], perm=[3, 0, 1, 2, 4])
    parts = [
        b.node("GatherND", [front, b.constant(f"at_{at}", np.array([[at]], np.int64))])
        for at in (0, 1)
    ]
    return b.node("Sub", parts)


ORDINARY = [_indexed, _alone, _heads, _dynamic_heads, _rotated, _signed_rotation, _halves]
REORDERED = [
    *(_gathered, _gathered_heads, _joined, _transposed, _by_kind, _multiplied),
    *(_behind_bias_and_activation, _then_rotated),
]


def _named(form: Form) -> str:
    return form.__name__.strip("_").replace("_", "-")


def _model(form: Form, *, before: bool = False) -> ir.Model:
    b = Builder()
    shape: list[int | str] = ["batch", "sequence", WIDTH]
    x = b.node("Softmax", [b.input("x", shape)], shape)
    if before:
        x = form(b, x)
        x.shape = ir.Shape(shape)
    y = b.node("MatMul", [x, b.weight("w", WIDTH, WIDTH)], shape, module=MODULE, name="q")
    return b.model(b.node("Softmax", [y if before else form(b, y)]))


@pytest.mark.parametrize("form", ORDINARY, ids=_named)
def test_heads_halves_and_rotations_keep_the_order(form: Form, tmp_path: Path) -> None:
    assert MODULE in find_modules(_model(form), tmp_path, Evidence(), [ADAPTER]).linears


@pytest.mark.parametrize("form", REORDERED, ids=_named)
def test_reordered_outputs_take_no_adapters_without_a_checkpoint(
    form: Form, tmp_path: Path
) -> None:
    assert not find_modules(_model(form), tmp_path, Evidence(), []).linears
    with pytest.raises(ExportError, match=r"q_proj: \w+ \(\w+\) puts its features into another"):
        find_modules(_model(form), tmp_path, Evidence(), [ADAPTER])


@pytest.mark.parametrize("form", [_gathered, _joined, _transposed, _multiplied], ids=_named)
def test_reordered_inputs_take_no_adapters_without_a_checkpoint_either(
    form: Form, tmp_path: Path
) -> None:
    model = _model(form, before=True)
    assert not find_modules(model, tmp_path, Evidence(), []).linears
    with pytest.raises(ExportError, match=r"q_proj: \w+ \(\w+\) puts its features into another"):
        find_modules(model, tmp_path, Evidence(), [ADAPTER])


@pytest.mark.parametrize("permuted", [False, True], ids=["heads", "permuted"])
def test_heads_that_are_joined_before_a_layer_are_accepted_unless_permuted(
    permuted: bool, tmp_path: Path
) -> None:
    b = Builder()
    x = b.input("x", ["batch", HEADS, "sequence", SIZE])
    y = b.node("Softmax", [x], ["batch", HEADS, "sequence", SIZE])
    if permuted:
        y = b.node("Gather", [y, _ints(b, *reversed(range(HEADS)))], axis=1)
    y = b.node("Transpose", [y], perm=[0, 2, 1, 3])
    y = b.node("Reshape", [y, _ints(b, 0, 0, WIDTH)], ["batch", "sequence", WIDTH])
    model = b.model(b.node("MatMul", [y, b.weight("w", WIDTH, WIDTH)], module=MODULE))
    found = find_modules(model, tmp_path, Evidence(), []).linears
    assert (MODULE in found) != permuted


def test_a_module_map_does_not_prove_the_order_of_rows(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"q": MODULE}))
    evidence = Evidence(map=tmp_path / "map.json")
    assert MODULE in find_modules(_model(_heads), tmp_path, evidence, [ADAPTER]).linears
    message = "unless the model itself .*: give `checkpoint`, whose numbers show it; a map does not"
    with pytest.raises(ExportError, match=message):
        find_modules(_model(_gathered), tmp_path, evidence, [ADAPTER])


@pytest.mark.parametrize("form", [_gathered, _by_kind], ids=_named)
def test_the_weights_of_the_checkpoint_prove_the_order(form: Form, tmp_path: Path) -> None:
    model = _model(form)
    w = model.graph.initializers["w"].const_value.numpy()
    weights = {f"{MODULE}.weight": np.ascontiguousarray(w.T)}
    save_file(weights, tmp_path / "model.safetensors")
    evidence = Evidence(checkpoint=tmp_path)
    assert MODULE in find_modules(model, tmp_path, evidence, [ADAPTER]).linears


@pytest.mark.parametrize(
    ("config", "refused"), [('{"model_type": "llama"}', True), ('{"model_type": "gptj"}', False)]
)
@pytest.mark.parametrize("written", ["slices", "pairs"])
def test_interleaved_rotary_pairs_of_plain_nodes_are_detected_too(
    written: str, config: str, refused: bool, tmp_path: Path
) -> None:
    def pairs(b: Builder, y: ir.Value) -> ir.Value:
        if written == "slices":
            return b.node("Sub", _parts(b, y, (0, WIDTH), (1, WIDTH), step=2))
        apart = b.node("Reshape", [y, _ints(b, 0, 0, -1, 2)])
        return b.node("Sub", [b.node("Gather", [apart, _ints(b, at)], axis=-1) for at in (0, 1)])

    (tmp_path / "config.json").write_text(config)
    if not refused:
        assert MODULE in find_modules(_model(pairs), tmp_path, Evidence(), [ADAPTER]).linears
        return
    with pytest.raises(ExportError, match="q_proj: the graph rotates interleaved rows"):
        find_modules(_model(pairs), tmp_path, Evidence(), [ADAPTER])
