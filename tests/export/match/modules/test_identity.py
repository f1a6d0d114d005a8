"""A matrix product is identified as a module of the checkpoint if all of its weights are equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from loradeploy.errors import ExportError
from loradeploy.export.match.linears import Findings, find_linears
from loradeploy.export.match.modules.identity import CheckpointWeights
from loradeploy.export.match.modules.naming import by_graph
from loradeploy.export.passes.precision.quantize import quantize
from loradeploy.export.passes.side_inputs.inject import SideInputs
from tests.export.graphs import Builder, manifest_of, numbers

IN, OUT, HEADS = 24, 16, 2
Weights = NDArray[np.float32]
A = numbers(OUT, IN, seed=1)  # [out, in], as checkpoints have it
B = numbers(OUT, IN, seed=2)


def interleaved(weight: Weights) -> Weights:
    """Reorder rows to Meta's rotary layout: pairs side by side within each head."""
    return weight.reshape(HEADS, 2, -1, IN).swapaxes(1, 2).reshape(OUT, IN)


def swapped(weight: Weights) -> Weights:
    """Exchange two rows in the middle; no sampled row changes."""
    rows = np.arange(OUT)
    rows[[2, 3]] = rows[[3, 2]]
    return weight[rows]


def with_row(weight: Weights, factor: float) -> Weights:
    changed = weight.copy()
    changed[3] *= factor
    return changed


