"""A product is a module of the checkpoint only where all of its numbers are, and nothing else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.tensors import write_arrays
from loradeploy.bundle.factors import adapter_from_side_inputs, side_inputs
from loradeploy.bundle.manifest import Manifest
from loradeploy.errors import ExportError
from loradeploy.export.biases import fused_bias, hides_bias, separate_biases
from loradeploy.export.find import Findings, find_linears, note_modules
from loradeploy.export.held import HeldBase
from loradeploy.export.identity import CheckpointWeights
from loradeploy.export.merge import merge_adapter
from loradeploy.export.naming import by_graph
from loradeploy.export.outputs import Change
from loradeploy.export.side_inputs import inject_side_inputs
from tests.export.graphs import Builder, manifest_of, numbers, run
from tests.tolerances import tolerance

IN, OUT = 24, 16
INTERLEAVED = tuple(np.arange(OUT).reshape(2, 2, OUT // 4).swapaxes(1, 2).ravel().tolist())
Arrays = dict[str, NDArray[Any]]


def checkpoint(place: Path, **arrays: NDArray[Any]) -> CheckpointWeights:
    """A checkpoint of these tensors; `a__weight` is `a.weight`."""
    named = {name.replace("__", "."): values for name, values in arrays.items()}
    write_arrays(place / "model.safetensors", named, {})
    return CheckpointWeights(place)


def graph_of(
    *weights: NDArray[Any], biases: list[NDArray[Any]] | None = None, module: str | None = None
) -> ir.Model:
    """A product of x with each weight [out, in]."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", weights[0].shape[1]])
    outputs = []
    for index, weight in enumerate(weights):
        held = b.constant(f"w{index}", np.ascontiguousarray(weight.T))
        y = b.node("MatMul", [x, held], ["batch", "sequence", len(weight)], module=module)
        if biases:
            y = b.node("Add", [y, b.constant(f"b{index}", biases[index])])
        outputs.append(y)
    return b.model(*outputs)


def found(model: ir.Model, weights: CheckpointWeights) -> Findings:
    return find_linears(model, weights.namer(model.graph, by_graph))


W, V = numbers(OUT, IN, seed=1), numbers(OUT, IN, seed=2)
SWAPPED = [0, 2, 1, *range(3, OUT)]


@pytest.mark.parametrize(
    ("order", "held"),
    [(INTERLEAVED, "float32"), (SWAPPED, "float32"), (INTERLEAVED, "float16")],
)
def test_rows_in_another_order_are_found_with_their_order(
    order: tuple[int, ...], held: str, tmp_path: Path
) -> None:
    weights = checkpoint(tmp_path, a__weight=W, b__weight=V)
    model = graph_of(W[list(order)].astype(held).astype(np.float32), V)
    linears = found(model, weights).linears
    assert linears["a"].order == tuple(order)
    assert linears["b"].order is None
    note_modules(linears)
    assert find_linears(model).linears["a"].order == tuple(order), "the graph does not remember it"


def test_the_parts_of_a_packed_product_have_orders_of_their_own(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path, a__weight=W, b__weight=V)
    packed = np.concatenate([V, W[list(INTERLEAVED)]])
    linears = found(graph_of(packed), weights).linears
    assert linears["b"].slice == (0, OUT) and linears["b"].order is None
    assert linears["a"].slice == (OUT, 2 * OUT) and linears["a"].order == INTERLEAVED


def _row_scaled() -> NDArray[np.float32]:
    spoilt = W.copy()
    spoilt[6] *= 1.5
    return spoilt


@pytest.mark.parametrize(
    ("held", "why"),
    [
        (W * 0.5, "times 0.5"),
        (_row_scaled(), "some rows"),
        (W * np.linspace(1, 2, IN, dtype=np.float32), "norm folded in"),
        (W[:, ::-1], "inputs of the weight are in another order"),
        (W + 0.01 * numbers(OUT, IN, seed=5), "more than its rounding"),
    ],
    ids=["half", "one row scaled", "norm folded in", "inputs turned round", "another fine-tune"],
)
def test_a_weight_that_is_nearly_a_modules_is_not_taken_for_it(
    held: NDArray[np.float32], why: str, tmp_path: Path
) -> None:
    weights = checkpoint(tmp_path, a__weight=W, b__weight=V)
    assert set(found(graph_of(held, V), weights).linears) == {"b"}
    assert why in weights.reasons["a"]


