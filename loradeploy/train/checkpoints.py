"""Checkpoints of a run that has not finished, in `OUTPUT-checkpoints`.

    run.json           what decides the run's result: the base, the data, the settings
    checkpoint-STEP/   a PEFT adapter, with the optimiser, schedule and random state beside it

They are there exactly as long as there is something to resume: a finished run removes them.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loradeploy.errors import UsageError, listed
from loradeploy.files import read_json, write_json

_RECORD: Final = "run.json"
# The file that transformers' Trainer writes last (5.23): with it, a checkpoint is whole.
_LAST_WRITTEN: Final = "trainer_state.json"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of the run that writes to `output`."""

    output: Path

    @property
    def place(self) -> Path:
        """The directory."""
        return self.output.with_name(f"{self.output.name}-checkpoints")

    def newest(self) -> Path | None:
        """The last whole checkpoint; one that a kill cut short is passed over."""
        found = [path for path in self.place.glob("checkpoint-*") if path.name[11:].isdecimal()]
        for path in sorted(found, key=lambda path: int(path.name[11:]), reverse=True):
            with contextlib.suppress(OSError, ValueError):
                json.loads((path / _LAST_WRITTEN).read_text(encoding="utf-8"))
                return path
        return None

    def check(self, *, resume: bool) -> None:
        """Raise UsageError where there is nothing to resume, or something that would be lost."""
        newest = self.newest()
        if resume and newest is None:
            raise UsageError(
                f"there is nothing to resume in {self.place}: train without --resume, and with"
                " --save-steps for checkpoints"
            )
        if not resume and newest is not None:
            raise UsageError(
                f"{newest} is left of a run that did not finish: go on from it with --resume, or"
                f" remove {self.place} to begin again"
            )

    def begin(self, record: Mapping[str, Any], *, resume: bool) -> None:
        """Hold a run that goes on against the `record` of its beginning, or keep a fresh run's.

        Raises:
            UsageError: the checkpoint is of a run with another base, data or settings.
        """
        file = self.place / _RECORD
        if resume:
            differences = list(_differences(read_json(file, error=UsageError), record))
            if differences:
                raise UsageError(
                    f"{self.place} is of another run and cannot be resumed: " + listed(differences)
                )
            return
        self.remove()  # a first checkpoint that was cut short
        write_json(file, record)

    def remove_unless_resumable(self) -> None:
        """Remove what is left of a run that wrote no checkpoint."""
        if self.newest() is None:
            self.remove()

    def remove(self) -> None:
        """Remove what a run writes; what else is in the directory stays."""
        for path in self.place.glob("checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)
        (self.place / _RECORD).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.place.rmdir()


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {then.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if then.get(name) != value
    ]
