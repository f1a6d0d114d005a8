"""Give the parts of an encoder-decoder one opset, and the values between them one type.

    opset       the newest of the parts; the others are converted
    states      encoder_model → decoder_model                   cast where their types differ
    cross       decoder_model → decoder_with_past_model         cast where their types differ

Each part keeps its own precision. The parts were run before (`compared.py`), and the trial of the
bundle compares it with their outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loradeploy.bundle.names import (
    ENCODER_HIDDEN_STATES,
    LAST_HIDDEN_STATE,
    PAST,
    PRESENT,
    is_cross,
)
from loradeploy.errors import ExportError
from loradeploy.export.graph.file import opset_of
from loradeploy.export.read.opsets import convert_opset
from loradeploy.export.read.parts.loaded import LoadedParts

if TYPE_CHECKING:
    import onnx_ir as ir


def align_parts(parts: LoadedParts) -> LoadedParts:
    """The parts with one opset, and with casts at the outputs that another part takes.

    Raises:
        ExportError: a part cannot be converted.
    """
    models = (parts.encoder, parts.first, parts.further)
    newest = max(map(opset_of, models))
    encoder, first, further = (convert_opset(model, newest) for model in models)
    _share_domains(encoder, first, further)
    taken = {str(value.name): value for value in first.graph.inputs}
    _cast_outputs(encoder.graph, {LAST_HIDDEN_STATE: taken.get(ENCODER_HIDDEN_STATES)})
    cross = {
        str(value.name).replace(PAST, PRESENT, 1): value
        for value in further.graph.inputs
        if is_cross(str(value.name))
    }
    _cast_outputs(first.graph, cross)
    return LoadedParts(encoder, first, further)


def _share_domains(*models: ir.Model) -> None:
    """Let every part import the domains of all parts.

    Raises:
        ExportError: they import different versions of one.
    """
    imports: dict[str, int] = {}
    for model in models:
        for domain, version in model.opset_imports.items():
            if imports.setdefault(domain, version) != version:
                raise ExportError(
                    f"the parts of the model have different versions of the operators of {domain}"
                    f" ({imports[domain]} and {version}): export them with one"
                )
    ir_version = max(model.ir_version or 0 for model in models)
    for model in models:
        model.opset_imports.update(imports)
        model.ir_version = ir_version


def _cast_outputs(graph: ir.Graph, takers: Mapping[str, ir.Value | None]) -> None:
    """Cast the outputs named in `takers` to the types of the inputs that take them."""
    import onnx_ir as ir

    for index, value in enumerate(graph.outputs):
        taker = takers.get(str(value.name))
        if taker is None or None in (taker.dtype, value.dtype) or taker.dtype == value.dtype:
            continue
        assert taker.dtype is not None
        cast = ir.node("Cast", [value], attributes={"to": int(taker.dtype)})
        made = cast.outputs[0]
        made.type, made.shape = ir.TensorType(taker.dtype), value.shape
        made.name, value.name = value.name, f"{value.name}/before_cast"
        cast.name = f"{made.name}/cast"
        graph.append(cast)
        graph.outputs[index] = made
