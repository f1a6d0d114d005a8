"""Score pairs of texts with a bundle with one output, each pair with its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.heads import MULTI_LABEL, REGRESSION
from loradeploy.adapter.tasks import SEQUENCE_CLASSIFICATION
from loradeploy.bundle.outputs import output_of
from loradeploy.bundle.text.pairs import pair_tokens
from loradeploy.bundle.text.scoring import ACTIVATIONS, IDENTITY, SIGMOID
from loradeploy.errors import UsageError, listed_names, shown
from loradeploy.given_numbers import checked_count
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.arguments import Adapters
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.classification import (
    SCORES,
    base_head,
    check_activation,
    ends_in_sigmoid,
    head_of_row,
    named_outputs,
)
from loradeploy.runtime.tasks.encoder import (
    Pair,
    Tokens,
    check_answer,
    chosen_prompt,
    encoded_batches,
    given_texts,
    given_texts_or_pairs,
    takes_types,
)
from loradeploy.runtime.tasks.session_argument import check_session, check_task
from loradeploy.runtime.text.sides import TextSide

if TYPE_CHECKING:
    from numpy.typing import NDArray

# From the logit to the score.
_SCORES: Final[Mapping[str, Callable[[NDArray[Any]], NDArray[np.float64]]]] = {
    SIGMOID: SCORES[MULTI_LABEL],
    IDENTITY: SCORES[REGRESSION],
}


@dataclass(frozen=True)
class RankedDocument:
    """A document in the results of `TextPairScorer.rerank`: its index, and its score."""

    index: int
    score: float


class TextPairScorer:
    """Scores pairs of texts, with a session on a sequence classification bundle with one output.

    A score equals that of sentence-transformers' `CrossEncoder.predict`: the sigmoid of the logit,
    or the logit if the files of the cross-encoder declare the identity as activation function. The
    files of the pair's adapter, or else of the base, specify the activation, prompts and maximum
    length. If an ONNX graph ends in a Sigmoid, that is the only one.

    `activation`: overrides this with "sigmoid" or "identity". Adapters that were trained as a
    regression give their number with "identity". The order of documents does not change.

    Raises:
        UsageError: the bundle is not a text classifier, or the activation is unknown.
        BundleError: the bundle has no tokenizer, or its files declare another activation function
            or modules behind the classifier.
    """

    def __init__(self, session: AdapterSession, *, activation: str | None = None) -> None:
        check_session(session, type(self).__name__)
        check_task(session, SEQUENCE_CLASSIFICATION, ", no classifier")
        if activation is not None and activation not in ACTIVATIONS:
            raise UsageError(
                f"`activation` is {shown(activation)}: give {' or '.join(ACTIVATIONS)}"
            )
        self.session = session
        self.tokenizer = session.texts.base.tokenizer
        self._given = activation
        self.activation: str = self._activation(session.texts.base)
        self._head = base_head(session)

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        adapters: Adapters = None,
        *,
        prompt_name: str | None = None,
        batch_size: int = 32,
    ) -> NDArray[np.float64]:
        """The score of each pair, float64 [pairs]. `adapters` is as in `AdapterSession.run`.

        If a pair is longer than the model's maximum, the longer text is truncated first.

        `prompt_name`: the named prompt of the base or the pair's adapter that is put before the
        first text; by default their default prompt, if any.

        Raises:
            UsageError: no pairs, a text that is not a pair, not one adapter for each, no prompt of
                this name, a head with several outputs, or a pair without an adapter if the base has
                no trained head.
            BundleError: the files of an adapter declare another activation function.
            UnknownAdapterError: an adapter that was never loaded.
            RunError: the graph gave logits that are not finite numbers.
        """
        given = given_texts_or_pairs(pairs)
        for number, text in enumerate(given, start=1):
            if isinstance(text, str):
                raise UsageError(f"pair {number} is the text {shown(text)}: give two texts")
        scores, output = [], output_of(self.session.manifest)
        typed = takes_types(self.session)

        def encode(pair: Pair, side: TextSide) -> Sequence[Tokens]:
            own = side.scoring
            prompt = chosen_prompt(own.prompts, own.default_prompt, prompt_name)
            longest = side.longest(own.max_length)
            first, second = pair
            return [
                pair_tokens(side.tokenizer, prompt + first, second, max_length=longest, typed=typed)
            ]

        for batch in encoded_batches(self.session, given, adapters, batch_size, encode):
            (logits,) = batch.held.run([output], batch.feeds)  # [batch, labels]
            for row, (values, one) in enumerate(zip(logits, batch.rows, strict=True)):
                head = head_of_row(batch.held.head(row), self._head, one.adapter)
                check_activation(self.session.manifest, head, one.adapter)
                own, labels = named_outputs(values, head)
                if len(own) != 1:
                    whose = "the base" if one.adapter is None else f"adapter {shown(one.adapter)}"
                    raise UsageError(
                        f"{whose} has {len(own)} outputs ({listed_names(labels, 3)}), and a score"
                        " is of one: use TextClassifier"
                    )
                check_answer(own, one)
                scores.append(_SCORES[self._activation(one.side)](own)[0])
        return np.array(scores, np.float64)

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        adapter: AdapterSpec | None = None,
        *,
        top_k: int | None = None,
        prompt_name: str | None = None,
        batch_size: int = 32,
    ) -> list[RankedDocument]:
        """Sort `documents` by their score with `query`, the best first; ties keep their order.

        `top_k`: maximum number of documents to return. `prompt_name`: as in `score`.

        Raises:
            UsageError: as `score`, or `top_k` is below 1.
        """
        if top_k is not None:
            top_k = checked_count("top_k", top_k)
        if not isinstance(query, str) or isinstance(documents, str):
            raise UsageError("give one query and a list of documents")
        pairs = [(query, document) for document in given_texts(documents)]
        scores = self.score(pairs, adapter, prompt_name=prompt_name, batch_size=batch_size)
        best = np.argsort(-scores, kind="stable")[:top_k]
        return [RankedDocument(int(index), float(scores[index])) for index in best]

    def _activation(self, side: TextSide) -> str:
        """The activation of rows with the text settings `side`."""
        side.scoring.check()
        declared = self._given or side.scoring.activation()
        # The number of a regression whose graph ends in a Sigmoid is the score.
        return IDENTITY if ends_in_sigmoid(self.session.manifest) else declared