@pytest.mark.parametrize("held", [np.float16, np.float32])
def test_a_checkpoint_of_half_precision_is_found_in_a_graph_of_float32(
    held: type[Any], tmp_path: Path
) -> None:
    weights = checkpoint(tmp_path, a__weight=W.astype(np.float16))
    assert set(found(graph_of(W.astype(held).astype(np.float32)), weights).linears) == {"a"}


def test_equal_weights_are_told_apart_by_their_biases_or_not_at_all(tmp_path: Path) -> None:
    one, other = numbers(OUT, seed=7), numbers(OUT, seed=8)
    weights = checkpoint(tmp_path, a__weight=W, b__weight=W, a__bias=one, b__bias=other)
    assert set(found(graph_of(W, W, biases=[other, one]), weights).linears) == {"a", "b"}
    bare = graph_of(W)
    assert not found(bare, weights).linears
    assert "which are equal" in weights.reasons["a"]


def test_a_bias_of_another_is_no_evidence(tmp_path: Path) -> None:
    one, other = numbers(OUT, seed=7), numbers(OUT, seed=8)
    weights = checkpoint(tmp_path, a__weight=W, b__weight=V, a__bias=one, b__bias=other)
    assert not found(graph_of(W, V, biases=[other, one]), weights).linears
    assert "bias" in weights.reasons["a"]


def test_two_products_of_one_weight_without_names_may_be_two_modules(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path, a__weight=W)
    assert not found(graph_of(W, W), weights).linears
    assert "may be several modules" in weights.reasons["a"]


@pytest.mark.parametrize("held", [V, numbers(OUT, IN, seed=9), W * 2], ids=["b", "none", "twice"])
def test_a_name_that_the_numbers_contradict_is_an_error(
    held: NDArray[np.float32], tmp_path: Path
) -> None:
    weights = checkpoint(tmp_path, a__weight=W, b__weight=V)
    with pytest.raises(ExportError, match="is a by metadata.*but not by the numbers"):
        found(graph_of(held, module="a"), weights)


