"""The one table of tolerances: how far a deployment may be from its reference, and why.

A limit on an absolute error holds for values that reach `REACH`; where the reference reaches
further, it grows in proportion, as rounding does. It never shrinks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loradeploy.errors import UsageError

REACH: Final = 32.0


@dataclass(frozen=True)
class Metric:
    """A figure that is judged. `absolute`: it is in the unit of the values, and grows with them."""

    name: str
    title: str
    absolute: bool
    meaning: str


@dataclass(frozen=True)
class Limit:
    """The largest value of a metric that passes, and the reason for it."""

    value: float
    reason: str


METRICS: Final[tuple[Metric, ...]] = (
    Metric("max_abs", "max abs", True, "largest absolute error"),
    Metric("p99_abs", "p99 abs", True, "absolute error that 99 % of the values stay below"),
    Metric("mean_abs", "mean abs", True, "mean absolute error"),
    Metric("max_rel", "max rel", False, "largest relative error, guarded near zero"),
    Metric("cosine_distance", "1 − cosine", False, "1 − cosine of the worst position"),
    Metric("kl", "KL", False, "KL divergence of the worst position, in nats"),
    Metric("margin", "margin", True, "lead of the expected token where another one was chosen"),
    Metric(
        "effect_share", "error/effect", False, "largest error over the adapter's largest effect"
    ),
)

_HALF: Final = "float16 keeps 11 bits of each weight; measured on SmolLM2-135M: "
_HIDES: Final = "an error that is not far below the effect hides the adapter"

# "Measured" is the largest over all paths on SmolLM2-135M with rank-16 adapters on all linear
# layers. PyTorch itself is 1.7e-4 off once an adapter is merged in float32.
TOLERANCES: Final[Mapping[str, Mapping[str, Limit]]] = {
    "fp32": {
        "max_abs": Limit(2e-4, "float32 rounding in another order, 30 layers; measured: 1.5e-4"),
        "p99_abs": Limit(1e-4, "half of the largest; measured: 4.8e-5"),
        "mean_abs": Limit(2e-5, "a tenth of the largest; a bias in all values shows here first"),
        "max_rel": Limit(1e-3, "the largest error over the guard; measured: 2.7e-4"),
        "cosine_distance": Limit(1e-8, "quadratic in the error; measured: 1e-10"),
        "kl": Limit(1e-7, "quadratic in the error: half of (2e-4)² and room; measured: 3e-10"),
        "margin": Limit(4e-4, "two logits that may each be off by the largest error are a tie"),
        "effect_share": Limit(0.1, _HIDES),
    },
    "fp16": {
        "max_abs": Limit(0.25, f"{_HALF}0.11"),
        "p99_abs": Limit(0.08, f"{_HALF}0.036"),
        "mean_abs": Limit(0.02, f"{_HALF}0.0077"),
        "max_rel": Limit(1.0, f"{_HALF}0.24, and 0.52 on random weights"),
        "cosine_distance": Limit(5e-4, f"{_HALF}2e-4"),
        "kl": Limit(1e-3, f"{_HALF}2e-4"),
        "margin": Limit(0.1, f"{_HALF}0.03; two logits that are each off by a little are a tie"),
        "effect_share": Limit(0.2, f"{_HIDES}; of a slight adapter's effect, 0.08 was measured"),
    },
}


def tolerances(precision: str) -> Mapping[str, Limit]:
    """The limits for a bundle of `precision`.

    Raises:
        UsageError: nothing is known of that precision.
    """
    if precision not in TOLERANCES:
        raise UsageError(
            f"parity knows no tolerances for {precision}, only for {', '.join(TOLERANCES)}:"
            " export the bundle in one of these to prove it"
        )
    return TOLERANCES[precision]
