"""Vectors from an encoder bundle, each text with its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.names import FEATURE_EXTRACTION
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import UsageError
from loradeploy.runtime.encoder import encoded_batches
from loradeploy.runtime.session import Adapters, AdapterSession
from loradeploy.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TextEmbedder:
    """Embeds texts with a session on a feature extraction bundle.

    A text's vector is the mean of its tokens' last hidden states, scaled to length 1, as most
    sentence encoders are trained. What the graph gives for a text as a whole is taken as it is.

    Raises:
        UsageError: the bundle is for another task.
        BundleError: the bundle holds no tokenizer.
    """

    def __init__(self, session: AdapterSession) -> None:
        if session.manifest.task != FEATURE_EXTRACTION:
            raise UsageError(
                f"{session.path} is a {session.manifest.task} bundle: it gives no embeddings"
            )
        self.session = session
        self.tokenizer = Tokenizer(session.path)

    def __call__(
        self, texts: str | Sequence[str], adapters: Adapters = None, *, batch_size: int = 32
    ) -> NDArray[np.float32]:
        """The vector of each text, float32 [texts, hidden]. `adapters` as in `AdapterSession.run`.

        Texts longer than the model's positions are cut at their end.

        Raises:
            UsageError: no texts, or not one adapter for each.
            UnknownAdapterError: an adapter that was never loaded.
        """
        vectors = []
        output = output_of(self.session.manifest)
        for held, _, feeds, mask in encoded_batches(
            self.session, self.tokenizer, texts, adapters, batch_size
        ):
            (states,) = held.run([output], feeds)  # [batch, sequence, hidden]
            mean = _mean(states, mask) if states.ndim == 3 else states.astype(np.float32)
            length = np.linalg.norm(mean, axis=1, keepdims=True)
            vectors.append((mean / np.maximum(length, 1e-12)).astype(np.float32))
        return np.concatenate(vectors)


def _mean(states: NDArray[Any], mask: NDArray[np.int64]) -> NDArray[np.float32]:
    """The mean of each row's tokens, [batch, hidden]; padding has no part in it."""
    real = mask[:, :, np.newaxis]
    mean: NDArray[np.float32] = (states.astype(np.float32) * real).sum(axis=1) / np.maximum(
        real.sum(axis=1), 1
    )
    return mean
