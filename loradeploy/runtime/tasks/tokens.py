"""Find entities with a token classification bundle, each text with its own adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from loradeploy.adapter.heads import SINGLE_LABEL
from loradeploy.adapter.tasks import TOKEN_CLASSIFICATION
from loradeploy.bundle.names import NO_PADDING
from loradeploy.bundle.outputs import output_of
from loradeploy.bundle.text.parts import TextPart, is_subword_by_prefix, joined, text_parts
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.errors import UsageError, shown
from loradeploy.given_numbers import checked_count
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.arguments import Adapters, each_row
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.classification import SCORES, base_head, head_of_row, named_outputs
from loradeploy.runtime.tasks.encoder import (
    TextRow,
    check_answer,
    encoded_batches,
    given_texts,
)
from loradeploy.runtime.tasks.entities import (
    AGGREGATIONS,
    NONE,
    OUTSIDE,
    Entity,
    Token,
    entities_of,
    without_overlaps,
)
from loradeploy.runtime.tasks.session_argument import check_session, check_task
from loradeploy.runtime.text.sides import TextSide

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenClassification:
    """The entities of a text, in order."""

    entities: tuple[Entity, ...]
    adapter: AdapterSpec | None


class TokenClassifier:
    """Finds entities in texts with a session on a token classification bundle.

    Raises:
        UsageError: the bundle is for another task.
        BundleError: the bundle has no tokenizer.
    """

    def __init__(self, session: AdapterSession) -> None:
        check_session(session, type(self).__name__)
        check_task(session, TOKEN_CLASSIFICATION, ", no token classifier")
        self.session = session
        self.tokenizer = session.texts.base.tokenizer
        self._head = base_head(session)
        # An ONNX graph that ended in a Sigmoid states it; transformers always takes the softmax.
        self._scores = SCORES[session.manifest.problem_type or SINGLE_LABEL]

    def __call__(
        self,
        texts: str | Sequence[str],
        adapters: Adapters = None,
        *,
        aggregation: str = "first",
        ignore_labels: Sequence[str] = (OUTSIDE,),
        stride: int | None = None,
        batch_size: int = 32,
    ) -> list[TokenClassification]:
        """Find the entities of each text. `adapters` is as in `AdapterSession.run`.

        The results are those of transformers' TokenClassificationPipeline with the
        aggregation_strategy `aggregation`: "none" returns each token whose label is not O; "simple"
        joins adjacent tokens of one kind, by the labels' B- and I-; "first", "average" and "max"
        first choose one label for each word: that of its first token, of the average of its tokens,
        or of its most likely token. Training puts a word's label on its first token, which "first"
        evaluates. A text without words has no entities.

        `ignore_labels`: omit entities with these labels: with "none" the labels of tokens, with
        other aggregations the kinds of entities, without B- and I-.
        `stride`: split texts that are longer than the model's maximum into parts that overlap by
        this many tokens; of overlapping entities, the longer one is kept. By default, such texts
        are refused.

        Raises:
            UsageError: no texts, not one adapter for each, a text that is too long, an unknown
                aggregation, ignored labels that are no list of texts, a stride with "none" or that
                does not fit, an adapter whose file does not declare its labels, or a text without
                an adapter if the base has no trained head.
            UnknownAdapterError: an adapter that was never loaded.
            RunError: the graph gave logits that are not finite numbers.
        """
        self._check_options(aggregation, ignore_labels, stride)
        given = given_texts(texts)
        found: list[list[Entity]] = [[] for _ in given]
        parts = [0] * len(given)
        output = output_of(self.session.manifest)

        def encode(text: str, side: TextSide) -> list[TextPart]:
            longest = side.tokenizer.max_length
            return text_parts(side.tokenizer, text, max_length=longest, stride=stride)

        for batch in encoded_batches(self.session, given, adapters, batch_size, encode):
            (logits,) = batch.held.run([output], batch.feeds)  # [rows, sequence, labels]
            for number, (values, row) in enumerate(zip(logits, batch.rows, strict=True)):
                head = head_of_row(batch.held.head(number), self._head, row.adapter)
                own, labels = named_outputs(values[: len(row.tokens.ids)], head)
                check_answer(own, row)
                tokens = _tokens(row, given[row.text], self._scores(own))
                join = partial(joined, row.side.tokenizer)
                found[row.text] += entities_of(tokens, labels, aggregation, join, ignore_labels)
                parts[row.text] += 1
        return [
            TokenClassification(tuple(without_overlaps(own) if count > 1 else own), adapter)
            for own, count, adapter in zip(
                found, parts, each_row(adapters, len(given)), strict=True
            )
        ]

    def _check_options(
        self, aggregation: str, ignore_labels: Sequence[str], stride: int | None
    ) -> None:
        """Raise UsageError for options that are invalid, or do not fit each other or the graph."""
        if not isinstance(aggregation, str) or aggregation not in AGGREGATIONS:
            raise UsageError(
                f"`aggregation` is {shown(aggregation)}: give one of {', '.join(AGGREGATIONS)}"
            )
        listed = isinstance(ignore_labels, Iterable) and not isinstance(ignore_labels, str)
        if not listed or not all(isinstance(name, str) for name in ignore_labels):
            raise UsageError(f"`ignore_labels` is {shown(ignore_labels)}: give a list of labels")
        if stride is None:
            return
        checked_count("`stride`", stride, 0)
        if aggregation == NONE:
            raise UsageError(
                '`stride` needs an `aggregation`: with "none", tokens of overlaps would be repeated'
            )
        if self.session.manifest.padding == NO_PADDING:
            raise UsageError(
                f"`stride`: {self.session.path} needs rows of one length, and parts have several"
            )


def _tokens(row: TextRow[TextPart], text: str, scores: NDArray[np.float64]) -> list[Token]:
    """The tokens of a row without special tokens; `scores` [tokens, labels]."""
    part, tokenizer = row.tokens, row.side.tokenizer
    return [
        _token(tokenizer, part, index, text, scores[index])
        for index, special in enumerate(part.special)
        if not special
    ]


def _token(
    tokenizer: Tokenizer, part: TextPart, index: int, text: str, scores: NDArray[np.float64]
) -> Token:
    start, end = part.spans[index]
    word, continues = part.words[index], is_subword_by_prefix(tokenizer, part, index)
    if continues is None:  # as in transformers: no space before it or at its beginning
        continues = start > 0 and " " not in text[start - 1 : start + 1]
    if word == tokenizer.special_tokens.get("unk_token"):
        word, continues = text[start:end], False
    return Token(word, scores, start, end, index, continues)
