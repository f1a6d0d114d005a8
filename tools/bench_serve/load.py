"""What the clients of bench_serve ask for; read in the peers' environments too."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Final

Tokens = list[int]
# Tokens that prompts begin with, another one in each run.
_FIRST: Final = 1000
_WORDS: Final = (
    "the government said shares in company fell after bank reported growth while match was won"
    " by minister who told reporters that prices may rise again next year because of oil"
)


@dataclass(frozen=True)
class Load:
    """`prompts`: tokens by client and turn. `tokens`: new ones of each."""

    prompts: list[list[Tokens]]
    tokens: int


def of_run(prompt: Tokens, run: int) -> Tokens:
    """The prompt of a run: none begins as that of another run, for a prefix cache to find."""
    return [_FIRST + run, *prompt[1:]]


def traffic(clients: int, requests: int, tokens: int, vocabulary: Any, seed: int) -> Load:
    """What each client asks for, in turn: prompts of 16 to 48 tokens, and `tokens` new ones."""
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
    """Numbers of adapters: the k-th is asked for in proportion to 1/k."""
    weights = [1 / (rank + 1) for rank in range(count)]
    return random.Random(seed).choices(range(count), weights, k=length)
