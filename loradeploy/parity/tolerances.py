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

_HALF: Final = "float16 keeps 11 bits: rounding is 8192 times float32's, and kernels add in float32"
_NOISE: Final = "the rounding of the base's weights dominates; the adapter's own factors stay float"

TOLERANCES: Final[Mapping[str, Mapping[str, Limit]]] = {
    "fp32": {
        "max_abs": Limit(2e-4, "float32 in two libraries, thirty layers deep; measured: 5e-5"),
        "p99_abs": Limit(1e-4, "half of the largest"),
        "mean_abs": Limit(2e-5, "a tenth of the largest; a bias in all values shows here first"),
        "max_rel": Limit(1e-3, "the largest absolute error over the guard, rounded up"),
        "cosine_distance": Limit(1e-8, "quadratic in the error: (2e-4)² and room"),
        "kl": Limit(1e-7, "quadratic in the error: half of (2e-4)² and room"),
        "margin": Limit(4e-4, "two logits that may each be off by the largest error are a tie"),
        "effect_share": Limit(0.1, "an error that is not far below the effect hides the adapter"),
    },
    "fp16": {
        "max_abs": Limit(0.5, _HALF),
        "p99_abs": Limit(0.2, _HALF),
        "mean_abs": Limit(0.05, _HALF),
        "max_rel": Limit(1.0, "the largest absolute error over the guard"),
        "cosine_distance": Limit(1e-3, "quadratic in the error"),
        "kl": Limit(0.02, "quadratic in the error"),
        "margin": Limit(0.5, "two logits that are each off by the usual error are a tie"),
        "effect_share": Limit(0.1, "an error that is not far below the effect hides the adapter"),
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
