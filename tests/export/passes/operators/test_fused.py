"""The updates of a fused product as one call, on minimal graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import OPERATOR_DOMAIN
from loradeploy.errors import ExportError
from loradeploy.export.graph.file import opset_of
from loradeploy.export.match.linears import find_linears
from loradeploy.export.passes.forms.branches import add_branches
from loradeploy.export.passes.operators.calls import remove_operators, use_operators
from loradeploy.export.passes.side_inputs.inject import inject_side_inputs, remove_side_inputs
from tests.export.graphs import (
    IN,
    OUT,
    Arrays,
    Builder,
    manifest_of,
    numbers,
    ops,
    run,
    use_elsewhere,
)
from tests.export.passes.operators.test_gated import gated
from tests.export.passes.operators.test_lora_add import with_library
from tests.tolerances import tolerance

NAMES = {"LoraAdd2": ("k", "v"), "LoraAdd3": ("q", "k", "v"), "LoraSwiGLU": ("gate", "up")}
X: Arrays = {"x": numbers(3, 5, IN)}
LIMITS = {"begin": 0, "end": OUT, "axis": 2}


def layers(*names: str) -> ir.Model:
    """Layers of one input, each subtracted from the first; layer i has OUT (i + 1) columns."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    shape: list[int | str] = ["batch", "sequence"]
    parts = [
        b.node(
            *("MatMul", [x, b.weight(f"{name}.w", IN, OUT * (at + 1))], [*shape, OUT * (at + 1)]),
            module=f"block.{name}_proj",
            name=name,
        )
        for at, name in enumerate(names)
    ]
    total = parts[0]
    for at, part in enumerate(parts[1:], start=1):
        limits = [b.constant(f"{limit}_{at}", np.array([value])) for limit, value in LIMITS.items()]
        own = b.node("Slice", [part, *limits], [*shape, OUT], name=f"slice_{at}")
        total = b.node("Sub", [total, own], [*shape, OUT], name=f"difference_{at}")
    return b.model(total)


def with_slots(operator: str) -> tuple[ir.Model, Manifest]:
    """The graph that gets one call of the operator, with side inputs."""
    model = gated() if operator == "LoraSwiGLU" else layers(*NAMES[operator])
    added = inject_side_inputs(model, list(find_linears(model).linears.values()))
    return model, manifest_of(added)


def feeds_of(manifest: Manifest, *without: str) -> Arrays:
    """Feeds for x and for the adapters of two slots; those of layers in `without` are zeros."""
    feeds = X | {"adapter_ids": np.array([1, 0, 1])}
    for at, target in enumerate(manifest.targets):
        rank = at + 1
        zero = any(name in target.module for name in without)
        feeds[target.lora_A] = numbers(2, IN, rank, seed=at) * (not zero)
        feeds[target.lora_B] = numbers(2, rank, target.out_features, seed=10 + at)
    return feeds


@pytest.mark.parametrize("operator", NAMES)
def test_a_fused_product_has_one_call_that_computes_its_nodes(
    operator: str, operator_library: Path
) -> None:
    plain, manifest = with_slots(operator)
    model, _ = with_slots(operator)
    assert use_operators(model, manifest) == (operator,)
    assert ops(model)[:2] == ["MatMul", operator]
    assert [identifier[1] for identifier in model.functions] == [operator]
    feeds = feeds_of(manifest)
    expected = run(plain, feeds)
    np.testing.assert_array_equal(run(model, feeds), expected)
    (found,) = with_library(model, operator_library, feeds).values()
    limit = tolerance("torch-onnx-tiny") * max(1, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=limit)
    for name in NAMES[operator]:  # every layer's update has an effect
        assert np.abs(run(model, feeds_of(manifest, name)) - expected).max() > 0.1