def graph(*weights: Weights, names: tuple[str | None, ...] = (), bias: Any = None) -> ir.Model:
    """Return a graph with a product for each weight [out, in], with module paths from `names`."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    outputs = []
    for index, weight in enumerate(weights):
        w = b.constant(f"w{index}", np.ascontiguousarray(weight.T))
        module = names[index] if names else None
        shape: list[int | str] = ["batch", "sequence", len(weight)]
        y = b.node("MatMul", [x, w], shape, module=module, name=f"y{index}")
        if bias is not None:
            y = b.node("Add", [y, b.constant(f"b{index}", bias)], shape, name=f"z{index}")
        outputs.append(y)
    return b.model(*outputs)


Look = Callable[..., Findings]


@pytest.fixture
def look(tmp_path: Path) -> Look:
    """(graph, tensors of the checkpoint, modules of adapters) → findings by weight comparison."""

    def run(model: ir.Model, tensors: dict[str, Any], needed: tuple[str, ...] = ()) -> Findings:
        save_file(
            {k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "model.safetensors"
        )
        return find_linears(model, CheckpointWeights(tmp_path, needed).namer(by_graph))

    return run


def checkpoint(**modules: Weights) -> dict[str, Weights]:
    return {f"{name}.weight": weight for name, weight in modules.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_equal_weights_identify_the_module_in_either_format(look: Look, dtype: Any) -> None:
    found = look(graph(A, B), checkpoint(a=A.astype(dtype).astype(np.float32), b=B))
    assert set(found.linears) == {"a", "b"}
    assert {linear.found_by for linear in found.linears.values()} == {"weight identity"}


def test_a_packed_product_is_identified_as_several_modules(look: Look) -> None:
    found = look(graph(np.concatenate([B, A])), checkpoint(a=A, b=B))
    assert {name: linear.slice for name, linear in found.linears.items()} == {
        "b": (0, OUT),
        "a": (OUT, 2 * OUT),
    }


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (interleaved, "it has the rows of a.weight in another order"),
        (swapped, r"it has the rows of a.weight in another order \(2 of 16 moved\)"),
        (lambda w: w * 0.5, r"it is 0.5 × a.weight"),
        (lambda w: w * 1.01, r"it is 1.01 × a.weight"),
        (lambda w: with_row(w, 2), "resembles a.weight and differs"),
        (lambda w: with_row(w, -1), "1 of 16 rows are not those of a.weight"),
        (lambda w: w + 1e-3 * B, "resembles a.weight and differs"),
    ],
    ids=["interleaved", "swapped", "half", "1-percent", "row", "turned-row", "fine-tuned"],
)
@pytest.mark.parametrize("named", [False, True])
def test_a_weight_with_any_difference_is_not_the_module(
    look: Look, change: Callable[[Weights], Weights], seen: str, named: bool
) -> None:
    model = graph(change(A), B, names=("a", "b") if named else ())
    with pytest.raises(ExportError, match=seen):
        look(model, checkpoint(a=A, b=B), ("a",))


@pytest.mark.parametrize("change", [interleaved, lambda w: w * 0.5])
def test_a_different_product_that_no_adapter_needs_is_skipped(
    look: Look, change: Callable[[Weights], Weights]
) -> None:
    found = look(graph(change(A), B), checkpoint(a=A, b=B), ("b",))
    assert set(found.linears) == {"b"}
    assert len(found.unidentified) == 1


def test_weights_equal_to_two_modules_identify_neither(look: Look) -> None:
    with pytest.raises(ExportError, match="that of a, b, and no name"):
        look(graph(A, A), checkpoint(a=A, b=A), ("a",))
    assert look(graph(A, A), checkpoint(a=A, b=A)).linears == {}


def test_one_initializer_of_two_products_identifies_neither_without_a_name(look: Look) -> None:
    """Tied modules are stored once: an adapter of one must not reach the other."""
    for names, found in (((), set()), (("a", "a"), {"a"})):
        b = Builder()
        x = b.input("x", ["batch", "sequence", IN])
        w = b.constant("w", np.ascontiguousarray(A.T))
        shape: list[int | str] = ["batch", "sequence", OUT]
        outputs = [
            b.node("MatMul", [x, w], shape, module=names[i] if names else None, name=f"y{i}")
            for i in (0, 1)
        ]
        model = b.model(*outputs)
        assert set(look(model, checkpoint(a=A)).linears) == found
        if not names:
            with pytest.raises(
                ExportError, match="is also that of 1 more.*identify it in `module_map`"
            ):
                look(model, checkpoint(a=A), ("a",))


@pytest.mark.parametrize("fused", ["BiasGelu", "FastGelu"])
def test_a_fused_bias_distinguishes_modules_too(look: Look, fused: str) -> None:
    bias = numbers(OUT, seed=3)
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    shape: list[int | str] = ["batch", "sequence", OUT]
    y = b.node("MatMul", [x, b.constant("w", np.ascontiguousarray(A.T))], shape, name="y")
    z = b.node(fused, [y, b.constant("b", bias)], shape, name="z", domain="com.microsoft")
    found = look(b.model(z), checkpoint(a=A, b=A) | {"a.bias": bias + 1, "b.bias": bias})
    assert {name: linear.unseen_bias for name, linear in found.linears.items()} == {"b": False}


def test_names_distinguish_modules_of_equal_weights(look: Look) -> None:
    found = look(graph(A, A, names=("b", "a")), checkpoint(a=A, b=A), ("a",))
    assert {name: linear.nodes[0].name for name, linear in found.linears.items()} == {
        "b": "y0",
        "a": "y1",
    }


def test_biases_distinguish_modules_of_equal_weights(look: Look) -> None:
    bias = numbers(OUT, seed=3)
    tensors = checkpoint(a=A, b=A) | {"a.bias": bias, "b.bias": bias + 1}
    assert set(look(graph(A, bias=bias + 1), tensors).linears) == {"b"}


@pytest.mark.parametrize(
    ("held", "seen"),
    [(numbers(OUT, seed=4), "its bias is not a.bias"), (None, "the checkpoint has no a.bias")],
    ids=["another", "none"],
)
def test_another_bias_than_the_modules_is_a_difference(look: Look, held: Any, seen: str) -> None:
    tensors = checkpoint(a=A) | ({} if held is None else {"a.bias": held})
    with pytest.raises(ExportError, match=seen):
        look(graph(A, bias=numbers(OUT, seed=3)), tensors, ("a",))


def test_a_bias_that_cannot_be_found_is_noted(look: Look) -> None:
    zeros = np.zeros(OUT, np.float32)
    for bias, unseen in ((numbers(OUT, seed=3), True), (zeros, False)):
        found = look(graph(A), checkpoint(a=A) | {"a.bias": bias}, ("a",))
        assert found.linears["a"].unseen_bias is unseen


def test_a_name_that_the_weights_contradict_is_an_error(look: Look) -> None:
    with pytest.raises(
        ExportError, match=r"named after b \(metadata .*but its weight is that of a"
    ):
        look(graph(A, B, names=("b", "a")), checkpoint(a=A, b=B))


def test_a_padded_vocabulary_is_skipped_unless_an_adapter_needs_it(look: Look) -> None:
    model = graph(A, np.concatenate([B, np.zeros_like(B)]), names=("a", "lm_head"))
    assert set(look(model, checkpoint(a=A, lm_head=B), ("a",)).linears) == {"a"}
    with pytest.raises(ExportError, match=r"the rows of lm_head.weight and 16 more, as a padded"):
        look(model, checkpoint(a=A, lm_head=B), ("lm_head",))


def test_weights_decide_where_the_checkpoint_does_not_have_the_name(look: Look) -> None:
    found = look(graph(A, B, names=("x.one", "x.two")), checkpoint(a=A, b=B))
    assert set(found.linears) == {"a", "b"}


@pytest.mark.parametrize(
    ("stored", "needed"),
    [("h.0.proj", "transformer.h.0.proj"), ("bert.h.0.proj", "h.0.proj")],
    ids=["bare-checkpoint", "bare-adapter"],
)
def test_modules_have_the_names_that_the_adapters_use(look: Look, stored: str, needed: str) -> None:
    tensors = {f"{stored}.weight": A, f"{stored.replace('0', '1')}.weight": B}
    found = look(graph(A, B), tensors, (needed,))
    assert set(found.linears) == {needed, needed.replace("0", "1")}


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_identify_the_module_within_their_rounding(look: Look, bits: int) -> None:
    # Large enough for a quantization block.
    wide = numbers(64, 64, seed=5)
    order = np.r_[1:64, 0]
    for weight, fits in ((wide, True), (wide * 1.3, False), (wide[order], False)):
        b = Builder()
        x = b.input("x", ["batch", "sequence", 64])
        w = b.constant("w", np.ascontiguousarray(weight.T))
        y = b.node("MatMul", [x, w], ["batch", "sequence", 64], module="a", name="y")
        model = b.model(y)
        quantize(model, manifest_of(SideInputs((), (), {}, "float32")), bits)
        if fits:
            assert set(look(model, checkpoint(a=wide), ("a",)).linears) == {"a"}
            continue
        with pytest.raises(ExportError, match=r"a\.weight"):
            look(model, checkpoint(a=wide), ("a",))


def integers(weight: Weights, steps: float = 127) -> tuple[NDArray[np.int8], np.float32]:
    """Quantize a weight [out, in] to integers [in, out] and a single scale."""
    scale = np.float32(np.abs(weight).max() / steps)
    return np.ascontiguousarray(np.round(weight / scale).astype(np.int8).T), scale


def dequantized(weight: Weights, factor: float = 1) -> ir.Model:
    """DequantizeLinear → MatMul, with one scale for the whole weight."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    numbers_, scale = integers(weight)
    held = [b.constant("q", numbers_), b.constant("s", np.array(scale * factor, np.float32))]
    w = b.node("DequantizeLinear", held, [IN, OUT], name="w")
    return b.model(b.node("MatMul", [x, w], ["batch", "sequence", OUT], name="y"))


