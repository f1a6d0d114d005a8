"""Leave q and k without adapters where the rows of their weights may be in another order.

Meta's layout, which llama.cpp uses too, interleaves the rows that transformers has in halves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from loradeploy.errors import ExportError, listed_names
from loradeploy.export.graph.edit import integer_of
from loradeploy.export.match.feature_order import reads_interleaved_pairs
from loradeploy.export.match.linears import Findings
from loradeploy.export.match.operators import GROUP_QUERY_ATTENTION
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.adapter.adapter import Adapter

logger = logger_of(__name__)

# transformers' models whose rotary embeddings rotate halves of a head, not interleaved pairs.
_HALVES: Final = (
    *("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "olmo2", "phi"),
    *("phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2"),
)
_INTERLEAVED: Final = {
    "RotaryEmbedding": "interleaved",
    GROUP_QUERY_ATTENTION: "rotary_interleaved",
}
_ROTATED: Final = ("q_proj", "k_proj", "qkv_proj")
_IN_DOUBT: Final = (
    "the graph rotates interleaved rows, where transformers' model has halves, so that the rows of"
    " q and k are likely in another order: give `checkpoint`, whose numbers show it"
)
_LISTED: Final = 4


def without_rows_in_doubt(
    model: ir.Model, model_type: str | None, findings: Findings, adapters: Iterable[Adapter]
) -> Findings:
    """The findings without q and k if the graph rotates interleaved rows, and the model halves.

    `model_type`: that of the config; None if unknown.

    Raises:
        ExportError: an adapter targets them.
    """
    if not _has_rows_in_doubt(model, model_type, findings):
        return findings
    targeted = sorted(m for a in adapters for m in a.factors if m.endswith(_ROTATED))
    if targeted:
        raise ExportError(f"{targeted[0]}: {_IN_DOUBT}")
    rotated = sorted(module for module in findings.linears if module.endswith(_ROTATED))
    if rotated:
        logger.warning("left without adapters, %s: %s", listed_names(rotated, _LISTED), _IN_DOUBT)
    kept = {m: linear for m, linear in findings.linears.items() if m not in rotated}
    return Findings(kept, findings.unidentified)


def _has_rows_in_doubt(model: ir.Model, model_type: str | None, findings: Findings) -> bool:
    if model_type is not None and model_type not in _HALVES:
        return False
    return any(
        node.op_type in _INTERLEAVED and integer_of(node, _INTERLEAVED[node.op_type])
        for node in model.graph.all_nodes()
    ) or any(
        reads_interleaved_pairs(linear)
        for module, linear in findings.linears.items()
        if module.endswith(_ROTATED)
    )
