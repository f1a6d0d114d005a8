"""Processes of a distributed run, and the signals that stop it.

With `accelerate launch -m loradeploy train …` or torchrun, each process trains on its share of
every batch, and only the main process writes and prints. Ctrl-C, SIGTERM and SIGHUP end a run with
a checkpoint after the current step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loradeploy.signals import handling_endings


def process_count() -> int:
    """The number of processes of the run, from the launcher's WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass
class Stop:
    """The signal that requested the run to stop, or 0."""

    signal: int = 0


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Inside the context, the first signal sets the Stop; a second one interrupts immediately.

    In another thread than the main one, the Stop is never set.
    """
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if stop.signal:
            raise KeyboardInterrupt
        stop.signal = number

    with handling_endings(note):
        yield stop


class StopAfterStep(TrainerCallback):  # type: ignore[misc]
    """Ends the run with a checkpoint at the end of the step in which `stop` was set."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop all processes at the same step if any of them received a signal."""
        if process_count() > 1:
            signal_number = torch.tensor(self._stop.signal, device=args.device)
            torch.distributed.all_reduce(signal_number, torch.distributed.ReduceOp.MAX)
            self._stop.signal = int(signal_number)
        if self._stop.signal and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
