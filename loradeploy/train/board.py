"""A run's figures as TensorBoard events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loradeploy.errors import MissingDependencyError


class Board(TrainerCallback):  # type: ignore[misc]
    """Writes every logged figure to TensorBoard events in `place`.

    Raises:
        MissingDependencyError: tensorboard is not installed.
    """

    def __init__(self, place: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingDependencyError(
                "the setting tensorboard needs the package: pip install tensorboard"
            ) from None
        self._writer = SummaryWriter(str(place))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write the figures of a step."""
        for name, value in (logs or {}).items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, state.global_step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
