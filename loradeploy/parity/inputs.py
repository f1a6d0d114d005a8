"""What the backends are fed: token rows, from prompts or from a seed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import CAUSAL_LM, INPUT_IDS, LEFT, LOGITS
from loradeploy.errors import BundleError, DataError, UsageError
from loradeploy.files import read_json
from loradeploy.parity.prompts import GENERATED, PROMPTS

if TYPE_CHECKING:
    from loradeploy.runtime.tokenizer import Tokenizer

# What a prompt is cut to, so that a text file of long articles does not make a check of hours.
MAX_PROMPT_TOKENS: Final = 256
# A text, or a conversation as a list of messages.
Prompt = str | list[Any]

_TEXT_FIELDS: Final = ("messages", "prompt", "text")
_POSITIONS: Final = ("max_position_embeddings", "n_positions", "n_ctx")
_SEEDS: Final = 1 << 16  # where the tokens are no model's own
_RANDOM_LENGTHS: Final = (5, 24, 1, 13, 40, 2, 9, 30)


@dataclass(frozen=True, eq=False)
class Cases:
    """The prompts as tokens.

    `prompts`: token ids, one row a prompt. `generated`: how many tokens follow each; 0 where the
    model generates nothing. `pad`: id that fills rows up. `source`: where the prompts are from.
    `left`: whether a decoder's rows are filled up on the left.
    """

    prompts: tuple[tuple[int, ...], ...]
    generated: int
    pad: int
    source: str
    left: bool = True


def make_cases(
    bundle: Path,
    manifest: Manifest,
    *,
    prompts: str | os.PathLike[str] | Sequence[str] | None,
    generated: int | None,
    seed: int,
) -> Cases:
    """The cases for a bundle.

    `prompts` is a file (one prompt a line, or JSONL with `prompt`, `text` or `messages`), a list of
    texts, or None for the built-in ones. A bundle without a tokenizer is fed random tokens.

    Raises:
        DataError: the file is missing, empty, or has a broken line.
        UsageError: texts for a bundle without a tokenizer, or no room for a prompt.
    """
    generated = GENERATED if generated is None else generated
    if generated < 1:
        raise UsageError(f"{generated} tokens to generate: give 1 or more")
    follow = generated if manifest.task == CAUSAL_LM else 0
    left = manifest.padding == LEFT
    config = _config(bundle)
    longest = _longest(config, follow)
    if not (bundle / "tokenizer.json").is_file():
        if prompts is not None:
            raise UsageError(f"{bundle} has no tokenizer.json: prompts cannot be turned to tokens")
        pad = config.get("pad_token_id")
        rows = _random_rows(_vocabulary(manifest, config, bundle), longest, seed)
        known = pad if isinstance(pad, int) else 0
        return Cases(rows, follow, known, f"random tokens, seed {seed}", left)
    from loradeploy.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer(bundle)
    texts, source = _texts(prompts)
    encoded = [_encode(tokenizer, text, longest) for text in texts]
    if empty := [number for number, row in enumerate(encoded, start=1) if not row]:
        raise DataError(f"{source}: prompt {empty[0]} has no tokens")
    return Cases(tuple(map(tuple, encoded)), follow, tokenizer.pad_id, source, left)


def _texts(
    prompts: str | os.PathLike[str] | Sequence[str] | None,
) -> tuple[Sequence[Prompt], str]:
    if prompts is None:
        return PROMPTS, "built-in prompts"
    if isinstance(prompts, str | os.PathLike):
        return _read(Path(prompts)), os.fspath(prompts)
    if not prompts:
        raise UsageError("no prompts are given")
    return list(prompts), "given prompts"


def _read(file: Path) -> list[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{file} does not exist: give a text or JSONL file of prompts") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{file} cannot be read: {problem}") from None
    as_json = file.suffix in (".jsonl", ".json")
    found = [
        _line(file, number, line) if as_json else line
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise DataError(f"{file} holds no prompts")
    return found


def _line(file: Path, number: int, line: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as problem:
        raise DataError(f"{file}, line {number} is no JSON: {problem}") from None
    if isinstance(value, str):
        return value
    for name in _TEXT_FIELDS if isinstance(value, dict) else ():
        content: Any = value.get(name)
        if isinstance(content, str) or (name == "messages" and isinstance(content, list)):
            return content
    raise DataError(f"{file}, line {number} has none of the fields {', '.join(_TEXT_FIELDS)}")


def _encode(tokenizer: Tokenizer, text: Prompt, longest: int) -> list[int]:
    if isinstance(text, str):
        return tokenizer.encode(text, max_length=longest)
    return tokenizer.encode_chat(text)[:longest]


def _config(bundle: Path) -> dict[str, Any]:
    file = bundle / "config.json"
    return read_json(file, error=BundleError) if file.is_file() else {}


def _longest(config: dict[str, Any], generated: int) -> int:
    """How long a prompt may be so that the generated tokens still have positions."""
    positions: list[int] = [
        config[name] for name in _POSITIONS if isinstance(config.get(name), int)
    ]
    # RoBERTa and its kin number positions from the padding's id on.
    reserved = 2 if config.get("model_type") in ("roberta", "xlm-roberta", "camembert") else 0
    room = min([*positions[:1], MAX_PROMPT_TOKENS + generated + reserved]) - generated - reserved
    if room < 1:
        raise UsageError(
            f"{generated} generated tokens leave no room in the model's {positions[0]} positions:"
            " generate fewer"
        )
    return room


def _vocabulary(manifest: Manifest, config: dict[str, Any], bundle: Path) -> int:
    size = config.get("vocab_size")
    if isinstance(size, int):
        return size
    for output in manifest.outputs:
        if output.name == LOGITS and len(output.shape) == 3 and isinstance(output.shape[-1], int):
            return output.shape[-1]
    if all(spec.name != INPUT_IDS for spec in manifest.inputs):
        return _SEEDS
    raise UsageError(f"{bundle} tells neither a tokenizer nor the size of the vocabulary")


def _random_rows(vocabulary: int, longest: int, seed: int) -> tuple[tuple[int, ...], ...]:
    random = np.random.default_rng(seed)
    return tuple(
        tuple(random.integers(0, vocabulary, min(length, longest)).tolist())
        for length in _RANDOM_LENGTHS
    )
