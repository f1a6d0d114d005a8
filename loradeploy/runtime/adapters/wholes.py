"""The complete adapters of a model that is exported in parts, one bundle for each part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loradeploy.adapter.adapter import Adapter
    from loradeploy.bundle.manifest import AdapterEntry, Manifest


@dataclass(frozen=True)
class Whole:
    """An adapter before it was split between bundles: its digest.

    `split`: whether it also changes the part in another bundle.
    """

    digest: str
    split: bool


def whole_of(entry: AdapterEntry | None) -> Whole | None:
    """The complete adapter of a manifest's entry, if the entry has its digest."""
    if entry is None or entry.whole_digest is None:
        return None
    return Whole(entry.whole_digest, entry.split)


class Wholes:
    """The known complete adapters: of those in the bundle, and of those read since.

    Adapters that differ only in the other part have the same digest here, so they are identified by
    their names too.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._in_parts = bool(manifest.other_part)
        self._known: dict[tuple[str, str], Whole] = {}  # by name and the digest of the part
        for name, entry in manifest.adapters.items():
            if (whole := whole_of(entry)) is not None:
                self._known[name, entry.digest] = whole

    def add(self, name: str, given: Adapter, own: Adapter) -> None:
        """Record that `own`, to be loaded as `name`, is the bundle's part of `given`."""
        if self._in_parts:
            whole = Whole(given.whole_digest, own.part_of is not None)
            self._known[name, own.digest] = whole

    def of(self, name: str, digest: str | None) -> Whole | None:
        """The complete adapter of `name` while its part has this digest, if known."""
        return None if digest is None else self._known.get((name, digest))
