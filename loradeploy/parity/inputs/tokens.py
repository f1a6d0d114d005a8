"""What the backends are fed: token rows, from prompts, from a seed, and of extreme lengths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.tasks import CAUSAL_LM
from loradeploy.bundle.context_length import context_length
from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import INPUT_IDS, LEFT, NO_PADDING
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import DataError, UsageError
from loradeploy.parity.inputs.prompts import GENERATED, PROMPTS
from loradeploy.runtime.prompts import read_requests

if TYPE_CHECKING:
    from loradeploy.runtime.tokenizer import Tokenizer

# What a prompt is cut to, so that a text file of long articles does not make a check of hours.
MAX_PROMPT_TOKENS: Final = 256
# A text, or a conversation as a list of messages.
Prompt = str | list[Any]

_SEEDS: Final = 1 << 16  # where the tokens are no model's own
_RANDOM_LENGTHS: Final = (5, 24, 1, 13, 40, 2, 9, 30)
# The longest row of random tokens.
_FUZZ_LENGTH: Final = 48
# The longest row that is always fed; a prompt may be twice as long.
_LONGEST_EDGE: Final = 128
# Tokens that follow a row of an extreme length: one step past its cache is enough.
_AFTER_EDGES: Final = 2

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Cases:
    """All that is fed, as tokens.

    `prompts`: token ids, one row a case: the prompts, then `fuzz` random rows, then `edges` of
    extreme lengths. `generated`: how many tokens follow each; 0 where the model generates nothing.
    `pad`: id that fills rows up. `source`: where the prompts are from. `left`: whether a decoder's
    rows are filled up on the left. `alike`: whether rows of one length alone share a batch.
    """

    prompts: Rows
    generated: int
    pad: int
    source: str
    left: bool = True
    fuzz: int = 0
    edges: int = 0
    alike: bool = False

    @property
    def groups(self) -> tuple[tuple[Rows, int], ...]:
        """The cases in their order as (rows, tokens that follow each): the edges are the last."""
        usual = len(self.prompts) - self.edges
        after = min(self.generated, _AFTER_EDGES)
        return (self.prompts[:usual], self.generated), (self.prompts[usual:], after)


def make_cases(
    bundle: Path,
    manifest: Manifest,
    *,
    prompts: str | os.PathLike[str] | Sequence[str] | None,
    generated: int | None,
    seed: int,
    fuzz: int = 0,
) -> Cases:
    """The cases for a bundle.

    `prompts` is a file (one prompt a line, or JSONL with `prompt`, `text` or `messages`), a list of
    texts, or None for the built-in ones. A bundle without a tokenizer is fed random tokens. `fuzz`
    rows of random tokens come too, and one row each of the least and of the largest length.

    Raises:
        DataError: the file is missing, empty, or has a broken line.
        UsageError: texts for a bundle without a tokenizer, no room for a prompt, no vocabulary to
            draw random tokens from, or tokens to generate by what is no decoder.
    """
    if fuzz < 0:
        raise UsageError(f"{fuzz} random rows: give 0 or more")
    if generated is not None and manifest.task != CAUSAL_LM:
        raise UsageError(f"a {manifest.task} bundle generates no tokens: leave their number out")
    generated = GENERATED if generated is None else generated
    if generated < 1:
        raise UsageError(f"{generated} tokens to generate: give 1 or more")
    follow = generated if manifest.task == CAUSAL_LM else 0
    left = manifest.padding == LEFT
    config = model_config(bundle)
    longest = _longest(config, follow)
    has_tokenizer = (bundle / "tokenizer.json").is_file()
    vocabulary = 0 if has_tokenizer and not fuzz else _vocabulary(manifest, config, bundle)
    if has_tokenizer:
        rows, pad, source = _tokenized(bundle, prompts, longest)
    elif prompts is None:
        pad_id = config.get("pad_token_id")
        rows = _random_rows(vocabulary, longest, seed)
        pad = pad_id if isinstance(pad_id, int) else 0
        source = f"random tokens, seed {seed}"
    else:
        raise UsageError(f"{bundle} has no tokenizer.json: prompts cannot be turned to tokens")
    random = _fuzz_rows(vocabulary, longest, seed, fuzz)
    edges = _edge_rows(rows, longest)
    every, alike = (*rows, *random, *edges), manifest.padding == NO_PADDING
    return Cases(every, follow, pad, source, left, len(random), len(edges), alike)


def _tokenized(
    bundle: Path, prompts: str | os.PathLike[str] | Sequence[str] | None, longest: int
) -> tuple[Rows, int, str]:
    """The prompts as tokens, the id that fills rows up, and where the prompts are from."""
    from loradeploy.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer(bundle)
    texts, source = _texts(prompts)
    encoded = tuple(tuple(_encode(tokenizer, text, longest)) for text in texts)
    if empty := [number for number, row in enumerate(encoded, start=1) if not row]:
        raise DataError(f"{source}: prompt {empty[0]} has no tokens")
    return encoded, tokenizer.pad_id, source


def _texts(
    prompts: str | os.PathLike[str] | Sequence[str] | None,
) -> tuple[Sequence[Prompt], str]:
    if prompts is None:
        return PROMPTS, "built-in prompts"
    if isinstance(prompts, str | os.PathLike):
        requests = read_requests(prompts)
        return [request.prompt for request in requests], os.fspath(prompts)
    if not prompts:
        raise UsageError("no prompts are given")
    return list(prompts), "given prompts"


def _encode(tokenizer: Tokenizer, text: Prompt, longest: int) -> list[int]:
    if isinstance(text, str):
        return tokenizer.encode(text, max_length=longest)
    return tokenizer.encode_chat(text)[:longest]


def _longest(config: dict[str, Any], generated: int) -> int:
    """How long a prompt may be so that the generated tokens still have positions."""
    positions = context_length(config)
    most = MAX_PROMPT_TOKENS + generated
    room = (most if positions is None else min(positions, most)) - generated
    if room < 1:
        raise UsageError(
            f"{generated} generated tokens leave no room in the model's {positions} positions:"
            " generate fewer"
        )
    return room


def _vocabulary(manifest: Manifest, config: dict[str, Any], bundle: Path) -> int:
    size = config.get("vocab_size")
    if isinstance(size, int):
        return size
    for output in manifest.outputs:
        if (
            output.name == output_of(manifest)
            and len(output.shape) == 3
            and isinstance(output.shape[-1], int)
        ):
            return output.shape[-1]
    if all(spec.name != INPUT_IDS for spec in manifest.inputs):
        return _SEEDS
    raise UsageError(f"{bundle} has neither a tokenizer nor the size of the vocabulary")


def _edge_rows(rows: Rows, longest: int) -> Rows:
    """A row of one token, and a long one, as long as the model takes up to a bound; beside it the
    first is nearly all padding.

    Their tokens are the prompts', one prompt after the other and round again.
    """
    tokens = [token for row in rows for token in row]
    length = min(longest, _LONGEST_EDGE)
    again = -(-length // len(tokens))
    return (rows[0][-1:], tuple((tokens * again)[:length]))


def _fuzz_rows(vocabulary: int, longest: int, seed: int, count: int) -> Rows:
    """`count` rows of random tokens, of random lengths."""
    random = np.random.default_rng([seed, count])
    lengths = random.integers(1, min(longest, _FUZZ_LENGTH) + 1, count)
    return tuple(tuple(random.integers(0, vocabulary, size).tolist()) for size in lengths)


def _random_rows(vocabulary: int, longest: int, seed: int) -> Rows:
    random = np.random.default_rng(seed)
    return tuple(
        tuple(random.integers(0, vocabulary, min(length, longest)).tolist())
        for length in _RANDOM_LENGTHS
    )
