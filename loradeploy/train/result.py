"""The result of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """A finished training run.

    `parameters`: number of trained parameters. `examples`: number of training examples, of which
    `truncated` were longer than max_length. `tokens`: tokens trained on, without padding.
    `kept_step`: the step of the saved adapter, the last of `steps` or the best one (`keep_best`).
    `seconds`: duration of this call, from reading the data to the adapter on disk. `loss_before`,
    `loss_after`: mean loss on the "validation" examples, or on the first "training" examples if
    there are none (`evaluated_on`); `accuracy_before`, `accuracy_after`: the accuracy on the same
    examples, if the task has one.
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
