"""Checkpoints of a run that has not finished, in `OUTPUT-checkpoints`.

    run.json           what decides the run's result: the base, the data, the settings
    checkpoint-STEP/   a PEFT adapter, with the optimizer, schedule and random state beside it
        checkpoint.json    its step, the digest of run.json's contents, and the size and digest of
                           every file

A checkpoint is written under another name and renamed when it is whole; before a run goes on from
it, it is compared with its own checkpoint.json. They are there exactly as long as there is
something to resume: a finished run removes them.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loradeploy.adapter.config import CONFIG_NAME
from loradeploy.adapter.digest import bytes_digest, file_digest
from loradeploy.adapter.peft import WEIGHTS_NAME
from loradeploy.errors import UsageError, listed
from loradeploy.files import read_json, write_json
from loradeploy.printable import logger_of
from loradeploy.writing import atomic_directory, check_no_writer, only_writer

logger = logger_of(__name__)

_RUN: Final = "run.json"
_RECORD: Final = "checkpoint.json"
# How many are kept: one may turn out to be damaged.
_KEPT: Final = 2
# Beside a checkpoint's adapter: the best one so far.
BEST: Final = "best"
_ADAPTER: Final = (CONFIG_NAME, WEIGHTS_NAME)
# What every checkpoint holds: without one of them a run would go on otherwise than it began.
_NEEDED: Final = (*_ADAPTER, "trainer_state.json", "optimizer*", "scheduler.pt", "rng_state*.pth")
# What a checkpoint may hold, also one without a record of it (transformers' Trainer 5.23).
_OWN: Final = (
    *(_RECORD, "trainer_state.json", "optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
    *_ADAPTER,
    *(f"{BEST}/{name}" for name in _ADAPTER),
)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of the run that writes to `output`."""

    output: Path

    @property
    def place(self) -> Path:
        """The directory."""
        return self.output.with_name(f"{self.output.name}-checkpoints")

    def present(self) -> list[Path]:
        """What stands under the name of a checkpoint, whole or not, the newest first."""
        found = [path for path in self.place.glob("checkpoint-*") if path.name[11:].isdecimal()]
        return sorted(filter(Path.is_dir, found), key=_step, reverse=True)

    def newest(self) -> Path | None:
        """The last checkpoint of which no file is missing or cut short."""
        return next(
            (path for path in self.present() if _damage(path, thorough=False) is None), None
        )

    def check(self, *, resume: bool) -> None:
        """Raise UsageError where there is nothing to resume, or something that would be lost."""
        check_no_writer(self.place)
        self._check_found(resume=resume)

    def _check_found(self, *, resume: bool) -> None:
        found = self.present()
        if resume and not found:
            self.remove()  # what a run left that was killed at its very end
            raise UsageError(
                f"there is nothing to resume in {self.place}: train without `resume`, and with"
                " `save_steps` for checkpoints"
            )
        if not resume and found:
            raise UsageError(
                f"{found[0]} is left of a run that did not finish: go on from it with `resume`, or"
                f" remove {self.place} to begin again"
            )

    @contextlib.contextmanager
    def begun(self, record: Mapping[str, Any], *, resume: bool) -> Iterator[Path | None]:
        """Keep the `record` of a fresh run, or yield the checkpoint from which one goes on.

        Meanwhile no other process writes here. What a run leaves that wrote no checkpoint goes.

        Raises:
            UsageError: the checkpoints are of a run with another base, data or settings, or all
                of them are damaged; or another process writes here.
            OutputError: the record cannot be written.
        """
        with only_writer(self.place):
            self._check_found(resume=resume)  # another run may have been here since
            newest = self._resumable(record) if resume else None
            self._sweep()
            if newest is None:
                write_json(self.place / _RUN, record)
            try:
                yield newest
            finally:
                if not self.present():
                    self.remove()

    @contextlib.contextmanager
    def writing(self, step: int, record: Mapping[str, Any]) -> Iterator[Path]:
        """Yield a directory that becomes the checkpoint of `step`, in a run that has `record`.

        Of those before it one is left.

        Raises:
            OutputError: it cannot be written. The ones before it are all there.
        """
        target = self.place / f"checkpoint-{step}"
        if target.is_dir():  # damaged, or the run would have gone on from it
            _remove(target)
        with atomic_directory(target, marker=_RECORD) as place:
            yield place
            files = {name: _facts(place / name, sync=True) for name in _files(place)}
            write_json(place / _RECORD, {"step": step, "run": _identity(record), "files": files})
        self._tidy(target)

    def remove(self) -> None:
        """Remove what a run writes; what else is in the directory stays."""
        self._tidy(None)
        (self.place / _RUN).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.place.rmdir()

    def _resumable(self, record: Mapping[str, Any]) -> Path:
        """The newest checkpoint that is whole; those that are damaged are passed over, aloud."""
        file = self.place / _RUN
        then = read_json(file, error=UsageError)
        if not then.keys() >= record.keys():
            raise UsageError(
                f"{file} was written by another version of loradeploy: end the run with that one,"
                f" or remove {self.place} to begin again"
            )
        differences = _differences(then, record)
        if differences:
            raise UsageError(
                f"{self.place} is of another run and cannot be resumed: " + listed(differences)
            )
        found = self.present()
        damages: list[str] = []
        for path in found:
            damage = _damage(path, thorough=True)
            if damage is None:
                if _read(path)["run"] != _identity(record):
                    raise UsageError(
                        f"{path} is of another run than the one that {file} names: remove it"
                    )
                if damages:
                    logger.warning(
                        "%s is damaged (%s): the run goes on from %s", found[0], damages[0], path
                    )
                return path
            damages.append(damage)
        what = listed([f"{p} {damage}" for p, damage in zip(found, damages, strict=True)], 2)
        raise UsageError(f"no checkpoint is whole ({what}): remove {self.place} to begin again")

    def _tidy(self, newest: Path | None) -> None:
        """Remove all but `newest` and the whole one before it, and what killed writers left."""
        whole = [path for path in self.present() if newest and _step(path) <= _step(newest)]
        kept = [path for path in whole if path == newest or not _damage(path, thorough=False)]
        for path in self.present():
            if path not in kept[:_KEPT]:
                _remove(path)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what killed writers left."""
        for path in self.place.glob(".checkpoint-*.partial"):
            shutil.rmtree(path, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _identity(record: Mapping[str, Any]) -> str:
    """The digest of what decides a run's result."""
    text = json.dumps(record, sort_keys=True, ensure_ascii=False)
    return bytes_digest(text.encode())


