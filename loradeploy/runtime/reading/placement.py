"""Which execution provider runs which nodes of an opened graph."""

from __future__ import annotations

from collections import Counter
from typing import Final

import onnxruntime

from loradeploy.bundle.names import OPERATOR_DOMAIN

_OWN: Final = f"{OPERATOR_DOMAIN}."


def placement_of(session: onnxruntime.InferenceSession) -> dict[str, dict[str, int]]:
    """The number of nodes of each operator that each provider runs, after graph optimization.

    Those of the operators' library have its domain before their name. Empty for onnxruntime before
    1.24, which does not report it.
    """
    assignment = getattr(session, "get_provider_graph_assignment_info", None)
    if assignment is None:
        return {}
    placed: dict[str, Counter[str]] = {}
    for part in assignment():
        counts = placed.setdefault(part.ep_name, Counter())
        counts.update(
            f"{_OWN}{node.op_type}" if node.domain == OPERATOR_DOMAIN else node.op_type
            for node in part.get_nodes()
        )
    return {provider: dict(counts.most_common()) for provider, counts in placed.items()}


def operators_in(session: onnxruntime.InferenceSession) -> frozenset[str] | None:
    """The operators of the library that the session runs; None if onnxruntime does not report it.

    If it inlined a call, the standard nodes run.
    """
    placed = placement_of(session)
    names = [name for counts in placed.values() for name in counts]
    own = frozenset(name.removeprefix(_OWN) for name in names if name.startswith(_OWN))
    return own if placed else None
