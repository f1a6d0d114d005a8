"""What a training run gave."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """A finished training run.

    `parameters` were trained on `examples`, of which `truncated` were longer than max_length, and
    on `tokens` in all, padding not counted. The adapter is that of `kept_step`, the last of `steps`
    or the best one (`keep_best`). `seconds` are this call's, from reading the data to the
    adapter on disk. `loss_before`, `loss_after`: mean loss on the "validation" split, or on the
    first "training" examples where there is none (`evaluated_on`); `accuracy_before`,
    `accuracy_after` of a classifier on the same.
    """

    adapter: Path
    digest: str
    base_digest: str
    parameters: int
    examples: int
    truncated: int
    steps: int
    kept_step: int
    tokens: int
    seconds: float
    evaluated_on: str
    loss_before: float
    loss_after: float
    accuracy_before: float | None = None
    accuracy_after: float | None = None