def _files(directory: Path) -> list[str]:
    """The names of all files in `directory`, relative and with "/"."""
    found = (Path(place, name) for place, _, names in os.walk(directory) for name in names)
    return sorted(path.relative_to(directory).as_posix() for path in found)


def _facts(file: Path, *, sync: bool = False) -> dict[str, Any]:
    if sync:  # a disk may refuse what it took, as late as here
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
    return {"bytes": file.stat().st_size, "digest": file_digest(file)}


def _read(checkpoint: Path) -> dict[str, Any]:
    return read_json(checkpoint / _RECORD, error=UsageError)


def _damage(checkpoint: Path, *, thorough: bool) -> str | None:
    """What is wrong with `checkpoint`, None where it is what was written; `thorough`: byte by byte.

    None of its files is read otherwise before.
    """
    if not (checkpoint / _RECORD).is_file():
        return f"has no {_RECORD}"
    try:
        record = _read(checkpoint)
        files = record["files"]
        if record["step"] != _step(checkpoint):
            return f"is of step {record['step']!r}"
        for kind in _NEEDED:
            if not fnmatch.filter(files, kind):
                return f"has a {_RECORD} without {kind}"
        there = set(_files(checkpoint))
        for name, facts in files.items():
            file = checkpoint / name
            if name not in there or file.is_symlink() or not file.is_file():
                return f"has no file {name}"
            size = file.stat().st_size
            if size != facts["bytes"]:
                return f"has {size:,} bytes of {facts['bytes']:,} of {name}"
            if thorough and _facts(file) != facts:
                return f"has other bytes in {name} than were written"
    except UsageError as problem:
        return str(problem)
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as problem:
        return f"has a {_RECORD} that cannot be used ({type(problem).__name__})"
    return None


def _remove(checkpoint: Path) -> None:
    """Remove what a run wrote into `checkpoint`, and the directory where nothing else is in it."""
    own = set()
    with contextlib.suppress(UsageError, KeyError, TypeError):
        own = set(_read(checkpoint)["files"])
    # Renamed first, so that a kill leaves it whole or hidden.
    hidden = checkpoint.with_name(f".{checkpoint.name}.{secrets.token_hex(8)}.partial")
    others = [
        name
        for name in _files(checkpoint)
        if name not in own and not any(fnmatch.fnmatchcase(name, kind) for kind in _OWN)
    ]
    if not others:
        with contextlib.suppress(OSError):
            checkpoint.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)
        return
    for name in set(_files(checkpoint)).difference(others):
        with contextlib.suppress(OSError):
            (checkpoint / name).unlink()


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {then.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if then.get(name) != value
    ]
