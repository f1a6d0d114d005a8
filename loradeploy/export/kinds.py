"""The kinds of side inputs that can be asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from loradeploy.errors import UsageError

DORA, BIAS, EMBEDDING = "dora", "bias", "embedding"
SIDE_INPUT_KINDS: Final[Mapping[str, str]] = {
    "lora": "low-rank factors of linear layers, always there",
    DORA: "scales of the outputs, for DoRA",
    BIAS: "offsets of the outputs, for trained biases",
    EMBEDDING: "low-rank factors of embeddings",
}


def check_kinds(kinds: Iterable[str]) -> frozenset[str]:
    """The kinds as a set, or UsageError where one is unknown."""
    known = ", ".join(SIDE_INPUT_KINDS)
    for kind in kinds:
        if kind not in SIDE_INPUT_KINDS:
            raise UsageError(f"no side inputs are called {kind!r}: there are {known}")
    return frozenset(kinds)
