"""Tolerances: how far a deployment may be from its reference, measured and not guessed.

PyTorch's own numbers have rounding errors: float32 differs from float64, float16 from float32, and
products of quantized weights round their activations. The size of these errors on the inputs of a
check, the *gap*, is measured in PyTorch (calibrate.py), where nothing but rounding contributes. A
deployment in the same precision rounds as often but in another order, so its own error is of the
same size but independent: its distance from the reference is up to two gaps, and `ROOM` is twice
that. A wrong adapter has an error of the size of its effect instead; the last metric compares the
two.

Without a PyTorch model to measure, `assumed` returns limits derived from other measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loradeploy.errors import UsageError
from loradeploy.parity.figures.metrics import RELATIVE_GUARD

if TYPE_CHECKING:
    from loradeploy.parity.figures.metrics import Figures

# A figure may be this many times the gap's; a quadratic one (cosine, KL) the square of it.
ROOM: Final = 4.0
# The least that is always allowed, in rounding errors of the largest value: in a small model the
# measured gap may happen to be zero. In half precision fewer are needed, since each is large.
LEAST: Final[Mapping[str, int]] = {"fp32": 64, "fp16": 16, "bf16": 16, "int8": 64, "int4": 64}
# Of fewer values than this, such as the outputs of classifiers, the mean and the 99th percentile of
# rounding errors may be nearly as large as the largest one.
_FEW: Final = 100
# Allowed if nothing was measured, in rounding errors: twice the error of SmolLM2-135M's thirty
# layers. In half precision sums are in float32, so that fewer of the larger errors accumulate.
ASSUMED: Final[Mapping[str, int]] = {"fp32": 112, "fp16": 16, "bf16": 16}
# The largest relative error of one rounding. Quantized weights are multiplied in float32.
UNIT: Final[Mapping[str, float]] = {
    "fp32": 2**-24, "fp16": 2**-11, "bf16": 2**-8, "int8": 2**-24, "int4": 2**-24,
}  # fmt: skip
# The reason for a limit that was measured: which rounding the gap of a precision consists of.
GAPS: Final[Mapping[str, str]] = {
    "fp32": "PyTorch's float32 is off from its float64",
    "fp16": "PyTorch's float16 is off from its float32",
    "bf16": "PyTorch's bfloat16 is off from its float32",
    "int8": "PyTorch is off where what weights multiply is rounded to 8 bits",
    "int4": "PyTorch is off where what weights multiply is rounded to 8 bits",
}


@dataclass(frozen=True)
class Metric:
    """A figure that has a limit.

    `order`: 1 if it is linear in the error, 2 if quadratic, 0 if it does not measure rounding.
    `absolute`: whether it depends on absolute errors, not on relative ones. `usual`: its usual
    ratio, for rounding errors, to the largest error (or to that error over the largest value).
    """

    name: str
    title: str
    order: int
    absolute: bool
    usual: float
    meaning: str


@dataclass(frozen=True)
class Limit:
    """The largest value of a metric that passes, and the reason for it."""

    value: float
    reason: str


METRICS: Final[tuple[Metric, ...]] = (
    Metric("max_abs", "max abs", 1, True, 1, "largest absolute error"),
    Metric("p99_abs", "p99 abs", 1, True, 0.5, "absolute error that 99 % of values stay below"),
    Metric("mean_abs", "mean abs", 1, True, 0.1, "mean absolute error"),
    Metric("max_rel", "max rel", 1, False, 1 / RELATIVE_GUARD, "largest relative error, guarded"),
    Metric("cosine_distance", "1 − cosine", 2, False, 10, "1 − cosine of the worst position"),
    Metric("kl", "KL", 2, True, 1, "KL divergence of the worst position, in nats"),
    Metric("margin", "margin", 0, True, 1, "lead of the expected token where another was chosen"),
    Metric(
        "effect_share",
        "error/effect",
        0,
        False,
        0,
        "largest error over the adapter's largest effect",
    ),
)
# Figures over all values together.
POOLED: Final = ("mean_abs", "p99_abs")
_TIE: Final = "two logits that may each be off by the largest error are a tie"
_HIDES: Final = "an error that is not far below the effect hides the adapter"
# The largest allowed ratio of the largest error to the adapter's largest effect. Coarse precisions
# have larger ratios: for an adapter with a small effect, 0.08 was measured on SmolLM2-135M in
# float16.
EFFECT_SHARE: Final[Mapping[str, float]] = {
    "fp32": 0.1, "fp16": 0.2, "bf16": 0.2, "int8": 0.2, "int4": 0.2,
}  # fmt: skip


def calibrated(precision: str, gap: Figures, *, scale: float) -> dict[str, Limit]:
    """Return the limits for a deployment in `precision`, from the gap measured on its inputs.

    `scale`: the largest absolute value in the reference.
    """

    def limit(metric: Metric) -> Limit:
        room, measured = ROOM**metric.order, float(getattr(gap, metric.name) or 0.0)
        count = LEAST[precision]
        few = sum(values for _, values in gap.distribution) < _FEW
        usual = 1.0 if few and metric.name in POOLED else metric.usual
        least = _roundings(metric, precision, count, scale, usual)
        if room * measured < least:
            reason = (
                f"{measured:.1e} was measured; {count} roundings of {scale:.2g} are always allowed"
            )
            return Limit(least, reason)
        return Limit(room * measured, f"{room:g} × {measured:.1e}, which {GAPS[precision]} here")

    return _limits(precision, limit)


def assumed(precision: str, *, scale: float) -> dict[str, Limit]:
    """Return limits without a measurement: `ASSUMED` roundings of the largest value, `scale`.

    Raises:
        UsageError: there are no assumed limits for `precision`.
    """
    if precision not in ASSUMED:
        raise UsageError(
            f"parity assumes no tolerances for {precision}, only for {', '.join(ASSUMED)}: give a"
            " PyTorch model, which they can be measured on"
        )
    count = ASSUMED[precision]
    reason = f"{count} roundings of values that reach {scale:.2g}, as SmolLM2-135M needs half of"

    def limit(metric: Metric) -> Limit:
        return Limit(_roundings(metric, precision, count, scale, metric.usual), reason)

    return _limits(precision, limit)


def _limits(precision: str, limit: Callable[[Metric], Limit]) -> dict[str, Limit]:
    found = {metric.name: limit(metric) for metric in METRICS if metric.order}
    found["margin"] = Limit(2 * found["max_abs"].value, _TIE)
    found["effect_share"] = Limit(EFFECT_SHARE[precision], _HIDES)
    return found


def _roundings(metric: Metric, precision: str, count: int, scale: float, usual: float) -> float:
    """Return the value of a metric for `count` rounding errors of values up to `scale`.

    `usual`: as in `Metric`.
    """
    error = usual * count * UNIT[precision] * (scale if metric.absolute else 1.0)
    return error if metric.order == 1 else error**2 / 2
