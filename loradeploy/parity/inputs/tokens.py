"""The token rows that the backends are fed: prompts, random rows, and rows of extreme lengths."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.tasks import CAUSAL_LM, SEQUENCE_CLASSIFICATION
from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.model_config import context_length, model_config
from loradeploy.bundle.names import INPUT_IDS, LEFT, NO_PADDING, TOKEN_TYPE_IDS
from loradeploy.bundle.outputs import output_of
from loradeploy.bundle.text.beside import vocabulary_of
from loradeploy.bundle.text.pairs import pair_tokens
from loradeploy.bundle.text.tokenizer_files import TOKENIZER_NAME
from loradeploy.errors import DataError, UsageError, shown
from loradeploy.parity.inputs.prompts import GENERATED, PROMPTS
from loradeploy.parity.inputs.row_feeds import Known, Types, types_of
from loradeploy.runtime.prompts import InputPrompt, read_requests, request_of

if TYPE_CHECKING:
    from loradeploy.bundle.text.tokenizer import Tokenizer

# Prompts are truncated to this length, so that a file of long articles does not take hours.
MAX_PROMPT_TOKENS: Final = 256
# A text, a pair of texts, or a conversation as a list of messages.
Prompt = str | tuple[str, str] | list[Any]
# A file of prompts, or a sequence of prompts or of objects as in a JSONL file.
Prompts = str | os.PathLike[str] | Sequence[Prompt | Mapping[str, Any]]

_SEEDS: Final = 1 << 16  # number of different tokens if they only seed other inputs
_RANDOM_LENGTHS: Final = (5, 24, 1, 13, 40, 2, 9, 30)
# The longest row of random tokens.
_FUZZ_LENGTH: Final = 48
# The length of the long row that is always fed; a prompt may be twice as long.
_LONGEST_EDGE: Final = 128
# The most tokens with changed embedding or head rows that are fed, in all and in the long row.
MOST_TRAINED: Final = 512
_TRAINED_IN_ROW: Final = 48
# Number of generated tokens after a row of extreme length: one step with its cache is enough.
_AFTER_EDGES: Final = 2

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Cases:
    """All rows that are fed, as tokens.

    `prompts`: token ids, one row per case: the prompts, then `fuzz` random rows, then `edges` rows
    of extreme lengths. `generated`: number of tokens generated after each; 0 if the model does not
    generate. `pad`: the padding id. `source`: where the prompts come from. `left`: whether a
    decoder's rows are padded on the left. `known`: as in `plain_feeds`. `alike`: whether a batch
    has only rows of equal length. `unfed`: number of trained tokens that are in no row.
    """

    prompts: Rows
    generated: int
    pad: int
    source: str
    left: bool = True
    fuzz: int = 0
    edges: int = 0
    alike: bool = False
    known: Known = field(default_factory=dict)
    unfed: int = 0

    @property
    def given(self) -> Rows:
        """The prompts alone."""
        return self.prompts[: len(self.prompts) - self.fuzz - self.edges]

    def of(self, tokens: int | None) -> Cases:
        """Return the cases for a vocabulary of `tokens` (None: all).

        Tokens outside of it are replaced by the first token of the first prompt.
        """
        if tokens is None or all(token < tokens for row in self.prompts for token in row):
            return self
        first = self.prompts[0][0]
        prompts = (tuple(t if t < tokens else first for t in row) for row in self.prompts)
        return dataclasses.replace(self, prompts=tuple(prompts))

    @property
    def groups(self) -> tuple[tuple[Rows, int], ...]:
        """The cases in order, as (rows, number of generated tokens): usual rows, then edges."""
        usual = len(self.prompts) - self.edges
        after = min(self.generated, _AFTER_EDGES)
        return (self.prompts[:usual], self.generated), (self.prompts[usual:], after)


def make_cases(
    bundle: Path,
    manifest: Manifest,
    *,
    prompts: Prompts | None,
    generated: int | None,
    seed: int,
    fuzz: int = 0,
    trained: Sequence[int] = (),
) -> Cases:
    """Make the cases for a bundle.

    `prompts`: a file (one prompt per line, or JSONL with `prompt`, `text`, `text` and `text_pair`,
    or `messages`), a list of texts, pairs of texts and objects of the same form, or None for the
    built-in prompts. A bundle without a tokenizer is fed random tokens. `fuzz`: number of
    additional rows of random tokens. Edge rows are added too: one of a single token and a long one.
    They contain the `trained` tokens, up to `MOST_TRAINED`, in as many further rows as needed.

    Raises:
        DataError: the file is missing, empty, or has a malformed line.
        UsageError: texts for a bundle without a tokenizer, no room for a prompt, an unknown
            vocabulary size, or `generated` for a model that is not a decoder.
    """
    if fuzz < 0:
        raise UsageError(f"{fuzz} random rows: give 0 or more")
    if generated is not None and manifest.task != CAUSAL_LM:
        raise UsageError(f"a {manifest.task} bundle generates no tokens: leave their number out")
    generated = GENERATED if generated is None else generated
    if generated < 1:
        raise UsageError(f"{generated} tokens to generate: give 1 or more")
    follow = generated if manifest.task == CAUSAL_LM else 0
    config = model_config(bundle)
    longest = min(_longest(config, follow), fixed_length(manifest) or MAX_PROMPT_TOKENS * 2)
    has_tokenizer = (bundle / TOKENIZER_NAME).is_file()
    vocabulary = 0 if has_tokenizer and not fuzz else _vocabulary(manifest, config, bundle)
    if has_tokenizer:
        given = _tokenized(bundle, manifest, prompts, longest)
    elif prompts is None:
        pad_id = config.get("pad_token_id")
        given = _Given(
            _random_rows(vocabulary, longest, seed),
            pad=pad_id if isinstance(pad_id, int) and 0 <= pad_id < vocabulary else 0,
            source=f"random tokens, seed {seed}",
        )
    else:
        raise UsageError(f"{bundle} has no tokenizer.json: prompts cannot be turned to tokens")
    random = _fuzz_rows(vocabulary, longest, seed, fuzz)
    edges = _edge_rows(given.rows, longest, trained)
    every: Rows = (*given.rows, *random, *edges)
    if (full := fixed_length(manifest)) is not None:
        every = tuple(filled(row, full, given.pad) for row in every)
    return Cases(
        every,
        follow,
        given.pad,
        given.source,
        left=manifest.padding == LEFT,
        fuzz=len(random),
        edges=len(edges),
        alike=manifest.padding == NO_PADDING,
        known=given.types,
        unfed=max(0, len(trained) - MOST_TRAINED),
    )


def fixed_length(manifest: Manifest) -> int | None:
    """Return the fixed text length of a tower's graph; None if it is dynamic."""
    if manifest.tower is None:
        return None
    sizes = [spec.shape[1] for spec in manifest.inputs if spec.name == INPUT_IDS]
    return next((size for size in sizes if isinstance(size, int)), None)


