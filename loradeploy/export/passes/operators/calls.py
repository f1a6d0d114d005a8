"""Make every node a call that a kernel of the library can compute, and undo it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from loradeploy.bundle.names import LORA_OPERATORS, OPERATOR_DOMAIN, OPERATORS
from loradeploy.errors import ExportError
from loradeploy.export.passes.operators.fused import remove_fused, use_fused
from loradeploy.export.passes.operators.gated import remove_gated, use_gated
from loradeploy.export.passes.operators.lora_add import remove_lora_add, use_lora_add
from loradeploy.export.passes.operators.residual import remove_residual, use_residual
from loradeploy.export.passes.operators.standard import ROWS, remove_standard, use_standard

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.bundle.manifest import Manifest

_VERSION: Final = 1  # of the domain
_IR_VERSION: Final = 8  # the first with functions


def use_operators(model: ir.Model, manifest: Manifest) -> tuple[str, ...]:
    """Make calls of all nodes that a kernel can compute, in branches too.

    Returns the names of the operators that the graph calls, which may be none.

    Raises:
        ExportError: a value of the graph has the name of an input that the calls need.
    """
    use_lora_add(model, manifest)
    for row in ROWS:
        use_standard(model, row)
    use_gated(model)
    use_fused(model)
    use_residual(model)
    called = _called(model)
    _keep_functions(model, called)
    names = [name for name in OPERATORS if name in called]
    if names:
        model.graph.opset_imports[OPERATOR_DOMAIN] = _VERSION
        model.ir_version = max(model.ir_version, _IR_VERSION)
    return tuple(names)


def remove_operators(model: ir.Model, names: Collection[str]) -> None:
    """Undo `use_operators`: every call becomes standard nodes again.

    `names`: the operators that the manifest lists.

    Raises:
        ExportError: the graph has no calls of one of them, or calls of others.
    """
    called = _called(model)
    if called != set(names):
        raise ExportError(
            f"the graph has calls of {', '.join(sorted(called)) or 'no operator'}, its manifest"
            f" lists {', '.join(sorted(names)) or 'none'}: it was changed"
        )
    remove_residual(model)
    remove_fused(model)
    if called & set(LORA_OPERATORS):
        remove_lora_add(model)
    for row in ROWS:
        remove_standard(model, row)
    remove_gated(model)
    _keep_functions(model, ())
    model.graph.opset_imports.pop(OPERATOR_DOMAIN, None)


def _called(model: ir.Model) -> set[str]:
    """The names of the operators that the graph calls."""
    return {node.op_type for node in model.graph.all_nodes() if node.domain == OPERATOR_DOMAIN}


def _keep_functions(model: ir.Model, names: Collection[str]) -> None:
    """Remove the operators' functions except `names`."""
    for identifier in list(model.functions):
        if identifier[0] == OPERATOR_DOMAIN and identifier[1] not in names:
            del model.functions[identifier]
