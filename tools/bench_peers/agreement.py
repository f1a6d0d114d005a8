"""Whether engines generated the same tokens: where they diverge, and how close the logits are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import loradeploy as ld
from tools.bench_peers.requests import Request, Tokens

# If the logits of two tokens are closer than this, float32 rounding decides between them: for
# logits around 20, this is more than the order of sums changes, and far less than an adapter does.
NEAR: Final = 0.01

Answers = Mapping[str, Sequence[Tokens]]


@dataclass(frozen=True)
class Parting:
    """Where an engine's answer diverges from the expected one: both tokens, after `agreed`."""

    what: str
    row: int
    agreed: Tokens
    found: int
    expected: int


def agreement(found: Answers, expected: Answers) -> float:
    """Return the part of tokens that are equal, over all requests."""
    pairs = [
        pair for _, _, row, other in _rows(found, expected) for pair in zip(row, other, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def partings(found: Answers, expected: Answers) -> list[Parting]:
    """Return the first token of each request that differs; later ones continue other texts."""
    result = []
    for what, number, row, other in _rows(found, expected):
        for place, (a, b) in enumerate(zip(row, other, strict=True)):
            if a != b:
                result.append(Parting(what, number, list(other[:place]), a, b))
                break
    return result


def gap(
    parting: Parting,
    asked: Mapping[str, Sequence[Request]],
    bundle: str | Path,
    adapters: Mapping[str, str | Path],
) -> float:
    """Return the difference of the two tokens' logits, computed with a bundle in float32."""
    prompt, name = asked[parting.what][parting.row]
    session = ld.AdapterSession(bundle)
    if name is not None:
        session.load(name, adapters[name])
    generator = ld.TextGenerator(session)
    texts = [[*prompt, *parting.agreed, token] for token in (parting.found, parting.expected)]
    one, other = (score.logprobs[-1].logprob for score in generator.score(texts, name))
    return abs(one - other)


def _rows(found: Answers, expected: Answers) -> Iterator[tuple[str, int, Tokens, Tokens]]:
    for what, rows in expected.items():
        for number, (row, other) in enumerate(zip(found[what], rows, strict=True)):
            yield what, number, row, other
