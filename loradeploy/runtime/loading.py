"""Load, replace and unload adapters by name: factors and text settings change as one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loradeploy.errors import AdapterError, UsageError
from loradeploy.runtime.adapters.bank import AdapterBank
from loradeploy.runtime.adapters.reading import AdapterReader
from loradeploy.runtime.adapters.resident import Once, Read
from loradeploy.runtime.text.sides import TextSides, files_for_texts
from loradeploy.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class AdapterLoader:
    """Loads adapters for one session. `bank`: has their factors. `texts`: has their text settings.

    The methods and their errors are those of `AdapterSession`.
    """

    reader: AdapterReader
    bank: AdapterBank
    texts: TextSides

    def load(self, name: str, path: Path | None, *, replace: bool) -> str:
        """Load the adapter at `path`, or that of the bundle, as `name` and return its digest."""
        read: Read = partial(self.reader.own, name)
        files: Snapshot | None = None
        if path is not None:
            read, files = partial(self.reader.given, name, path), files_for_texts(path)
        once = Once(read)  # read before taking the lock
        if files is not None and (changed := files.changed(strict=True)) is not None:
            raise AdapterError(
                f"{files.directory / changed} was written to while the adapter was read: try again"
            )
        with self.texts.writing(name):
            if replace or name not in self.bank or not self.texts.knows(name):

                def add() -> str:
                    digest = self.bank.add(name, once, replace=replace).digest
                    self.texts.put(name, path, files)
                    return digest

                return self.texts.change(name, add)
            digest = self.bank.add(name, once).digest
            if not self.texts.has_same_texts_as(name, path):
                raise UsageError(
                    f"the adapter {name!r} is loaded with another tokenizer, chat template or"
                    " settings of generation: unload it first, or replace it (replace=True)"
                )
            return digest

    def register(self, name: str, path: Path, *, replace: bool) -> None:
        """Register the adapter at `path` as `name`; it is read when a run first uses it."""
        if not path.exists():
            raise AdapterError(f"{path} does not exist: give a PEFT directory or an adapter's file")

        def add() -> None:
            self.bank.register(name, partial(self.reader.given, name, path), replace=replace)
            self.texts.put(name, path)

        with self.texts.writing(name):
            self.texts.change(name, add)

    def unload(self, name: str) -> None:
        """Unload the adapter `name`, and wait until the runs that use it have ended."""
        count = self.texts.count(name)
        self.bank.remove(name)
        with self.texts.writing(name):
            if name not in self.bank:  # else it was loaded again meanwhile
                self.texts.remove(name, count)