def filled(row: tuple[int, ...], length: int, pad: int) -> tuple[int, ...]:
    """Return `row` padded on the right to `length`, as a graph of a fixed length requires."""
    return row + (pad,) * (length - len(row))


@dataclass(frozen=True, eq=False)
class _Given:
    """The prompts as tokens, and their token types. `pad`, `source`: see `Cases`."""

    rows: Rows
    pad: int
    source: str
    types: Types = field(default_factory=dict)


def _tokenized(bundle: Path, manifest: Manifest, prompts: Prompts | None, longest: int) -> _Given:
    from loradeploy.bundle.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(bundle)
    tokenizer.pad_within(vocabulary_of(manifest, model_config(bundle)))
    texts, source = _texts(prompts)
    if manifest.task != SEQUENCE_CLASSIFICATION and any(isinstance(t, tuple) for t in texts):
        raise UsageError(f"{source}: pairs of texts, and the bundle is for {manifest.task}")
    typed = any(spec.name == TOKEN_TYPE_IDS for spec in manifest.inputs)
    rows = [_encode(tokenizer, text, longest, typed=typed) for text in texts]
    encoded = tuple(tokens for tokens, _ in rows)
    if empty := [number for number, row in enumerate(encoded, start=1) if not row]:
        raise DataError(f"{source}: prompt {empty[0]} has no tokens")
    return _Given(encoded, tokenizer.pad_id, source, types_of(rows))


