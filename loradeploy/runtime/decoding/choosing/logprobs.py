"""Log-probabilities of tokens by the model, before generation settings are applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.errors import RunError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its natural log-probability, and the most likely tokens at its position.

    `token`: its text. `top`: the requested number of tokens, the most likely first.
    """

    token_id: int
    token: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


def check_logits(logits: NDArray[Any], what: str) -> None:
    """Raise RunError if a position of logits [..., vocabulary] has NaN or +inf, or only -inf.

    A graph may exclude single tokens by -inf. `what`: the name of the logits in messages.
    """
    if not np.isfinite(logits.max(axis=-1)).all():
        raise RunError(
            f"{what}: the graph gave logits that are not finite (an overflow, such as of float16):"
            " run `loradeploy parity` on the bundle and the adapter"
        )


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Log-probabilities along the last axis, float64."""
    values = logits.astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = values - np.log(np.exp(values).sum(axis=-1, keepdims=True))
    return result


def token_logprob(
    logits: NDArray[Any], token: int, most: int, tokenizer: Tokenizer
) -> TokenLogprob:
    """The log-probability of `token` by logits [vocabulary], with the top `most` tokens."""
    values = log_softmax(logits)
    most = min(most, values.size)
    best = np.argpartition(-values, most - 1)[:most] if most else np.array([], np.int64)
    best = best[np.argsort(-values[best], kind="stable")]

    def of(index: int, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        return TokenLogprob(index, tokenizer.decode([index]), float(values[index]), top)

    return of(token, tuple(of(int(index)) for index in best))
