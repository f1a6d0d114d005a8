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
from loradeploy.runtime.decoding.graph import DecoderGraph
from loradeploy.runtime.held import HeldAdapters

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TextScore:
    """The probability of a text for the model with an adapter.

    Args:
        token_ids: the text's tokens.
        logprobs: one for each of `token_ids` but the first, which nothing precedes.
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
    ids, mask, _ = graph.padded(texts)
    cache = graph.session.empty_cache(len(texts))
    cache.make_room(ids.shape[1], ids.shape[1])
    logits, *_ = held.run_with_ort_values(
        (graph.output, *cache.outputs),
        {**graph.feeds(ids, mask), **cache.inputs},
        buffers=cache.buffers,
    )
    values = logits.numpy()  # [texts, tokens, vocabulary]
    if values.ndim != 3 or values.shape[1] != ids.shape[1]:
        raise UsageError(
            f"{graph.session.path} only gives the logits of the last token: texts are scored by"
            " those of all tokens"
        )
    results = []
    for row, (text, adapter, tokenizer) in enumerate(zip(texts, adapters, tokenizers, strict=True)):
        vocabulary = vocabulary_of_row(held.resident(row), graph.session.manifest)
        own = values[row, mask[row] == 1, :vocabulary]
        check_logits(own, f"text {numbers[row] + 1}")
        results.append(_score(own, text, adapter, tokenizer, most))
    return results


def _score(
    logits: NDArray[Any],
    text: Sequence[int],
    adapter: AdapterSpec | None,
    tokenizer: Tokenizer,
    most: int,
) -> TextScore:
    """The score of one text, by its logits [tokens, vocabulary]."""
    if most:
        logprobs = tuple(
            token_logprob(values, token, most, tokenizer)
            for values, token in zip(logits, text[1:], strict=False)
        )
    else:
        found = log_softmax(logits[:-1])[np.arange(len(text) - 1), np.array(text[1:])]
        logprobs = tuple(
            TokenLogprob(token, tokenizer.decode([token]), float(value))
            for token, value in zip(text[1:], found, strict=True)
        )
    return TextScore(tuple(text), logprobs, sum(part.logprob for part in logprobs), adapter)
