"""Constrain texts to a JSON schema, with llguidance."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from loradeploy.runtime.session import AdapterSession
from loradeploy.serve.problems import RequestError, refused
from loradeploy.serve.schemas.text import ResponseFormat

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loradeploy.bundle.text.tokenizer import Tokenizer
    from loradeploy.runtime.adapters.resident import AdapterSpec
    from loradeploy.runtime.decoding.choosing.options import AllowedTokens


class Grammars:
    """Makes token masks for a service's texts. Compiling is slow: call it in a thread."""

    def __init__(self, session: AdapterSession) -> None:
        self._session = session
        self._words: weakref.WeakKeyDictionary[Tokenizer, Any] = weakref.WeakKeyDictionary()

    def allowed(self, form: ResponseFormat, adapter: AdapterSpec | None) -> AllowedTokens | None:
        """A function that returns the allowed next tokens of a text of this form; None for all.

        Raises:
            RequestError: 400, llguidance is not installed, or cannot use the schema.
        """
        if form.type == "text":
            return None
        schema: dict[str, Any] = {"type": "object"}
        if form.type == "json_schema":
            if form.json_schema is None:
                raise refused("response_format", "json_schema is missing")
            schema = form.json_schema.schema_
        try:
            import llguidance
        except ModuleNotFoundError:
            raise refused(
                "response_format",
                f"{form.type} is not available: llguidance is not installed on the server",
            ) from None
        # Without flexible whitespace, a model cannot generate spaces forever.
        options = {"whitespace_flexible": False}
        tokenizer = self._session.texts.of(adapter).tokenizer
        words = self._words.get(tokenizer)
        if not tokenizer.eos_ids:
            raise refused("response_format", f"{form.type}: no token of this model ends a text")
        if words is None:
            words = llguidance.LLTokenizer(tokenizer.as_text, eos_token=min(tokenizer.eos_ids))
            self._words[tokenizer] = words
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=options)
        except ValueError as problem:
            raise _unusable(problem) from None
        return _JsonText(words, grammar, tokenizer.eos_ids)


class _JsonText:
    """The allowed next tokens of a text of a grammar. `ends`: the end tokens.

    Raises:
        RequestError: 400, the grammar is too complex, at the start or at a later position of a
            text.
    """

    def __init__(self, words: Any, grammar: str, ends: frozenset[int]) -> None:
        import llguidance.numpy

        self._matcher = llguidance.LLMatcher(words, grammar)
        self._check()
        self._fill = llguidance.numpy.fill_next_token_bitmask
        self._bits = llguidance.numpy.allocate_token_bitmask(1, words.vocab_size)
        self._ends = sorted(ends)  # llguidance uses the first
        self._made: tuple[int, ...] = ()
        self(())  # refuses a grammar that is too complex at its start

    def __call__(self, made: tuple[int, ...]) -> NDArray[np.bool_]:
        """The mask, bool [vocabulary], after the tokens `made`."""
        import numpy as np

        if made[: len(self._made)] != self._made:  # another text of the request
            self._matcher.reset()
            self._made = ()
        taken = self._matcher.consume_tokens(list(made[len(self._made) :]))
        self._check()
        if not taken:
            raise RequestError(500, "the text left its grammar")
        self._made = made
        self._fill(self._matcher, self._bits)
        self._check()
        mask = np.unpackbits(self._bits.view(np.uint8), bitorder="little").astype(bool)
        mask[[end for end in self._ends if end < mask.size]] = mask[self._ends[0]]
        return mask

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _unusable(self._matcher.get_error())


def _unusable(problem: object) -> RequestError:
    line = (str(problem).strip() or "unknown").splitlines()[0][:200]
    return refused("response_format", f"the schema cannot be used: {line}")
