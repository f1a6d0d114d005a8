"""Progress of a training run: a progress bar, and TensorBoard events."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loradeploy.errors import MissingDependencyError


class Progress(TrainerCallback):  # type: ignore[misc]
    """A bar with loss, tokens/s, memory and time left on stderr; disabled without a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, figures="")
        self._begin = 0.0
        self._tokens = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Show the bar."""
        self._begin, self._tokens = time.perf_counter(), state.num_input_tokens_seen
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Move the bar."""
        if logs and "loss" in logs:
            tokens = state.num_input_tokens_seen - self._tokens
            rate = tokens / (time.perf_counter() - self._begin)
            figures = f"loss {logs['loss']:.3f}, {rate:,.0f} tokens/s, {memory() / 1e9:.1f} GB"
            self._bar.update(self._task, completed=state.global_step, figures=figures)

    def close(self) -> None:
        """Stop the bar."""
        self._bar.stop()


def memory() -> int:
    """Bytes in use: peak GPU allocation, or the resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)


class TensorBoard(TrainerCallback):  # type: ignore[misc]
    """Writes every logged figure to TensorBoard events in `directory`.

    Raises:
        MissingDependencyError: tensorboard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingDependencyError(
                "`tensorboard` needs a package: pip install tensorboard"
            ) from None
        self._writer = SummaryWriter(str(directory))

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
        """Flush and close the events."""
        self._writer.close()
