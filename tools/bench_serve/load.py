"""The requests of bench_serve's clients. Also imported in the environments of other engines."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Final

Tokens = list[int]
# The first token of the prompts of run 0; each run has another one.
_FIRST: Final = 1000
_WORDS: Final = (
    "the government said shares in company fell after bank reported growth while match was won"
    " by minister who told reporters that prices may rise again next year because of oil"
)


@dataclass(frozen=True)
class Load:
    """`prompts`: tokens by client and turn. `tokens`: number of generated tokens per request."""

    prompts: list[list[Tokens]]
    tokens: int


def of_run(prompt: Tokens, run: int) -> Tokens:
    """Return the prompt of a run, with a first token that no other run's prefix cache contains."""
    return [_FIRST + run, *prompt[1:]]


def traffic(clients: int, requests: int, tokens: int, vocabulary: Any, seed: int) -> Load:
    """Return random requests: prompts of 16 to 48 tokens, and `tokens` generated ones for each."""
    chance = random.Random(seed)
    prompts = [
        [
            vocabulary.encode(" ".join(chance.choices(_WORDS.split(), k=chance.randint(14, 42))))
            for _ in range(requests)
        ]
        for _ in range(clients)
    ]
    return Load(prompts, tokens)


def zipf(count: int, length: int, seed: int) -> list[int]:
    """Return random indices of adapters; the frequency of the k-th is proportional to 1/k."""
    weights = [1 / (rank + 1) for rank in range(count)]
    return random.Random(seed).choices(range(count), weights, k=length)
