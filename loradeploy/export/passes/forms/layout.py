"""The layout of the side inputs' first dimension: slots that rows select, or the rows themselves.

Surgery makes slots: a Gather before every side input takes those that `adapter_ids` selects. In the
layout of rows, slot i belongs to row i, or the only slot to all rows, and nothing is gathered,
which reduces the cost of an active adapter by a third. In return the caller has to put a batch's
factors in the order of its rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loradeploy.bundle.names import ADAPTER_IDS
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import remove_optional_input, remove_unused

if TYPE_CHECKING:
    import onnx_ir as ir


def supports_rows(graph: ir.Graph) -> bool:
    """Whether the graph can have the layout of rows: `adapter_ids` is used to gather slots only."""
    ids = graph.initializers[ADAPTER_IDS]
    return len(gathered_slots(graph)) == len(ids.uses())


def use_row_layout(graph: ir.Graph) -> None:
    """Use the side inputs as they are fed, slot i for row i, and remove `adapter_ids`.

    Raises:
        ExportError: other nodes need the slot numbers (see `supports_rows`).
    """
    if not supports_rows(graph):
        raise ExportError('factors of embeddings need slot numbers: export with `layout="slots"`')
    for gathered, source in gathered_slots(graph).items():
        gathered.replace_all_uses_with(source)
    remove_unused(graph)
    remove_optional_input(graph, ADAPTER_IDS)


def gathered_slots(graph: ir.Graph) -> dict[ir.Value, ir.Value]:
    """The side input of each Gather of slots, by the Gather's output; empty for rows."""
    ids = graph.initializers.get(ADAPTER_IDS)
    if ids is None:
        return {}
    return {
        node.outputs[0]: source
        for node, index in ids.uses()
        if node.op_type == "Gather" and index == 1 and (source := node.inputs[0]) is not None
    }
