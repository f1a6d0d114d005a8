"""Whether engines did the same work: where greedy tokens part, and how near the choice was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import loradeploy as ld
from tools.bench_peers.requests import Request, Tokens

# Tokens whose logits are nearer than this are told apart by an engine's rounding of float32: of
# logits around 20, more than the order of sums changes, and far less than an adapter does.
NEAR: Final = 0.01

Answers = Mapping[str, Sequence[Tokens]]


@dataclass(frozen=True)
class Parting:
    """Where an engine's answer leaves the expected one: both tokens, behind those `agreed`."""

    what: str
    row: int
    agreed: Tokens
    found: int
    expected: int


def agreement(found: Answers, expected: Answers) -> float:
    """The part of all requests' tokens that are the same."""
    pairs = [
        pair for _, _, row, other in _rows(found, expected) for pair in zip(row, other, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def partings(found: Answers, expected: Answers) -> list[Parting]:
    """The first token of each request that differs; what follows it answers another text."""
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
    """How far the logits of the two tokens are from each other, by a bundle in float32."""
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
