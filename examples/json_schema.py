"""Generate JSON that follows a schema, with every adapter of a bundle.

    pip install llguidance
    python examples/json_schema.py BUNDLE "The prompt" [--schema schema.json] [--max-new-tokens 128]

The base and every adapter of the bundle answer the prompt in one batch. llguidance computes the
allowed tokens, and `allowed_tokens` passes them to the generator for each row.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np

import loradeploy as ld

SCHEMA = {
    "type": "object",
    "properties": {
        "topic": {"enum": ["business", "sport", "tech"]},
        "important": {"type": "boolean"},
    },
    "required": ["topic", "important"],
    "additionalProperties": False,
}


class JsonText:
    """Computes the allowed next tokens of a JSON text with a schema; one object for each row."""

    def __init__(self, words: llguidance.LLTokenizer, schema: dict[str, Any]) -> None:
        # Without flexible whitespace, a model cannot generate spaces forever.
        options = {"whitespace_flexible": False}
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=options)
        self._matcher = llguidance.LLMatcher(words, grammar)
        if self._matcher.is_error():
            raise ValueError(f"the schema cannot be used: {self._matcher.get_error()}")
        self._bits = llguidance.numpy.allocate_token_bitmask(1, words.vocab_size)
        self._made: tuple[int, ...] = ()

    def __call__(self, made: tuple[int, ...]) -> np.ndarray:
        """Return the mask of allowed tokens, bool [vocabulary], after the tokens `made`."""
        if made[: len(self._made)] != self._made:  # another beam
            self._matcher.reset()
            self._made = ()
        if not self._matcher.consume_tokens(list(made[len(self._made) :])):
            raise ValueError(f"the text does not match the schema: {self._matcher.get_error()}")
        self._made = made
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits)
        return np.unpackbits(self._bits.view(np.uint8), bitorder="little").astype(bool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("prompt")
    parser.add_argument("--schema", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    arguments = parser.parse_args()

    schema = SCHEMA if arguments.schema is None else json.loads(arguments.schema.read_text())
    session = ld.AdapterSession(arguments.bundle)
    generator = ld.TextGenerator(session)
    words = llguidance.LLTokenizer(
        (Path(arguments.bundle) / "tokenizer.json").read_text(encoding="utf-8"),
        eos_token=min(generator.tokenizer.eos_ids),
    )
    rows = [None, *session.adapters]  # None is the base
    answers = generator.generate(
        [arguments.prompt] * len(rows),
        rows,
        max_new_tokens=arguments.max_new_tokens,
        per_prompt=[{"allowed_tokens": JsonText(words, schema)} for _ in rows],
    )
    for name, answer in zip(rows, answers, strict=True):
        print(f"{name or 'base'} ({answer.finish_reason}): {answer.text}")


if __name__ == "__main__":
    main()
