"""What the clients of bench_serve ask for; read in onnxruntime-genai's environment too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

Tokens = list[int]
# Tokens that prompts begin with, another one in each run.
_FIRST: Final = 1000


@dataclass(frozen=True)
class Load:
    """`prompts`: tokens by client and turn. `tokens`: new ones of each."""

    prompts: list[list[Tokens]]
    tokens: int


def of_run(prompt: Tokens, run: int) -> Tokens:
    """The prompt of a run: none begins as that of another run, for a prefix cache to find."""
    return [_FIRST + run, *prompt[1:]]
