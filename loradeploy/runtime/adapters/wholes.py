"""The adapters that those of a session are parts of, where a model is exported in parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loradeploy.adapter.adapter import Adapter
    from loradeploy.bundle.manifest import AdapterEntry, Manifest


@dataclass(frozen=True)
class Whole:
    """An adapter before its part for a bundle was taken: its digest.

    `split`: whether it changes what is in another bundle, too.
    """

    digest: str
    split: bool


def whole_of(entry: AdapterEntry | None) -> Whole | None:
    """The whole adapter of a manifest's entry, where that tells it."""
    if entry is None or entry.whole_digest is None:
        return None
    return Whole(entry.whole_digest, entry.split)


class Wholes:
    """What is known of the whole adapters: those that came with a bundle, and those read since.

    Adapters that differ in the other part alone have one digest here: their names tell which.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._in_parts = bool(manifest.other_part)
        self._known: dict[tuple[str, str], Whole] = {}  # by name and the digest of the part
        for name, entry in manifest.adapters.items():
            if (whole := whole_of(entry)) is not None:
                self._known[name, entry.digest] = whole

    def add(self, name: str, given: Adapter, own: Adapter) -> None:
        """Note that `own`, which `name` is to stand for, is the bundle's part of `given`."""
        if self._in_parts:
            whole = Whole(given.whole_digest, own.part_of is not None)
            self._known[name, own.digest] = whole

    def of(self, name: str, digest: str | None) -> Whole | None:
        """What `name` stands for while its part has this digest, where that is known."""
        return None if digest is None else self._known.get((name, digest))
