"""Checkpoints of a run that has not finished, in `OUTPUT-checkpoints`.

    run.json           what determines the run's result: the base, the data, the settings
    checkpoint-STEP/   a PEFT adapter, the optimizer, schedule and random state
        checkpoint.json    its step, the digest of run.json's contents, and the size and digest of
                           every file

A checkpoint is written under a temporary name and renamed when it is complete. Before a run resumes
from it, its files are compared with its checkpoint.json. A finished run removes its checkpoints.
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

from loradeploy.adapter.files.digest import bytes_digest, file_digest
from loradeploy.adapter.files.peft import WEIGHTS_NAME
from loradeploy.errors import UsageError, listed
from loradeploy.files import read_json, write_json
from loradeploy.names import ADAPTER_CONFIG_NAME
from loradeploy.printable import logger_of
from loradeploy.writing import atomic_directory, check_no_writer, only_writer

logger = logger_of(__name__)

_RUN: Final = "run.json"
_RECORD: Final = "checkpoint.json"
# The number of checkpoints to keep, in case one is damaged.
_KEPT: Final = 2
# The directory in a checkpoint of the best adapter so far.
BEST: Final = "best"
_ADAPTER: Final = (ADAPTER_CONFIG_NAME, WEIGHTS_NAME)
# Files of every checkpoint, without any of which a resumed run would differ.
_NEEDED: Final = (*_ADAPTER, "trainer_state.json", "optimizer*", "scheduler.pt", "rng_state*.pth")
# Files that a run writes into a checkpoint, including those of Trainer (transformers 5.23).
_WRITTEN: Final = (
    *(_RECORD, "trainer_state.json", "optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
    *_ADAPTER,
    *(f"{BEST}/{name}" for name in _ADAPTER),
)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of the run that writes to `output`."""

    output: Path

    @property
    def directory(self) -> Path:
        """The directory of all checkpoints."""
        return self.output.with_name(f"{self.output.name}-checkpoints")

    def present(self) -> list[Path]:
        """All directories named as checkpoints, intact or not, the newest first."""
        found = [path for path in self.directory.glob("checkpoint-*") if path.name[11:].isdecimal()]
        return sorted(filter(Path.is_dir, found), key=_step, reverse=True)

    def newest(self) -> Path | None:
        """The newest checkpoint without missing or truncated files."""
        return next(
            (path for path in self.present() if _damage(path, thorough=False) is None), None
        )

    def check(self, *, resume: bool) -> None:
        """Raise UsageError if nothing can be resumed, or a new run would overwrite checkpoints."""
        check_no_writer(self.directory)
        self._check_found(resume=resume)

    def _check_found(self, *, resume: bool) -> None:
        found = self.present()
        if resume and not found:
            self.remove()  # left by a run that was killed while it finished
            raise UsageError(
                f"nothing to resume in {self.directory}: train without `resume`, and with"
                " `save_steps` for checkpoints"
            )
        if not resume and found:
            raise UsageError(
                f"{found[0]} is from a run that did not finish: continue it with `resume`, or"
                f" remove {self.directory} to start over"
            )

    @contextlib.contextmanager
    def begun(self, record: Mapping[str, Any], *, resume: bool) -> Iterator[Path | None]:
        """Write the `record` of a new run, or yield the checkpoint that a resumed run starts from.

        Locks the directory against other processes. On exit, removes it if it has no checkpoint.

        Raises:
            UsageError: the checkpoints are of a run with another base, data or settings, or all
                of them are damaged; or another process is writing here.
            OutputError: the record cannot be written.
        """
        with only_writer(self.directory):
            self._check_found(resume=resume)  # another run may have changed it
            newest = self._resumable(record) if resume else None
            self._sweep()
            if newest is None:
                write_json(self.directory / _RUN, record)
            try:
                yield newest
            finally:
                if not self.present():
                    self.remove()

    @contextlib.contextmanager
    def writing(self, step: int, record: Mapping[str, Any]) -> Iterator[Path]:
        """Yield a directory that becomes the checkpoint of `step`, in a run that has `record`.

        One earlier checkpoint is kept.

        Raises:
            OutputError: it cannot be written. Earlier checkpoints are kept.
        """
        target = self.directory / f"checkpoint-{step}"
        if target.is_dir():  # damaged, or the run would have resumed from it
            _remove(target)
        with atomic_directory(target, marker=_RECORD) as directory:
            yield directory
            files = {name: _facts(directory / name, sync=True) for name in _files(directory)}
            write_json(
                directory / _RECORD, {"step": step, "run": _identity(record), "files": files}
            )
        self._tidy(target)

    def remove(self) -> None:
        """Remove the files of a run; other files of the directory are kept."""
        self._tidy(None)
        (self.directory / _RUN).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def _resumable(self, record: Mapping[str, Any]) -> Path:
        """The newest intact checkpoint; damaged ones are skipped with a warning."""
        file = self.directory / _RUN
        before = read_json(file, error=UsageError)
        if not before.keys() >= record.keys():
            raise UsageError(
                f"{file} was written by another version of loradeploy: finish the run with that"
                f" version, or remove {self.directory} to start over"
            )
        differences = _differences(before, record)
        if differences:
            raise UsageError(
                f"{self.directory} is of another run and cannot be resumed: " + listed(differences)
            )
        found = self.present()
        damages: list[str] = []
        for path in found:
            damage = _damage(path, thorough=True)
            if damage is None:
                if _read(path)["run"] != _identity(record):
                    raise UsageError(f"{path} is not of the run that {file} describes: remove it")
                if damages:
                    logger.warning(
                        "%s is damaged (%s): resuming from %s", found[0], damages[0], path
                    )
                return path
            damages.append(damage)
        what = listed([f"{p} {damage}" for p, damage in zip(found, damages, strict=True)], 2)
        raise UsageError(f"no checkpoint is intact ({what}): remove {self.directory} to start over")

    def _tidy(self, newest: Path | None) -> None:
        """Remove all but `newest` and the intact one before it, and leftovers of killed writers."""
        earlier = [path for path in self.present() if newest and _step(path) <= _step(newest)]
        kept = [path for path in earlier if path == newest or not _damage(path, thorough=False)]
        for path in self.present():
            if path not in kept[:_KEPT]:
                _remove(path)
        self._sweep()

    def _sweep(self) -> None:
        """Remove leftovers of killed writers."""
        for path in self.directory.glob(".checkpoint-*.partial"):
            shutil.rmtree(path, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _identity(record: Mapping[str, Any]) -> str:
    """The digest of a run's record."""
    text = json.dumps(record, sort_keys=True, ensure_ascii=False)
    return bytes_digest(text.encode())


def _files(directory: Path) -> list[str]:
    """The relative paths, with "/", of all files in `directory`."""
    found = (Path(parent, name) for parent, _, names in os.walk(directory) for name in names)
    return sorted(path.relative_to(directory).as_posix() for path in found)


def _facts(file: Path, *, sync: bool = False) -> dict[str, Any]:
    if sync:  # some write errors are reported only here
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
    return {"bytes": file.stat().st_size, "digest": file_digest(file)}


def _read(checkpoint: Path) -> dict[str, Any]:
    return read_json(checkpoint / _RECORD, error=UsageError)


def _damage(checkpoint: Path, *, thorough: bool) -> str | None:
    """Why `checkpoint` is damaged, or None. `thorough`: compare the digests of all files.

    No file of a checkpoint is used before this check.
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
        existing = set(_files(checkpoint))
        for name, facts in files.items():
            file = checkpoint / name
            if name not in existing or file.is_symlink() or not file.is_file():
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
    """Remove the files of a run in `checkpoint`, and the directory if it has no others."""
    recorded = set()
    with contextlib.suppress(UsageError, KeyError, TypeError):
        recorded = set(_read(checkpoint)["files"])
    # Renamed first, so that after a kill it is either complete or hidden.
    hidden = checkpoint.with_name(f".{checkpoint.name}.{secrets.token_hex(8)}.partial")
    others = [
        name
        for name in _files(checkpoint)
        if name not in recorded and not any(fnmatch.fnmatchcase(name, kind) for kind in _WRITTEN)
    ]
    if not others:
        with contextlib.suppress(OSError):
            checkpoint.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)
        return
    for name in set(_files(checkpoint)).difference(others):
        with contextlib.suppress(OSError):
            (checkpoint / name).unlink()


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {before.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]
