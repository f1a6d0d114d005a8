"""Complete the shapes of a decoder's cache, and the side on which it expects padding.

The onnxruntime-genai builder writes only a symbol for the size of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.bundle.names import (
    GENAI_CONFIG_NAME,
    LEFT,
    NO_PADDING,
    PAST,
    POSITION_IDS,
    RIGHT,
    present_of,
)
from loradeploy.errors import ExportError
from loradeploy.export.match.operators import GROUP_QUERY_ATTENTION
from loradeploy.export.read.files.settings import genai_settings, settings_beside

if TYPE_CHECKING:
    import onnx_ir as ir

_CACHE_AXES: Final = 4


def complete_cache(model: ir.Model, directory: Path, checkpoint: Path | None) -> None:
    """Replace the symbol for the size of a head in the cache's shapes by its value.

    Raises:
        ExportError: no config specifies it.
    """
    import onnx_ir as ir

    symbols: dict[str, int] = {}
    unnamed: dict[str, int] = {}  # by input or output, for axes without a symbol
    for value in model.graph.inputs:
        if not str(value.name).startswith(PAST) or value.shape is None:
            continue
        if len(value.shape) != _CACHE_AXES or isinstance(value.shape[3], int):
            continue
        size = genai_settings(directory).get("decoder", {}).get("head_size")
        if not isinstance(size, int):
            size = _head_size(settings_beside(directory, checkpoint))
        if size is None:
            raise ExportError(
                f"the graph does not specify the last size of {value.name}, and neither does a"
                f" config.json or {GENAI_CONFIG_NAME} beside it"
            )
        if value.shape[3].value is None:
            unnamed |= dict.fromkeys((str(value.name), present_of(str(value.name))), size)
        else:
            symbols[value.shape[3].value] = size
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None:
            continue
        sizes = [d if isinstance(d, int) else symbols.get(d.value or "", d) for d in value.shape]
        if str(value.name) in unnamed and len(sizes) == _CACHE_AXES:
            sizes[-1] = unnamed[str(value.name)]
        value.shape = ir.Shape(sizes)


def padding_of(model: ir.Model) -> str:
    """The side on which the rows of a batch are padded, if the graph cannot be run to measure it.

    GroupQueryAttention counts a row's tokens from its beginning (its input seqlens_k). A decoder
    without position_ids may count positions from the beginning of its cache, see
    trial/padding.py.
    """
    if any(node.op_type == GROUP_QUERY_ATTENTION for node in model.graph):
        return RIGHT
    inputs = {str(value.name) for value in model.graph.inputs}
    counted_by_input = POSITION_IDS in inputs or not any(name.startswith(PAST) for name in inputs)
    return LEFT if counted_by_input else NO_PADDING


def _head_size(config: Mapping[str, Any]) -> int | None:
    size, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if isinstance(config.get("head_dim"), int):
        return int(config["head_dim"])
    return size // heads if isinstance(size, int) and isinstance(heads, int) and heads else None
