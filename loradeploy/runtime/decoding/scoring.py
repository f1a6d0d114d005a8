"""Score given texts by their probability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.errors import UsageError
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.adapters.tokens import vocabulary_of_row
from loradeploy.runtime.decoding.choosing.logprobs import (
    TokenLogprob,
    check_logits,
    log_softmax,
    token_logprob,
)
from loradeploy.runtime.decoding.graph import DecoderGraph, TokenEmbeds
from loradeploy.runtime.held import HeldAdapters

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TextScore:
    """The probability of a text for the model with an adapter.

    Args:
        token_ids: the text's tokens.
        logprobs: one for each of `token_ids` but the first, which nothing precedes, and those of
            images, which are no text.
        logprob: their sum, the natural logarithm of the text's probability after its first token.
        adapter: the adapter of the score.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    logprob: float
    adapter: AdapterSpec | None

    @property
    def perplexity(self) -> float:
        """exp(−logprob / number of `logprobs`)."""
        return math.exp(-self.logprob / len(self.logprobs))


def scores_of(
    graph: DecoderGraph,
    held: HeldAdapters,
    texts: Sequence[Sequence[int]],
    adapters: Sequence[AdapterSpec | None],
    tokenizers: Sequence[Tokenizer],
    numbers: Sequence[int],
    most: int,
) -> list[TextScore]:
    """Score `texts`, token ids, with the top `most` tokens of each position.

    `numbers`: the texts' numbers in messages.

    Raises:
        UsageError: the graph returns only the logits of the last position.
        RunError: it returns logits that are not finite.
    """
    new = graph.padded(texts)
    cache = graph.session.empty_cache(len(texts))
    length = new.ids.shape[1]
    cache.make_room(length, length)
    logits, *_ = held.run_with_ort_values(
        (graph.output, *cache.outputs),
        {**graph.feeds(new.ids, new.mask), **cache.inputs},
        buffers=cache.buffers,
    )
    values = logits.numpy()  # [texts, tokens, vocabulary]
    if values.ndim != 3 or values.shape[1] != length:
        raise UsageError(
            f"{graph.session.path} only gives the logits of the last token: texts are scored by"
            " those of all tokens"
        )
    results = []
    for row, (text, adapter, tokenizer) in enumerate(zip(texts, adapters, tokenizers, strict=True)):
        vocabulary = vocabulary_of_row(held.resident(row), graph.session.manifest)
        own = values[row, new.mask[row] == 1, :vocabulary]
        check_logits(own, f"text {numbers[row] + 1}")
        embeds = None if graph.embeds is None else graph.embeds[row]
        scored = [place for place in range(1, len(text)) if not _replaced(text[place], embeds)]
        if not scored:
            raise UsageError(
                f"text {numbers[row] + 1} has only tokens of images after its first token"
            )
        tokens = [text[place] for place in scored]
        # [scored tokens, vocabulary]; a view if all tokens are scored, because it is large
        before = own[:-1] if len(scored) == len(text) - 1 else own[np.array(scored) - 1]
        results.append(_score(before, text, tokens, adapter, tokenizer, most))
    return results


def _replaced(token: int, embeds: TokenEmbeds | None) -> bool:
    return embeds is not None and token == embeds.token


def _score(
    logits: NDArray[Any],
    text: Sequence[int],
    tokens: Sequence[int],
    adapter: AdapterSpec | None,
    tokenizer: Tokenizer,
    most: int,
) -> TextScore:
    """The score of a text by `logits` [tokens, vocabulary], those before each of `tokens`."""
    if most:
        logprobs = tuple(
            token_logprob(values, token, most, tokenizer)
            for values, token in zip(logits, tokens, strict=True)
        )
    else:
        found = log_softmax(logits)[np.arange(len(tokens)), np.array(tokens)]
        logprobs = tuple(
            TokenLogprob(token, tokenizer.decode([token]), float(value))
            for token, value in zip(tokens, found, strict=True)
        )
    return TextScore(tuple(text), logprobs, sum(part.logprob for part in logprobs), adapter)
