"""Embed texts with an encoder bundle, each text with its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.tasks import FEATURE_EXTRACTION
from loradeploy.bundle.outputs import LOGITS_NAMES, output_of
from loradeploy.errors import UsageError
from loradeploy.runtime.arguments import Adapters
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.encoder import (
    PlainTokens,
    check_answer,
    chosen_prompt,
    encoded_batches,
    fixed_length,
    given_texts,
)
from loradeploy.runtime.tasks.session_argument import check_session, check_task
from loradeploy.runtime.text.sides import TextSide

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TextEmbedder:
    """Embeds texts with a session on a feature extraction bundle.

    The files that sentence-transformers saved with the base, or with the text's adapter, define the
    prompt, maximum length, pooling, layers and normalization. Without such files, the vector is the
    mean of the tokens' last hidden states, scaled to length 1. If the graph returns one vector per
    text, such as a text tower (CLIP, SigLIP), it is not pooled again, but scaled to length 1.

    Raises:
        UsageError: the bundle is for another task, or its output is logits.
        BundleError: the bundle has no tokenizer.
    """

    def __init__(self, session: AdapterSession) -> None:
        check_session(session, type(self).__name__)
        check_task(session, FEATURE_EXTRACTION, ": it gives no embeddings")
        if (output := output_of(session.manifest)) in LOGITS_NAMES:
            raise UsageError(
                f"the output of {session.path} is {output}, not hidden states: it gives no"
                " embeddings; run it with AdapterSession.run"
            )
        self.session = session
        self.tokenizer = session.texts.base.tokenizer

    def __call__(
        self,
        texts: str | Sequence[str],
        adapters: Adapters = None,
        *,
        prompt_name: str | None = None,
        batch_size: int = 32,
    ) -> NDArray[np.float32]:
        """The vector of each text, float32 [texts, size]. `adapters` as in `AdapterSession.run`.

        `prompt_name`: the named prompt of the base or the text's adapter that is put before each
        text; by default their default prompt, if any. Texts longer than the model's maximum are
        truncated at their end.

        Raises:
            UsageError: no texts, not one adapter for each, no prompt of this name, or adapters
                whose vectors have different sizes.
            UnknownAdapterError: an adapter that was never loaded.
            RunError: the graph gave states that are not finite numbers.
        """

        full = fixed_length(self.session)

        def encode(text: str, side: TextSide) -> list[PlainTokens]:
            prompt = _prompt(side, prompt_name)
            longest = side.longest(side.recipe.max_length, full)
            return [PlainTokens(side.tokenizer.encode(prompt + text, max_length=longest))]

        vectors: list[NDArray[np.float32]] = []
        output = output_of(self.session.manifest)
        for batch in encoded_batches(
            self.session, given_texts(texts), adapters, batch_size, encode
        ):
            (states,) = batch.held.run([output], batch.feeds)  # [batch, sequence, hidden]
            for row, one in enumerate(batch.rows):
                side, length = one.side, len(one.tokens.ids)
                own = states[row] if states.ndim == 2 else states[row, :length]
                check_answer(own, one)
                if states.ndim == 2:  # [batch, hidden]
                    vectors.append(self._whole(states[row : row + 1], side))
                    continue
                skipped = _prompt_tokens(side, _prompt(side, prompt_name))
                alone = states[row : row + 1, :length], batch.mask[row : row + 1, :length]
                vectors.append(side.recipe.vectors(*alone, skipped))
        sizes = {vector.shape[1] for vector in vectors}
        if len(sizes) > 1:
            raise UsageError(
                f"the adapters of the texts give vectors of sizes {sorted(sizes)}: embed the texts"
                " of each on their own"
            )
        return np.concatenate(vectors)

    def _whole(self, vectors: NDArray[Any], side: TextSide) -> NDArray[np.float32]:
        """Scale the vectors [batch, size] of a graph that pools its texts itself."""
        base = self.session.texts.base.recipe
        if not side.recipe.same(base) or not base.only_scales:
            raise UsageError(
                f"the graph of {self.session.path} pools its texts itself, and modules.json"
                " declares more than that: export the checkpoint"
            )
        return base.scaled(vectors)


def _prompt(side: TextSide, name: str | None) -> str:
    return chosen_prompt(side.recipe.prompts, side.recipe.default_prompt, name)


def _prompt_tokens(side: TextSide, prompt: str) -> int:
    """The number of tokens of a prompt before a text, with the special tokens before it."""
    if not prompt or side.recipe.include_prompt:
        return 0
    ids = side.tokenizer.encode(prompt, max_length=side.longest(side.recipe.max_length))
    return len(ids) - bool(ids and side.tokenizer.is_special(ids[-1]))
