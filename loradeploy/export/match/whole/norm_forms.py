"""The form in which a graph stores the weights of norms.

Some models add one to the weight (Gemma's y = x / rms(x) · (1 + w)), and exporters fold that into
the constant. A fully trained weight of an adapter must be stored in the same form. It is found by
comparison with the checkpoint, and written into the metadata of the nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.files.base_files import base_tensors
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import constant_of
from loradeploy.export.match.whole.parts import Part, find_parts

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

AS_IS: Final = "w"
PLUS_ONE: Final = "1 + w"
OTHER: Final = "?"
_FORM: Final = "loradeploy.form"
# Norms to whose weights some models add one.
_MAY_ADD: Final = (
    *("RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),
)
# Rounding errors, in the graph's dtype, allowed between equal values: of the sum and the cast.
_ROUNDINGS: Final = 4


def annotate_forms(model: ir.Model, own: Callable[[str], NDArray[Any] | None]) -> None:
    """Write the form of its weight into the metadata of each norm; bundles keep it.

    `own`: returns the parameter of the checkpoint by name, or None.
    """
    for module, part in find_parts(model).items():
        values = own(f"{module}.weight") if part.kind == "norm" else None
        if values is None or values.shape != part.shape:
            continue
        form = OTHER
        if _close(part, values):
            form = AS_IS
        elif _close(part, values + 1):
            form = PLUS_ONE
        for node in part.nodes:
            node.metadata_props[_FORM] = form


def form_of(part: Part) -> str | None:
    """The form in the metadata; None if there is none."""
    return part.nodes[0].metadata_props.get(_FORM)


def vectors_in(checkpoint: Path) -> dict[str, NDArray[Any]]:
    """The one-dimensional parameters in the checkpoint's files, including norms' weights."""
    tensors = base_tensors(checkpoint)
    return {name: stored.array() for name, stored in tensors.items() if len(stored.shape) == 1}


def check_known(model: ir.Model, parameters: Collection[str]) -> None:
    """Raise ExportError if `parameters` has a norm's weight whose form only a checkpoint shows."""
    for module, part in find_parts(model).items():
        unknown = part.nodes[0].op_type in _MAY_ADD and form_of(part) is None
        if f"{module}.weight" in parameters and unknown:
            raise ExportError(
                f"{module}.weight: some models add 1 to it, and the graph alone does not show it:"
                " give the base as `checkpoint`"
            )


def _close(part: Part, values: NDArray[Any]) -> bool:
    numbers = constant_of(part.weight)
    room = _ROUNDINGS * float(np.finfo(np.float32).eps)
    if numbers.dtype != np.float32:
        room = _ROUNDINGS * 2.0**-8 if numbers.dtype.name == "bfloat16" else _ROUNDINGS * 2.0**-11
    return np.allclose(numbers.astype(np.float64), values.astype(np.float64), rtol=room, atol=room)
