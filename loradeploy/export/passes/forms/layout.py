"""How the side inputs' first dimension is laid out: slots that are named, or the rows themselves.

Surgery makes slots: a Gather in front of every side input takes those that `adapter_ids` names.
In rows slot i belongs to row i, or the only slot to all rows, and nothing is gathered, which costs
an active adapter a third less. The price is on the caller's side: a batch's factors are put in the
order of its rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loradeploy.bundle.names import ADAPTER_IDS
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import remove_unused

if TYPE_CHECKING:
    import onnx_ir as ir


def has_rows(graph: ir.Graph) -> bool:
    """Whether `adapter_ids` serves to gather slots alone, which rows do without."""
    ids = graph.initializers[ADAPTER_IDS]
    return len(gathered_slots(graph)) == len(ids.uses())


def use_row_layout(graph: ir.Graph) -> None:
    """Take the side inputs as they are fed, slot i for row i, and drop `adapter_ids`.

    Raises:
        ExportError: something else needs the numbers of slots (see `has_rows`).
    """
    if not has_rows(graph):
        raise ExportError('factors of embeddings need slot numbers: export with `layout="slots"`')
    ids = graph.initializers[ADAPTER_IDS]
    for gathered, source in gathered_slots(graph).items():
        gathered.replace_all_uses_with(source)
    remove_unused(graph)
    graph.inputs.remove(ids)
    graph.initializers.pop(ADAPTER_IDS)


def gathered_slots(graph: ir.Graph) -> dict[ir.Value, ir.Value]:
    """The side input behind each gathering of its slots; none where they are rows already."""
    ids = graph.initializers.get(ADAPTER_IDS)
    if ids is None:
        return {}
    return {
        node.outputs[0]: source
        for node, index in ids.uses()
        if node.op_type == "Gather" and index == 1 and (source := node.inputs[0]) is not None
    }