def _texts(prompts: Prompts | None) -> tuple[Sequence[Prompt], str]:
    if prompts is None:
        return PROMPTS, "built-in prompts"
    if isinstance(prompts, str | os.PathLike):
        requests = read_requests(prompts)
        source = os.fspath(prompts)
        return [_without_audio(request, source) for request in requests], source
    if not prompts:
        raise UsageError("no prompts are given")
    return [_given(prompt, n) for n, prompt in enumerate(prompts, start=1)], "given prompts"


def _without_audio(request: InputPrompt, where: str) -> Prompt:
    if request.audio:
        raise UsageError(
            f"{where}: a path of an audio file; parity generates audio from a seed: give texts"
        )
    return request.prompt


def _given(prompt: Prompt | Mapping[str, Any], number: int) -> Prompt:
    """Return a prompt that was given in Python; raise UsageError if it is not a prompt."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        return _without_audio(request_of(prompt, f"prompt {number}"), f"prompt {number}")
    if isinstance(prompt, list | tuple) and prompt:
        if len(prompt) == 2 and all(isinstance(part, str) for part in prompt):
            return (prompt[0], prompt[1])
        if all(isinstance(message, Mapping) for message in prompt):
            return list(prompt)
    raise UsageError(
        f"prompt {number} is {shown(prompt)}: give a text, a pair of texts, a list of messages, or"
        " an object with text and text_pair"
    )


def _encode(
    tokenizer: Tokenizer, text: Prompt, longest: int, *, typed: bool
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Return the tokens of a prompt, and their types if it is a pair and the model takes types."""
    if isinstance(text, tuple):
        row = pair_tokens(tokenizer, *text, max_length=longest, typed=typed)
        return tuple(row.ids), None if row.types is None else tuple(row.types)
    if isinstance(text, str):
        return tuple(tokenizer.encode(text, max_length=longest)), None
    return tuple(tokenizer.encode_chat(text)[:longest]), None


def _longest(config: dict[str, Any], generated: int) -> int:
    """Return the largest prompt length that leaves positions for the generated tokens."""
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


def _edge_rows(rows: Rows, longest: int, trained: Sequence[int]) -> Rows:
    """Return a row of one token, a long row, and further rows for `trained` tokens.

    The long row has up to `_LONGEST_EDGE` tokens; in a batch with it, the short row is nearly all
    padding. Their tokens are those of the prompts, repeated. `trained` tokens may be in no prompt:
    the first of them is the short row, the long row has them after its first token, and those that
    do not fit are in further rows.
    """
    first, *others = [token for row in rows for token in row]
    length = min(longest, _LONGEST_EDGE)
    room = max(0, min(length - 1, _TRAINED_IN_ROW))
    fed = tuple(trained[:MOST_TRAINED])
    tokens = [first, *fed[:room], *others]
    again = -(-length // len(tokens))
    more = (fed[at : at + length] for at in range(room, len(fed), length))
    return (fed[:1] or rows[0][-1:], tuple((tokens * again)[:length]), *more)


def _fuzz_rows(vocabulary: int, longest: int, seed: int, count: int) -> Rows:
    """Return `count` rows of random tokens and random lengths."""
    random = np.random.default_rng([seed, count])
    lengths = random.integers(1, min(longest, _FUZZ_LENGTH) + 1, count)
    return tuple(tuple(random.integers(0, vocabulary, size).tolist()) for size in lengths)


def _random_rows(vocabulary: int, longest: int, seed: int) -> Rows:
    random = np.random.default_rng(seed)
    return tuple(
        tuple(random.integers(0, vocabulary, min(length, longest)).tolist())
        for length in _RANDOM_LENGTHS
    )