def dynamic(weight: Weights, factor: float = 1) -> ir.Model:
    """DynamicQuantizeLinear → MatMulInteger → Cast → Mul, as onnxruntime's quantizer writes it."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    numbers_, scale = integers(weight)
    quantize = ir.node("DynamicQuantizeLinear", [x], num_outputs=3, name="dq")
    for index, value in enumerate(quantize.outputs):
        value.name = f"dq{index}"
    b.nodes.append(quantize)
    q, x_scale, x_zero = quantize.outputs
    zero = b.constant("z", np.zeros((), np.int8))
    shape: list[int | str] = ["batch", "sequence", OUT]
    y = b.node("MatMulInteger", [q, b.constant("q", numbers_), x_zero, zero], shape, name="y")
    floats = b.node("Cast", [y], shape, name="c", to=1)
    s = b.constant("s", np.array(scale * factor, np.float32))
    both = b.node("Mul", [x_scale, s], [], name="m")
    return b.model(b.node("Mul", [floats, both], shape, name="out"))


@pytest.mark.parametrize("form", [dequantized, dynamic])
@pytest.mark.parametrize(
    ("change", "factor", "fits"),
    [
        (lambda w: w, 1, True),
        (lambda w: w, 0.125, False),
        (lambda w: w * 1.05, 1, False),
        (lambda w: with_row(w, 1.1), 1, False),
        (interleaved, 1, False),
    ],
    ids=["same", "wrong-scale", "scaled", "row", "interleaved"],
)
def test_integer_weights_identify_the_module_only_with_the_right_scale(
    look: Look,
    form: Callable[..., ir.Model],
    change: Callable[[Weights], Weights],
    factor: float,
    fits: bool,
) -> None:
    model = form(change(A), factor)
    if fits:
        assert set(look(model, checkpoint(a=A), ("a",)).linears) == {"a"}
        return
    with pytest.raises(ExportError, match=r"a\.weight"):
        look(model, checkpoint(a=A), ("a",))