@pytest.mark.parametrize("operator", NAMES)
def test_the_call_can_be_removed(operator: str) -> None:
    (plain, manifest), (model, _) = with_slots(operator), with_slots(operator)
    shapes = {value.name: value.shape for node in plain.graph for value in node.outputs}
    use_operators(model, manifest)
    remove_operators(model, [operator])
    assert sorted(ops(model)) == sorted(ops(plain))
    gated_names = {f"y/{step}" for step in ("sigmoid", "silu")} | {"sigmoid", "silu"}
    names = [{node.name for node in graph} - gated_names for graph in (model.graph, plain.graph)]
    assert names[0] == names[1]
    for node in model.graph:
        for value in node.outputs:
            assert value.shape == shapes.get(value.name, value.shape), value.name
    assert model.graph.initializers.keys() == plain.graph.initializers.keys()
    feeds = feeds_of(manifest)
    np.testing.assert_array_equal(run(model, feeds), run(plain, feeds))
    remove_side_inputs(model, manifest)
    assert "Split" not in ops(model)


def test_the_call_is_as_the_checker_of_onnx_expects() -> None:
    import onnx

    for operator in NAMES:
        model, manifest = with_slots(operator)
        use_operators(model, manifest)
        onnx.checker.check_model(ir.to_proto(model))


@pytest.mark.parametrize("by", ["the caller", "another node"])
def test_a_part_that_is_used_without_its_update_keeps_the_split(by: str) -> None:
    model, manifest = with_slots("LoraAdd3")
    (split,) = (node for node in model.graph if node.op_type == "Split")
    use_elsewhere(model, split.outputs[1], by)
    assert use_operators(model, manifest) == ("LoraAdd",)
    assert ops(model).count("LoraAdd") == 3


def test_updated_parts_that_are_used_elsewhere_too_are_outputs_of_the_call() -> None:
    model, manifest = with_slots("LoraSwiGLU")
    (gate,) = (n.outputs[0] for n in model.graph if n.name == "mlp.gate_proj/lora_add")
    model.graph.outputs.append(gate)
    feeds = feeds_of(manifest)
    expected = run(model, feeds)
    assert use_operators(model, manifest) == ("LoraAdd2", "SiluMul")
    np.testing.assert_array_equal(run(model, feeds), expected)
    assert [value.name for value in model.graph.outputs] == ["y", "mlp.gate_proj/lora_add"]
    remove_operators(model, ["LoraAdd2", "SiluMul"])
    assert [value.name for value in model.graph.outputs] == ["y", "mlp.gate_proj/lora_add"]
    np.testing.assert_array_equal(run(model, feeds), expected)


def test_products_of_four_layers_keep_a_call_for_each() -> None:
    model = layers("q", "k", "v", "z")
    added = inject_side_inputs(model, list(find_linears(model).linears.values()))
    assert use_operators(model, manifest_of(added)) == ("LoraAdd",)
    assert ops(model).count("LoraAdd") == 4


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("operator", NAMES)
def test_in_branches_only_the_one_with_adapters_has_the_call(operator: str, mode: int) -> None:
    model, manifest = with_slots(operator)
    add_branches(model.graph)
    feeds = feeds_of(manifest) | {"adapter_mode": np.array([mode])}
    expected = run(model, feeds)
    names = use_operators(model, manifest)
    assert operator in names
    np.testing.assert_array_equal(run(model, feeds), expected)
    remove_operators(model, names)
    assert not any(node.domain == OPERATOR_DOMAIN for node in model.graph.all_nodes())
    np.testing.assert_array_equal(run(model, feeds), expected)


@pytest.mark.parametrize("change", ["sizes", "targets", "inputs"])
def test_a_call_that_was_changed_is_not_removed(change: str) -> None:
    model, manifest = with_slots("LoraAdd3")
    use_operators(model, manifest)
    (call,) = (node for node in model.graph if node.op_type == "LoraAdd3")
    if change == "inputs":
        call.replace_input_with(2, None)
    else:
        call.attributes[change] = ir.AttrInt64s(change, [1, 2])
    with pytest.raises(ExportError, match="it was changed"):
        remove_operators(model, ["LoraAdd3"])


def test_opsets_whose_split_has_no_input_for_its_sizes_keep_their_calls() -> None:
    model, manifest = with_slots("LoraAdd3")
    model.graph.opset_imports[""] = 12
    assert opset_of(model) == 12
    assert use_operators(model, manifest) == ("LoraAdd",)
