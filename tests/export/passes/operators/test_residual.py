"""An update and the residual addition after it as one call, on minimal graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import LORA_ADD_RESIDUAL_OPERATOR, OPERATOR_DOMAIN
from loradeploy.errors import ExportError
from loradeploy.export.match.linears import find_linears
from loradeploy.export.passes.forms.branches import add_branches
from loradeploy.export.passes.operators.calls import remove_operators, use_operators
from loradeploy.export.passes.side_inputs.inject import inject_side_inputs, remove_side_inputs
from tests.export.graphs import IN, Arrays, Builder, manifest_of, numbers, ops, run
from tests.export.passes.operators.test_lora_add import with_library
from tests.tolerances import tolerance

FEEDS: Arrays = {
    "x": numbers(3, 5, IN),
    "block.proj.lora_A": numbers(2, IN, 4, seed=1),
    "block.proj.lora_B": numbers(2, 4, IN, seed=2),
    "adapter_ids": np.array([1, 0, 1]),
}
NAMES = [LORA_ADD_RESIDUAL_OPERATOR]


def with_slots(*, first: bool = True, bias: bool = False) -> tuple[ir.Model, Manifest]:
    """x + x W; `first`: x is the first input of the addition. `bias`: one row is added instead."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    shape: list[int | str] = ["batch", "sequence", IN]
    y = b.node("MatMul", [x, b.weight("w", IN, IN)], [*shape], module="block.proj")
    other = b.node("Neg", [b.weight("row", 1, IN)], [1, IN], name="row") if bias else x
    model = b.model(b.node("Add", [other, y] if first else [y, other], shape, name="y"))
    added = inject_side_inputs(model, list(find_linears(model).linears.values()))
    return model, manifest_of(added)


@pytest.mark.parametrize("first", [True, False])
def test_the_call_computes_its_nodes(first: bool, operator_library: Path) -> None:
    (plain, manifest), (model, _) = with_slots(first=first), with_slots(first=first)
    assert use_operators(model, manifest) == tuple(NAMES)
    assert ops(model) == ["MatMul", LORA_ADD_RESIDUAL_OPERATOR]
    onnx.checker.check_model(ir.to_proto(model))
    expected = run(plain, FEEDS)
    np.testing.assert_array_equal(run(model, FEEDS), expected)
    (found,) = with_library(model, operator_library, FEEDS).values()
    np.testing.assert_allclose(found, expected, atol=tolerance("torch-onnx-tiny"))
    base = {"x": FEEDS["x"]}
    assert np.abs(expected - run(plain, base)).max() > 1
    (idle,) = with_library(model, operator_library, base).values()
    np.testing.assert_allclose(idle, run(plain, base), atol=tolerance("torch-onnx-tiny"))


def test_the_call_can_be_removed() -> None:
    (plain, manifest), (model, _) = with_slots(), with_slots()
    use_operators(model, manifest)
    remove_operators(model, NAMES)
    assert ops(model) == ops(plain)
    assert [node.name for node in model.graph] == [node.name for node in plain.graph]
    assert [value.name for value in model.graph.outputs] == ["y"]
    np.testing.assert_array_equal(run(model, FEEDS), run(plain, FEEDS))
    remove_side_inputs(model, manifest)
    assert ops(model) == ["MatMul", "Add"]


def test_a_sum_of_another_shape_is_no_residual() -> None:
    model, manifest = with_slots(bias=True)
    assert use_operators(model, manifest) == ("LoraAdd",)


def test_an_update_that_is_used_elsewhere_too_is_a_call_of_its_own() -> None:
    model, manifest = with_slots()
    (update,) = (n.outputs[0] for n in model.graph if n.name == "block.proj/lora_add")
    model.graph.outputs.append(update)
    assert use_operators(model, manifest) == ("LoraAdd",)


@pytest.mark.parametrize("mode", [0, 1])
def test_in_branches_only_the_one_with_adapters_has_the_call(mode: int) -> None:
    model, manifest = with_slots()
    add_branches(model.graph)
    feeds = FEEDS | {"adapter_mode": np.array([mode])}
    expected = run(model, feeds)
    assert use_operators(model, manifest) == tuple(NAMES)
    np.testing.assert_array_equal(run(model, feeds), expected)
    remove_operators(model, NAMES)
    assert not any(node.domain == OPERATOR_DOMAIN for node in model.graph.all_nodes())
    np.testing.assert_array_equal(run(model, feeds), expected)


def test_a_call_that_was_changed_is_not_removed() -> None:
    model, manifest = with_slots()
    use_operators(model, manifest)
    (call,) = (node for node in model.graph if node.domain == OPERATOR_DOMAIN)
    call.replace_input_with(6, None)
    with pytest.raises(ExportError, match="it was changed"):
        remove_operators(model, NAMES)