@pytest.mark.parametrize(("bits", "off"), [(4, 0.0), (8, 0.0), (8, 0.2)])
def test_packed_weights_are_compared_within_their_steps(
    bits: int, off: float, tmp_path: Path
) -> None:
    b, into = Builder(), 32
    weight = numbers(OUT, into, seed=3)
    steps = np.abs(weight).max(axis=1) / (2 ** (bits - 1) - 1)
    integers = np.round(weight / steps[:, None]).astype(np.int64) + (1 << (bits - 1))
    packed = integers.reshape(OUT, 1, -1, 8 // bits)
    packed = (packed << np.arange(0, 8, bits)).sum(axis=-1).astype(np.uint8)
    x = b.input("x", ["batch", "sequence", into])
    constants = [b.constant("w", packed), b.constant("s", steps.astype(np.float32))]
    y = b.node("MatMulNBits", [x, *constants], K=into, N=OUT, bits=bits, block_size=into)
    b.nodes[-1].domain = "com.microsoft"
    weights = checkpoint(tmp_path, a__weight=weight + off * numbers(OUT, into, seed=4))
    assert set(found(b.model(y), weights).linears) == (set() if off else {"a"})


# -- adapters follow the order -----------------------------------------------------------------


def adapter_of() -> Adapter:
    """Factors for `a`, and its bias trained."""
    pair = Factors(numbers(2, IN, seed=11), numbers(OUT, 2, seed=12))
    config = AdapterConfig(r=2, lora_alpha=4, target_modules=("a",), bias="lora_only")
    return Adapter(config, {"a": pair}, {"a.bias": numbers(OUT, seed=13)})


def adapted(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the module computes with the adapter, its outputs as the graph orders them."""
    pair = adapter_of().factors["a"]
    y = x @ (W + 2 * pair.B @ pair.A).T + adapter_of().saved["a.bias"]
    return np.asarray(y[..., list(INTERLEAVED)])


def test_side_inputs_are_in_the_order_of_the_graph_and_come_back_in_the_adapters(
    tmp_path: Path,
) -> None:
    bias = numbers(OUT, seed=14)
    held = bias[list(INTERLEAVED)]
    model = graph_of(W[list(INTERLEAVED)], biases=[held], module="a")
    weights = checkpoint(tmp_path, a__weight=W, a__bias=bias)
    linears = found(model, weights).linears
    added = inject_side_inputs(
        model, [linears["a"]], changes=[Change(linears["a"], scale=False, offset=True)]
    )
    manifest = Manifest.from_json(manifest_of(added).to_json())
    base = HeldBase(model.graph, added.biases)
    side = side_inputs(adapter_of(), manifest, base)
    x = numbers(2, 3, IN)
    given = {"x": x, **side, "adapter_ids": np.zeros(2, np.int64)}
    assert np.abs(run(model, given) - adapted(x)).max() < tolerance("torch-onnx-tiny")
    back = adapter_from_side_inputs(side, manifest, base)
    own = adapter_of().factors["a"]
    assert np.allclose(back.factors["a"].B @ back.factors["a"].A, 2 * own.B @ own.A, atol=1e-5)
    assert np.allclose(back.saved["a.bias"], adapter_of().saved["a.bias"], atol=1e-5)


def test_a_merge_is_in_the_order_of_the_graph(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path, a__weight=W)
    model = graph_of(W[list(INTERLEAVED)], module="a")
    merge_adapter(model, found(model, weights).linears, adapter_of())
    x = numbers(2, 3, IN)
    assert np.abs(run(model, {"x": x}) - adapted(x)).max() < tolerance("torch-onnx-tiny")


# -- biases ------------------------------------------------------------------------------------


def fused(op: str, bias: NDArray[np.float32]) -> ir.Model:
    """A product whose bias is in the operator behind it."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    y = b.node("MatMul", [x, b.constant("w", W.T.copy())], ["batch", "sequence", OUT], module="m")
    own = b.constant("b", bias)
    if op in ("BiasGelu", "FastGelu"):
        z = b.node(op, [y, own])
    else:
        skip = b.input("skip", ["batch", "sequence", OUT])
        norms = [b.weight("gamma", OUT)]
        norms += [b.weight("beta", OUT)] if op == "SkipLayerNormalization" else []
        z = b.node(op, [y, skip, *norms, own])
    b.nodes[-1].domain = "com.microsoft"
    model = b.model(z)
    model.graph.opset_imports["com.microsoft"] = 1
    return model


@pytest.mark.parametrize(
    "op",
    ["BiasGelu", "FastGelu", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"],
)
def test_a_fused_bias_is_found_and_made_an_addition_of_its_own(op: str) -> None:
    bias = numbers(OUT, seed=6)
    model = fused(op, bias)
    feeds: Arrays = {"x": numbers(2, 3, IN), "skip": numbers(2, 3, OUT, seed=1)}
    feeds = {value.name: feeds[value.name] for value in model.graph.inputs if value.name}
    before = run(model, feeds)
    linears = find_linears(model).linears
    assert linears["m"].bias is None
    seen = fused_bias(linears["m"].nodes[0], OUT)
    assert seen is not None and (seen.numbers == bias).all()
    apart = separate_biases(model.graph, linears, ["m"])["m"]
    assert apart.bias is not None and apart.bias.const_value is not None
    assert (apart.bias.const_value.numpy() == bias).all()
    assert np.abs(run(model, feeds) - before).max() < tolerance("torch-onnx-tiny")


@pytest.mark.parametrize("behind", ["Reshape", "Unknown", "Relu"])
def test_what_may_hide_a_bias_is_not_taken_for_a_layer_without_one(behind: str) -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    y = b.node("MatMul", [x, b.constant("w", W.T.copy())], module="m")
    if behind == "Reshape":
        shape = b.constant("shape", np.array([0, 0, 2, OUT // 2], np.int64))
        z = b.node("Add", [b.node("Reshape", [y, shape]), b.weight("b", 2, OUT // 2)])
    else:
        z = b.node(behind, [y])
        b.nodes[-1].domain = "com.microsoft" if behind == "Unknown" else ""
    product = find_linears(b.model(z)).linears["m"].nodes[0]
    assert hides_bias(product, OUT) == (behind != "Relu")
