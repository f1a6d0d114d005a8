"""Graphs that give probabilities: the logits that these are made of become an output too.

    logits = x W + b   →   Softmax, Sigmoid   →   the only output

What runs a bundle makes probabilities of logits itself, by the problem type of each adapter's head,
and would do it twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loradeploy.bundle.names import IMAGE_EMBEDS, LOGITS, TEXT_EMBEDS
from loradeploy.bundle.outputs import HIDDEN_NAMES, LOGITS_NAMES
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logger_of(__name__)

_PROBABILITIES: Final = "probabilities"
_CARRIERS: Final = ("Cast", "Identity")
_RANKS: Final = (2, 3)  # of logits of rows, and of tokens


def give_logits(graph: ir.Graph) -> dict[str, str]:
    """Add the logits behind a probability to the outputs; returns an output's name in the file.

    It is by its new name, where it has one: what is called logits are the logits then.
    """
    names = {str(value.name) for value in graph.outputs}
    found = {value: logits for value in graph.outputs if (logits := _logits_of(value)) is not None}
    if len(found) != 1 or not names.isdisjoint((*HIDDEN_NAMES, TEXT_EMBEDS, IMAGE_EMBEDS)):
        return {}
    ((value, logits),) = found.items()
    own = str(value.name)
    if logits.is_graph_output() or not names.isdisjoint(set(LOGITS_NAMES) - {own}):
        return {}
    taken = {str(v.name) for node in graph for v in node.outputs} | set(graph.initializers)
    called = own if own in LOGITS_NAMES else LOGITS
    if _PROBABILITIES in taken or (called != own and called in taken):
        return {}
    logger.info("%s of the graph are probabilities: the bundle gives their logits too", own)
    renamed = {}
    if called == own:
        value.name, renamed = _PROBABILITIES, {_PROBABILITIES: own}
    logits.name = called
    logits.shape, logits.type = logits.shape or value.shape, logits.type or value.type
    graph.outputs.append(logits)
    return renamed


def _logits_of(output: ir.Value) -> ir.Value | None:
    """What the probabilities `output` are made of; None where it is something else."""
    node = output.producer()
    while node is not None and node.op_type in _CARRIERS and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    rank = 0 if output.shape is None else len(output.shape)
    if node is None or node.domain != "" or rank not in _RANKS:
        return None
    axis = node.attributes.get("axis")
    last = axis is None or axis.as_int() in (-1, rank - 1)
    made = node.op_type == "Sigmoid" or (node.op_type == "Softmax" and last)
    logits = node.inputs[0] if made else None
    return None if logits is None or logits.producer() is None else logits
