"""Every input and attribute of the operators that an export rewrites or reads is handled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import AdapterConfig
from loradeploy.errors import AdapterMismatchError, ExportError
from loradeploy.export.match.linears import find_linears
from loradeploy.export.match.operators import MICROSOFT, OPERATORS, REFUSED, problem_of
from loradeploy.export.match.products import products
from loradeploy.export.match.whole.norm_forms import annotate_forms, check_known
from loradeploy.export.match.whole.parts import find_parts
from loradeploy.export.merge import merge_adapter
from loradeploy.export.passes.gqa import group_queries
from loradeploy.export.passes.side_inputs.inject import inject_side_inputs
from loradeploy.export.read.products.normalize import normalize_products
from tests.export.graphs import IN, OUT, Builder, near, numbers, run
from tests.export.passes.test_gqa import attention

Array = NDArray[Any]
ROWS = pytest.mark.parametrize("row", OPERATORS, ids=lambda row: ".".join(filter(None, row)))
BATCH = 3


# -- the table -----------------------------------------------------------------------------------


def _schema(domain: str, name: str) -> Any:
    found = [s for s in get_all_operator_schema() if (s.domain, s.name) == (domain, name)]
    return max(found, key=lambda schema: schema.since_version)


@ROWS
def test_every_input_and_attribute_of_the_installed_operator_is_in_the_table(
    row: tuple[str, str],
) -> None:
    schema, ours = _schema(*row), OPERATORS[row]
    assert [given.name for given in schema.inputs] == list(ours.inputs)[: len(schema.inputs)]
    assert set(schema.attributes) <= set(ours.attributes)


@ROWS
def test_an_unknown_attribute_is_refused_by_name(row: tuple[str, str]) -> None:
    domain, name = row
    value = ir.Value(name="v")
    future = ir.node(name, [value], attributes={"future": 1}, domain=domain)
    assert problem_of(future) == f"{name} has the attribute future, which is not known"
    count = len(OPERATORS[row].inputs)
    longer = ir.node(name, [value] * (count + 1), domain=domain)
    refused = [each for each, how in OPERATORS[row].inputs.items() if how is REFUSED]
    expected = f"input {refused[0]}" if refused else f"an input number {count}, which is not known"
    assert expected in str(problem_of(longer))


REFUSED_ATTRIBUTES = [
    (*row, attribute, operator.refused.get(attribute))
    for row, operator in OPERATORS.items()
    for attribute, how in operator.attributes.items()
    if how is REFUSED
]


@pytest.mark.parametrize(("domain", "name", "attribute", "same"), REFUSED_ATTRIBUTES)
def test_a_refused_attribute_is_accepted_at_its_default_value(
    domain: str, name: str, attribute: str, same: int | None
) -> None:
    x = ir.Value(name="x")
    if same is not None:
        given = ir.node(name, [x], attributes={attribute: same}, domain=domain)
        assert problem_of(given) is None
    value = (same or 0) + 1
    other = ir.node(name, [x], attributes={attribute: value}, domain=domain)
    assert problem_of(other) == f"{name} has {attribute} = {value}"


# -- graphs of one product -----------------------------------------------------------------------


def _node(
    b: Builder, op: str, inputs: list[ir.Value | None], shape: list[Any], **attributes: Any
) -> ir.Value:
    """Add a product of the module m by an operator of onnxruntime."""
    y = b.node(op, inputs, shape, module="m", **attributes)  # type: ignore[arg-type]
    b.nodes[-1].domain = MICROSOFT
    return y


def _model(b: Builder, y: ir.Value) -> ir.Model:
    model = b.model(y)
    model.graph.opset_imports[MICROSOFT] = 1
    return model


def _adapter(into: int = IN, out: int = OUT, **saved: Array) -> Adapter:
    pair = Factors(numbers(2, into, seed=1), numbers(out, 2, seed=2))
    config = AdapterConfig(
        r=2, lora_alpha=4, target_modules=("m",), bias="all" if saved else "none"
    )
    return Adapter(config, {"m": pair}, {f"m.{name}": values for name, values in saved.items()})


def _update(adapter: Adapter) -> Array:
    pair = adapter.factors["m"]
    update: Array = adapter.scaling("m") * pair.B @ pair.A  # [out, in]
    return update


def _merge(model: ir.Model, adapter: Adapter, **options: Any) -> None:
    merge_adapter(model, find_linears(model).linears, adapter, **options)


# -- Gemm and FusedMatMul --------------------------------------------------------------------------

SCALED = [
    {"alpha": 0.5},
    {"alpha": 0.3, "transB": 1},
    {"beta": 2.0},
    {"beta": 0.0},
    {"transA": 1},
    {"alpha": 3.0, "beta": 0.25, "transA": 1, "transB": 1},
]
ADDENDS: dict[str, tuple[int, ...]] = {
    "none": (),
    "scalar": (1,),
    "row": (1, OUT),
    "bias": (OUT,),
    "column": (BATCH, 1),
    "whole": (BATCH, OUT),
}


def _gemm(given: dict[str, Any], addend: str) -> tuple[ir.Model, Array, Array, Array]:
    """Return the graph, the input x, W [out, in], and the addend of x W."""
    b = Builder()
    turned, turns = given.get("transA", 0), given.get("transB", 0)
    x = b.input("x", [IN, BATCH] if turned else [BATCH, IN])
    w = b.weight("w", *((OUT, IN) if turns else (IN, OUT)))
    inputs, C = [x, w], np.zeros(OUT, np.float32)
    if addend != "none":
        c = b.weight("c", *ADDENDS[addend])
        inputs.append(c)
        C = c.const_value.numpy() * np.float32(given.get("beta", 1.0))
    y = b.node("Gemm", inputs, [BATCH, OUT], module="m", **given)
    W = w.const_value.numpy() * np.float32(given.get("alpha", 1.0))
    return b.model(y), numbers(BATCH, IN), W if turns else W.T, C


@pytest.mark.parametrize("addend", ADDENDS)
@pytest.mark.parametrize("given", SCALED, ids=str)
def test_a_gemm_that_scales_or_transposes_takes_an_adapter_like_a_plain_one(
    given: dict[str, Any], addend: str
) -> None:
    adapter = _adapter()
    model, x, W, C = _gemm(given, addend)
    feeds = {"x": np.ascontiguousarray(x.T) if given.get("transA") else x}
    assert near(run(model, feeds), x @ W.T + C)
    normalize_products(model.graph)
    assert near(run(model, feeds), x @ W.T + C), "the base is another"
    (product,) = products(model.graph)
    assert np.allclose(product.rows(list(range(OUT))), W)
    _merge(model, adapter)
    assert near(run(model, feeds), x @ (W + _update(adapter)).T + C)


@pytest.mark.parametrize("given", SCALED[:4], ids=str)
def test_side_inputs_are_not_scaled_with_the_product(given: dict[str, Any]) -> None:
    adapter = _adapter()
    model, x, W, C = _gemm(given, "bias")
    normalize_products(model.graph)
    inject_side_inputs(model, list(find_linears(model).linears.values()))
    pair = adapter.factors["m"]
    factors = {"m.lora_A": pair.A.T[None], "m.lora_B": 2 * pair.B.T[None]}
    assert near(run(model, {"x": x, **factors}), x @ (W + _update(adapter)).T + C)


@pytest.mark.parametrize("addend", ["none", "scalar", "row", "bias"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_a_trained_bias_is_not_scaled_by_the_beta_of_the_base(beta: float, addend: str) -> None:
    model, x, W, _ = _gemm({"beta": beta}, addend)
    normalize_products(model.graph)
    adapter = _adapter(bias=numbers(OUT, seed=5))
    _merge(model, adapter)
    expected = x @ (W + _update(adapter)).T + adapter.saved["m.bias"]
    assert near(run(model, {"x": x}), expected)


@pytest.mark.parametrize("addend", ["column", "whole"])
def test_a_trained_bias_is_refused_where_the_addend_is_not_a_plain_bias(addend: str) -> None:
    model, *_ = _gemm({}, addend)
    normalize_products(model.graph)
    with pytest.raises(AdapterMismatchError, match=r"m\.bias is used in a way that is not under"):
        _merge(model, _adapter(bias=numbers(OUT)))


@pytest.mark.parametrize(
    "given", [{}, {"alpha": 0.3}, {"transB": 1}, {"alpha": 2.0, "transA": 1, "transB": 1}], ids=str
)
@pytest.mark.parametrize("way", ["merged", "side inputs"])
def test_the_alpha_of_a_fused_product_scales_the_update_too(
    way: str, given: dict[str, Any]
) -> None:
    b, adapter = Builder(), _adapter()
    turned, turns = given.get("transA", 0), given.get("transB", 0)
    x = b.input("x", [2, IN, BATCH] if turned else [2, BATCH, IN])
    w = b.weight("w", *((OUT, IN) if turns else (IN, OUT)))
    model = _model(b, _node(b, "FusedMatMul", [x, w], [2, BATCH, OUT], **given))
    rows, alpha = numbers(2, BATCH, IN), given.get("alpha", 1.0)
    W = w.const_value.numpy() if turns else w.const_value.numpy().T
    feeds = {"x": np.ascontiguousarray(rows.swapaxes(1, 2)) if turned else rows}
    assert near(run(model, feeds), alpha * rows @ W.T)
    normalize_products(model.graph)
    assert near(run(model, feeds), alpha * rows @ W.T), "the base is another"
    if way == "merged":
        _merge(model, adapter)
    else:
        inject_side_inputs(model, list(find_linears(model).linears.values()))
        pair = adapter.factors["m"]
        feeds |= {"m.lora_A": pair.A.T[None], "m.lora_B": 2 * pair.B.T[None]}
    assert near(run(model, feeds), alpha * rows @ (W + _update(adapter)).T)


@pytest.mark.parametrize("equation", ["bsi,io->bso", "bsi, oi -> bso", "...i,io->...o"])
def test_an_einsum_of_a_matrix_takes_an_adapter(equation: str) -> None:
    b, adapter, turned = Builder(), _adapter(), "oi" in equation
    w = b.weight("w", *((OUT, IN) if turned else (IN, OUT)))
    given = {"equation": equation, "module": "m"}
    y = b.node("Einsum", [b.input("x", [2, BATCH, IN]), w], [2, BATCH, OUT], **given)
    model, rows = b.model(y), numbers(2, BATCH, IN)
    W = w.const_value.numpy() if turned else w.const_value.numpy().T
    assert near(run(model, {"x": rows}), rows @ W.T)
    normalize_products(model.graph)
    _merge(model, adapter)
    assert near(run(model, {"x": rows}), rows @ (W + _update(adapter)).T)


@pytest.mark.parametrize("equation", ["bsi,io->bos", "bsi,bo->bso"])
def test_other_einsums_are_not_changed(equation: str) -> None:
    b = Builder()
    x, w = b.input("x", [IN, BATCH, IN]), b.weight("w", IN, OUT)
    model = b.model(b.node("Einsum", [x, w], None, equation=equation))
    normalize_products(model.graph)
    assert [node.op_type for node in model.graph] == ["Einsum"]


@pytest.mark.parametrize(
    ("of_x", "of_weight"), [(IN, 1), ("size", 1), (1, IN)], ids=["weight", "unknown", "x"]
)
@pytest.mark.parametrize("turned", [False, True])
def test_an_einsum_that_broadcasts_its_summed_axis_is_not_changed(
    of_x: int | str, of_weight: int, turned: bool
) -> None:
    b = Builder()
    x = b.input("x", [2, BATCH, of_x])
    w = b.weight("w", *((OUT, of_weight) if turned else (of_weight, OUT)))
    equation = "bsi,oi->bso" if turned else "bsi,io->bso"
    model = b.model(b.node("Einsum", [x, w], [2, BATCH, OUT], equation=equation))
    feeds = {"x": numbers(2, BATCH, of_x if isinstance(of_x, int) else IN)}
    before = run(model, feeds)
    normalize_products(model.graph)
    assert [node.op_type for node in model.graph] == ["Einsum"]
    assert np.array_equal(run(model, feeds), before)


@pytest.mark.parametrize("activation", ["Relu", "Sigmoid", "Tanh"])
def test_a_fused_activation_is_applied_after_the_update(activation: str) -> None:
    def fused(weight: Array | None = None) -> ir.Model:
        b = Builder()
        x, w, c = b.input("x", [BATCH, IN]), b.weight("w", OUT, IN), b.weight("c", OUT)
        if weight is not None:
            w.const_value = ir.tensor(weight, name="w")
        given = {"alpha": 0.5, "beta": 2.0, "transB": 1, "activation": activation}
        return _model(b, _node(b, "FusedGemm", [x, w, c], [BATCH, OUT], **given))

    rows, adapter, model = numbers(BATCH, IN), _adapter(), fused()
    W = model.graph.initializers["w"].const_value.numpy().copy()
    expected = run(fused(W + 2 * _update(adapter)), {"x": rows})
    normalize_products(model.graph)
    _merge(model, adapter)
    assert near(run(model, {"x": rows}), expected)


def test_scaling_a_weight_for_one_product_does_not_change_another() -> None:
    b = Builder()
    x, w = b.input("x", [BATCH, IN]), b.weight("w", IN, IN)
    first = b.node("Gemm", [x, w], [BATCH, IN], module="m", alpha=0.5)
    model = b.model(b.node("MatMul", [first, w], [BATCH, IN], module="n"))
    W, rows = w.const_value.numpy().copy(), numbers(BATCH, IN)
    normalize_products(model.graph)
    assert near(run(model, {"x": rows}), 0.5 * rows @ W @ W)


# -- MatMulNBits -----------------------------------------------------------------------------------

NBITS_IN, NBITS_OUT, BLOCK = 40, 24, 16  # the last block is not full


def _packed(values: Array, bits: int) -> Array:
    apart = values.reshape(*values.shape[:-1], -1, 8 // bits).astype(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed: Array = (apart << shifts).sum(axis=-1, dtype=np.uint8)
    return packed


def _nbits(
    bits: int, zeros: str, *, grouped: bool, biased: bool, level: int = 0, **more: Any
) -> tuple[ir.Model, Array, Array]:
    """Return the graph, W [out, in] and the bias."""
    generator, blocks = np.random.default_rng(3), math.ceil(NBITS_IN / BLOCK)
    q = generator.integers(0, 1 << bits, (NBITS_OUT, blocks * BLOCK))
    scale = (generator.random((NBITS_OUT, blocks)) + 0.5).astype(np.float32) / (1 << bits)
    middle = np.full((NBITS_OUT, blocks), float(1 << (bits - 1)))
    b = Builder()
    x = b.input("x", [BATCH, NBITS_IN])
    inputs: list[ir.Value | None] = [
        x,
        b.constant("B", _packed(q.reshape(NBITS_OUT, blocks, BLOCK), bits)),
        b.constant("scales", scale),
        None,
        None,
        None,
    ]
    if zeros == "packed":
        width = math.ceil(blocks * bits / 8) * 8 // bits
        own = np.zeros((NBITS_OUT, width), int)
        own[:, :blocks] = generator.integers(0, 1 << bits, (NBITS_OUT, blocks))
        middle = own[:, :blocks]
        inputs[3] = b.constant("zeros", _packed(own, bits))
    elif zeros == "float":
        middle = (generator.random((NBITS_OUT, blocks)) * (1 << bits)).astype(np.float32)
        inputs[3] = b.constant("zeros", middle)
    group = np.arange(NBITS_IN) // BLOCK
    if grouped:
        group = generator.permutation(group)
        inputs[4] = b.constant("g_idx", group.astype(np.int32))
    bias = numbers(NBITS_OUT, seed=9) if biased else np.zeros(NBITS_OUT, np.float32)
    if biased:
        inputs[5] = b.constant("bias", bias)
    sizes = {"K": NBITS_IN, "N": NBITS_OUT, "bits": bits, "block_size": BLOCK}
    y = _node(b, "MatMulNBits", inputs, [BATCH, NBITS_OUT], accuracy_level=level, **sizes, **more)
    W = (q[:, :NBITS_IN] - middle[:, group]) * scale[:, group]
    return _model(b, y), W.astype(np.float32), bias


# The forms that onnxruntime's CPU provider supports.
FORMS = [
    *((bits, zeros, False) for bits in (2, 4, 8) for zeros in ("none", "packed")),
    *((bits, "float", False) for bits in (2, 4)),
    (4, "none", True),
    (4, "float", True),
]


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("bits", "zeros", "grouped"), FORMS)
def test_a_packed_weight_is_unpacked_merged_and_packed_in_the_same_form(
    bits: int, zeros: str, grouped: bool, biased: bool
) -> None:
    model, W, bias = _nbits(bits, zeros, grouped=grouped, biased=biased)
    x, adapter = numbers(BATCH, NBITS_IN), _adapter(NBITS_IN, NBITS_OUT)
    (product,) = products(model.graph)
    assert np.allclose(product.rows(list(range(NBITS_OUT))), W)
    assert near(run(model, {"x": x}), x @ W.T + bias)
    _merge(model, adapter, requantize=True)
    (node,) = model.graph
    stored = next(iter(products(model.graph))).rows(list(range(NBITS_OUT)))
    assert stored is not None
    assert near(run(model, {"x": x}), x @ stored.T + bias), "it does not compute what it holds"
    wanted = W + _update(adapter)
    blocks = np.pad(wanted, ((0, 0), (0, 8))).reshape(NBITS_OUT, -1, BLOCK)
    largest = np.abs(blocks).max(axis=2).repeat(BLOCK, axis=1)[:, :NBITS_IN]
    step = largest / (1 << (bits - 1))
    assert (np.abs(stored - wanted) <= 1.01 * step).all(), "off by more than a step"
    forms = [None if value is None else value.dtype for value in (*node.inputs, None, None)[3:5]]
    kept = {"none": None, "packed": ir.DataType.UINT8, "float": ir.DataType.FLOAT}[zeros]
    assert forms == [kept, None]


@pytest.mark.parametrize("level", [0, 1, 4])
def test_the_accuracy_level_is_kept(level: int) -> None:
    model, *_ = _nbits(4, "packed", grouped=False, biased=True, level=level)
    _merge(model, _adapter(NBITS_IN, NBITS_OUT), requantize=True)
    (node,) = model.graph
    assert node.attributes["accuracy_level"].as_int() == level


def test_a_trained_bias_replaces_the_bias_of_a_packed_product() -> None:
    model, *_ = _nbits(8, "none", grouped=False, biased=True)
    adapter = _adapter(NBITS_IN, NBITS_OUT, bias=numbers(NBITS_OUT, seed=5))
    _merge(model, adapter, requantize=True)
    x, (product,) = numbers(BATCH, NBITS_IN), products(model.graph)
    stored = product.rows(list(range(NBITS_OUT)))
    assert stored is not None
    assert near(run(model, {"x": x}), x @ stored.T + adapter.saved["m.bias"])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"bits": 8, "grouped": True}, "g_idx that cannot be followed: it is for 4 bits"),
        ({"bits": 4, "weight_prepacked": 1}, "m: MatMulNBits has weight_prepacked = 1"),
        ({"bits": 4, "future": 1}, "m: MatMulNBits has the attribute future, which is not known"),
    ],
    ids=["g_idx", "prepacked", "future"],
)
def test_an_unsupported_packed_weight_is_refused_by_name(
    made: dict[str, Any], message: str
) -> None:
    model, *_ = _nbits(**{"zeros": "none", "grouped": False, "biased": False, **made})
    with pytest.raises(ExportError, match=message):
        _merge(model, _adapter(NBITS_IN, NBITS_OUT), requantize=True)


# -- weights of integers ---------------------------------------------------------------------------


def _integers(dtype: Any, *shape: int, seed: int = 0) -> Array:
    low, high = (0, 15) if np.dtype(dtype).name.startswith("uint") else (-7, 7)
    return np.random.default_rng(seed).integers(low, high + 1, shape).astype(dtype)


DTYPES = [np.int8, np.uint8, ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float8_e4m3fn]


@pytest.mark.parametrize("turned", ["", "before", "behind"])
@pytest.mark.parametrize("form", ["tensor", "axis 0", "axis 1", "axis -1", "blocks 0", "blocks -1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_an_integer_weight_is_read_like_onnxruntime_reads_it(
    dtype: Any, form: str, turned: str
) -> None:
    b, (kind, *axis), size = Builder(), form.split(), 8
    x = b.input("x", [size, size])
    w: ir.Value = b.constant("w", _integers(dtype, size, size))
    if turned == "before":
        w = b.node("Transpose", [w], perm=[1, 0])
        b.nodes[-1].outputs[0].type = None
    shape = {"tensor": (), "axis": (size,), "blocks": (2, size)}[kind]
    attributes = {} if not axis else {"axis": int(axis[0])}
    if kind == "blocks":
        attributes["block_size"] = 4
        shape = shape if axis == ["0"] else shape[::-1]
    scale = (np.random.default_rng(1).random(shape) + 0.5).astype(np.float32)
    given = [w, b.constant("scale", scale)]
    if np.dtype(dtype).name != "float8_e4m3fn":
        given.append(b.constant("zero", _integers(dtype, *shape, seed=2)))
    w = b.node("DequantizeLinear", given, [size, size], **attributes)
    if turned == "behind":
        w = b.node("Transpose", [w], [size, size], perm=[1, 0])
    model = b.model(b.node("MatMul", [x, w], [size, size], module="m"))
    (product,) = products(model.graph)
    picks = [5, 0, 7]
    expected = run(model, {"x": np.eye(size, dtype=np.float32)}).T[picks]
    assert near(product.rows(picks), expected)
    adapter = _adapter(size, size)
    with pytest.raises(
        ExportError, match="m: the quantized weight of a MatMul.* cannot be quantized again"
    ):
        _merge(model, adapter, requantize=True)


def test_a_zero_point_that_is_not_constant_is_not_ignored() -> None:
    b = Builder()
    x, zero = b.input("x", [BATCH, IN]), b.input("zero", [], ir.DataType.INT8)
    w, scale = b.constant("w", _integers(np.int8, IN, OUT)), b.constant("s", np.float32(2))
    held = b.node("DequantizeLinear", [w, scale, zero], [IN, OUT])
    model = b.model(b.node("MatMul", [x, held], [BATCH, OUT], module="m"))
    (product,) = products(model.graph)
    assert product.rows([0]) is None


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("columns", [False, True], ids=["tensor", "columns"])
@pytest.mark.parametrize("op", ["DynamicQuantizeMatMul", "MatMulIntegerToFloat"])
def test_an_integer_product_with_float_outputs_takes_side_inputs(
    op: str, columns: bool, biased: bool
) -> None:
    b, shape = Builder(), (OUT,) if columns else ()
    x = b.input("x", ["batch", IN])
    w = b.constant("w", _integers(np.int8, IN, OUT))
    scale = (np.random.default_rng(1).random(shape) + 0.5).astype(np.float32) / 8
    zero = _integers(np.int8, *shape, seed=2)
    tail = [b.constant("zero", zero), *([b.weight("c", OUT)] if biased else [])]
    if op == "DynamicQuantizeMatMul":
        inputs: list[Any] = [x, w, b.constant("s", scale), *tail]
    else:
        step, middle = b.constant("a", np.float32(0.05)), b.constant("z", np.uint8(128))
        q = b.node("QuantizeLinear", [x, step, middle], ["batch", IN])
        b.nodes[-1].outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        inputs = [q, w, step, b.constant("s", scale), middle, *tail]
    model = _model(b, _node(b, op, inputs, ["batch", OUT]))
    W = ((w.const_value.numpy().astype(np.float32) - zero) * scale).T
    C = tail[1].const_value.numpy() if biased else np.zeros(OUT, np.float32)
    (product,) = products(model.graph)
    assert np.allclose(product.rows(list(range(OUT))), W)
    rows, adapter = np.float32([[1.0, -0.5, 0.25, 1.5, 0, -2]]), _adapter()
    base = run(model, {"x": rows})
    assert np.abs(base - (rows @ W.T + C)).max() < 0.3, "8 bits of x"
    linear = find_linears(model).linears["m"]
    assert (linear.bias is not None) == biased
    inject_side_inputs(model, [linear])
    pair = adapter.factors["m"]
    factors = {"m.lora_A": pair.A.T[None], "m.lora_B": 2 * pair.B.T[None]}
    adapted = run(model, {"x": rows, **factors})
    assert near(adapted - base, rows @ _update(adapter).T), "x itself is not rounded"


# -- layers that are not matrix products -----------------------------------------------------------


def test_a_gather_along_columns_is_not_an_embedding() -> None:
    b = Builder()
    ids = b.input("ids", ["batch", "sequence"], ir.DataType.INT64)
    table = b.weight("table", IN, IN)
    assert find_parts(b.model(b.node("Gather", [table, ids], module="m", axis=1))) == {}


@pytest.mark.parametrize("domain", ["com.microsoft.nchwc", "com.ms.internal.nhwc"])
def test_a_convolution_with_another_weight_layout_is_ignored(domain: str) -> None:
    b = Builder()
    x = b.input("x", ["batch", 8, 4, 4])
    y = b.node("Conv", [x, b.weight("w", 8, 8, 1, 1)], module="m")
    b.nodes[-1].domain = domain
    assert find_parts(b.model(y)) == {}


def test_factors_of_a_plain_convolution_are_refused_for_a_grouped_one() -> None:
    b = Builder()
    x = b.input("x", ["batch", 4, 4, 4])
    model = b.model(b.node("Conv", [x, b.weight("w", OUT, 2, 1, 1)], module="m", group=2))
    pair = Factors(numbers(2, 2, 1, 1), numbers(OUT, 2, 1, 1), kind="conv2d")
    adapter = Adapter(AdapterConfig(r=2, target_modules=("m",)), {"m": pair})
    with pytest.raises(AdapterMismatchError, match="m is a convolution of 2 groups, .* are for 1"):
        _merge(model, adapter)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"pads": [1, 1, 0, 0]},
        {"strides": [2, 2]},
        {"dilations": [2, 2]},
        {"auto_pad": "SAME_UPPER"},
    ],
    ids=str,
)
def test_a_convolution_keeps_its_strides_pads_and_dilations(given: dict[str, Any]) -> None:
    def model() -> ir.Model:
        b = Builder()
        x = b.input("x", [1, 3, 6, 6])
        w, c = b.weight("w", OUT, 3, 2, 2), b.weight("c", OUT)
        return b.model(b.node("Conv", [x, w, c], module="v.m", **given))

    pair = Factors(numbers(2, 3, 2, 2, seed=1), numbers(OUT, 2, 1, 1, seed=2), kind="conv2d")
    adapter = Adapter(AdapterConfig(r=2, lora_alpha=4, target_modules=("m",)), {"v.m": pair})
    merged, alone, x = model(), model(), numbers(1, 3, 6, 6)
    merge_adapter(merged, {}, adapter)
    weight, bias = (alone.graph.initializers[name] for name in ("w", "c"))
    base = run(alone, {"x": x})
    update = 2 * (pair.B[:, :, 0, 0] @ pair.A.reshape(2, -1)).reshape(OUT, 3, 2, 2)
    weight.const_value = ir.tensor(update.astype(np.float32), name="w")
    bias.const_value = ir.tensor(np.zeros(OUT, np.float32), name="c")
    assert near(run(merged, {"x": x}), base + run(alone, {"x": x}))


# -- biases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(OUT,), (1, OUT), (1, 1, OUT)], ids=str)
def test_a_bias_with_axes_of_one_is_replaced_in_its_own_shape(shape: tuple[int, ...]) -> None:
    b = Builder()
    x, w = b.input("x", [BATCH, IN]), b.weight("w", IN, OUT)
    y = b.node("MatMul", [x, w], [BATCH, OUT], module="m")
    model = b.model(b.node("Add", [b.weight("c", *shape), y]))
    rows, adapter = numbers(BATCH, IN), _adapter(bias=numbers(OUT, seed=5))
    before = run(model, {"x": rows}).shape
    expected = rows @ (w.const_value.numpy() + _update(adapter).T) + adapter.saved["m.bias"]
    _merge(model, adapter)
    after = run(model, {"x": rows})
    assert after.shape == before
    assert near(after.reshape(BATCH, OUT), expected)


@pytest.mark.parametrize(
    ("op", "index"), [("BiasGelu", 1), ("FastGelu", 1), ("SkipLayerNormalization", 4)]
)
def test_a_trained_bias_is_refused_where_another_operator_adds_the_bias_of_the_base(
    op: str, index: int
) -> None:
    b = Builder()
    x, w = b.input("x", [BATCH, IN]), b.weight("w", IN, OUT)
    inputs: list[ir.Value | None] = [b.node("MatMul", [x, w], [BATCH, OUT], module="m")]
    inputs += [b.weight(f"c{number}", OUT) for number in range(1, index + 1)]
    y = b.node(op, inputs, [BATCH, OUT])  # type: ignore[arg-type]
    b.nodes[-1].domain = MICROSOFT
    with pytest.raises(AdapterMismatchError, match=r"m\.bias is used in a way that is not under"):
        _merge(_model(b, y), _adapter(bias=numbers(OUT)))


# -- attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("is_causal", 1), ("softmax_precision", 10), ("qk_matmul_output_mode", 1), ("future", 1)],
)
def test_an_attention_with_an_attribute_that_the_other_operator_lacks_is_refused(
    attribute: str, value: int
) -> None:
    model = attention()
    node = next(node for node in model.graph if node.op_type == "Attention")
    node.attributes[attribute] = ir.AttrInt64(attribute, value)
    with pytest.raises(ExportError, match=f"Attention has .*{attribute}.*`attention=.standard.`"):
        group_queries(model)


# -- norms -----------------------------------------------------------------------------------------


def _norm(held: Array) -> ir.Model:
    b = Builder()
    x = b.input("x", ["batch", IN])
    inputs = [x, b.constant("n", held)]
    model = b.model(b.node("RMSNormalization", inputs, ["batch", IN], module="norm"))
    model.graph.opset_imports[""] = 23
    return model


@pytest.mark.parametrize(
    ("held", "expected"), [("as it is", 0.0), ("with one added", 1.0), ("squared", None)]
)
def test_a_fully_trained_norm_is_stored_in_the_form_of_the_base(
    held: str, expected: float | None
) -> None:
    own = numbers(IN)
    model = _norm({"as it is": own, "with one added": own + 1, "squared": own**2}[held])
    annotate_forms(model, {"norm.weight": own}.get)
    trained = numbers(IN, seed=5)
    config = AdapterConfig(modules_to_save=("norm",))
    adapter = Adapter(config, {}, {"norm.weight": trained})
    if expected is None:
        with pytest.raises(AdapterMismatchError, match="in a form that is not the checkpoint's"):
            _merge(model, adapter)
        return
    _merge(model, adapter)
    x = numbers(2, IN)
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)
    assert near(run(model, {"x": x}), normed * (trained + np.float32(expected)))


def test_a_bundle_records_the_form_of_a_norm_found_by_a_checkpoint(tmp_path: Path) -> None:
    for added in (0, 1):
        own = numbers(IN)
        model = _norm(own + np.float32(added))
        annotate_forms(model, {"norm.weight": own}.get)
        ir.save(model, tmp_path / "model.onnx")
        kept = ir.load(tmp_path / "model.onnx")
        check_known(kept, ["norm.weight"])  # without the checkpoint
        trained = numbers(IN, seed=5)
        adapter = Adapter(AdapterConfig(modules_to_save=("norm",)), {}, {"norm.weight": trained})
        _merge(kept, adapter)
        x = numbers(2, IN)
        normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)
        assert near(run(kept, {"x": x}), normed * (trained + np.float32(added)))


def test_a_norm_of_unknown_form_is_refused_without_a_checkpoint() -> None:
    with pytest.raises(ExportError, match=r"norm\.weight: some models add 1 .* `checkpoint`"):
        check_known(_norm(numbers(IN)), ["norm.weight"])
