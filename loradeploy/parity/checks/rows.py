"""Choose the rows of a backend that runs only some of them, or several adapters in one batch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from loradeploy.parity.context import AdapterUnderTest
from loradeploy.parity.phases.rows import Row

# The name of a linear layer inside one of several experts.
_EXPERT_LAYER: Final = re.compile(r"(?:^|\.)\w*experts?\.\d+(?:\.|$)")


def same_everywhere(adapters: Sequence[AdapterUnderTest], name: str | None) -> bool:
    """Whether the adapter acts at every position, whatever the token there is.

    In PyTorch both sides share the base model, so an error in such an adapter shows on any row. A
    trained embedding row acts only at its token, and an expert only where the router selects it.
    """
    named = [tested.adapter for tested in adapters if tested.name == name]
    return all(
        all(
            pair.kind == "linear" and _EXPERT_LAYER.search(module) is None
            for module, pair in adapter.factors.items()
        )
        and not (adapter.saved or adapter.carried or adapter.rows)
        for adapter in named
    )


def mixed_rows(rows: Mapping[str | None, Sequence[Row]]) -> tuple[Row, ...]:
    """Return a batch in which neighboring rows have different adapters; the base counts as one.

    Each adapter has at least one usual row and one of an extreme length, if there are any.
    """
    adapters = list(rows)
    usual = [number for number, row in enumerate(rows[None]) if not row.edge]
    edges = [number for number, row in enumerate(rows[None]) if row.edge]
    cases = [
        some[i % len(some)]
        for some in (usual, edges)
        if some
        for i in range(max(len(some), len(adapters)))
    ]
    return tuple(rows[adapters[i % len(adapters)]][case] for i, case in enumerate(cases))
