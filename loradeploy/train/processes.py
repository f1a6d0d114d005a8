"""The processes of a run: how many train together, which is which, and the signals that stop them.

`accelerate launch -m loradeploy train …`, or torchrun's: each process trains on its share of every
batch; the main one alone writes, prints and asks. Ctrl-C and SIGTERM end a run after the step at
hand, with a checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def process_count() -> int:
    """How many processes train together, by what the launcher has set."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Stop:
    """Whether a run is to stop: the signal that asked for it, 0 where none did."""

    signal: int = 0


@contextmanager
def stoppable() -> Iterator[Stop]:
    """While it lasts, the first signal is noted; a second one interrupts at once.

    Only Python's main thread is sent signals: in another the Stop stays as it is.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stop.signal:
            raise KeyboardInterrupt
        stop.signal = number

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopAfterStep(TrainerCallback):  # type: ignore[misc]
    """Ends the run with a checkpoint at the end of the step in which `stop` was noted."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Look whether any process was told to stop: all of them end at the same step."""
        if process_count() > 1:
            told = torch.tensor(self._stop.signal, device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self._stop.signal = int(told)
        if self._stop.signal and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
