"""Add the logits to the outputs of graphs that give probabilities.

    logits = x W + b   →   Softmax, Sigmoid   →   the only output

The runtime computes probabilities from logits, by the problem type of each adapter's head, and
would apply it twice. If nothing declares the base's problem type, a Sigmoid shows it. If
config.json declares a regression, the output of its Sigmoid stays the main output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from loradeploy.adapter.heads import MULTI_LABEL, REGRESSION
from loradeploy.adapter.tasks import TASK_TABLE, TOKEN_CLASSIFICATION
from loradeploy.bundle.names import IMAGE_EMBEDS, LOGITS, TEXT_EMBEDS
from loradeploy.bundle.outputs import HIDDEN_NAMES, LOGITS_NAMES
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logger_of(__name__)

_PROBABILITIES: Final = "probabilities"
_CARRIERS: Final = ("Cast", "Identity")
_RANKS: Final = (2, 3)  # logits for rows, and for tokens


@dataclass(frozen=True)
class Probabilities:
    """The probabilities that a graph has as an output.

    `output`: their name in the bundle; that of the main output itself for a regression.
    `renamed`: their name in the file, by `output`, if they were renamed because the logits get that
    name. `problem_type`: the problem type that the operator shows, if any.
    """

    output: str
    renamed: Mapping[str, str] = field(default_factory=dict)
    problem_type: str | None = None


def add_logits(graph: ir.Graph, task: str | None, stated: str | None) -> Probabilities | None:
    """Add the logits of probabilities to the outputs; None if the graph is not changed.

    `task`: the requested task, if any. Only tasks whose models output logits are changed; without
    one, a Sigmoid counts only if its output is named as logits or probabilities. `stated`: the
    problem type of the model's config; the output of a regression is not changed.
    """
    requested = None if task is None else TASK_TABLE.get(task)
    if requested is not None and requested.output != LOGITS:
        return None
    names = {str(value.name) for value in graph.outputs}
    found = {value: node for value in graph.outputs if (node := _made_by(value)) is not None}
    if len(found) != 1 or not names.isdisjoint((*HIDDEN_NAMES, TEXT_EMBEDS, IMAGE_EMBEDS)):
        return None
    ((value, node),) = found.items()
    own, logits, sigmoid = str(value.name), node.inputs[0], node.op_type == "Sigmoid"
    assert logits is not None
    if stated == REGRESSION and task != TOKEN_CLASSIFICATION:
        return Probabilities(own) if sigmoid and len(names) == 1 else None
    if task is None and sigmoid and own not in (*LOGITS_NAMES, _PROBABILITIES):
        return None
    if logits.is_graph_output() or not names.isdisjoint(set(LOGITS_NAMES) - {own}):
        return None
    taken = {str(v.name) for node in graph for v in node.outputs} | set(graph.initializers)
    called = own if own in LOGITS_NAMES else LOGITS
    if _PROBABILITIES in taken or (called != own and called in taken):
        return None
    logger.info("%s of the graph are probabilities: the bundle gives their logits too", own)
    renamed = {}
    if called == own:
        value.name, renamed = _PROBABILITIES, {_PROBABILITIES: own}
    logits.name = called
    logits.shape, logits.type = logits.shape or value.shape, logits.type or value.type
    graph.outputs.append(logits)
    return Probabilities(str(value.name), renamed, MULTI_LABEL if sigmoid else None)


def _made_by(output: ir.Value) -> ir.Node | None:
    """The node that computes the probabilities `output` from logits; None for other outputs."""
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
    return None if logits is None or logits.producer() is None else node
