"""Adapters of a model that is exported in two bundles, each of which has a part of an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loradeploy.adapter.files.digest import short
from loradeploy.errors import UsageError, shown
from loradeploy.printable import logger_of
from loradeploy.runtime.adapters.wholes import Whole, whole_of

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import AdapterEntry
    from loradeploy.runtime.session import AdapterSession

logger = logger_of(__name__)
# The names of the adapters that the decoder and the tower run; None is the base.
Names = tuple[str | None, str | None]


class ImageParts:
    """The sessions on a `decoder` and its `tower`, and which adapter each runs for a name.

    If an adapter has no weights for a part, that part runs the base. Which complete adapter a part
    belongs to is known by its digest, from a bundle's manifest or because the session read it. If
    it is unknown (bundles of earlier versions, .onnx_adapter files), a name must be loaded in both.

    Raises:
        UsageError: a name is used for parts of two adapters, the merged parts are of two adapters,
            or only one bundle has its part of a merged adapter.
    """

    def __init__(self, decoder: AdapterSession, tower: AdapterSession) -> None:
        self.decoder, self.tower = decoder, tower
        self._without: dict[
            str, AdapterSession
        ] = {}  # by adapter, the session that it does not change
        self._check_merged()
        for name in decoder.adapters.keys() & tower.adapters.keys():
            self._check_same(name, *(_known(each, name) for each in (decoder, tower)))

    def loaded(self, name: str, without: AdapterSession | None) -> None:
        """Record that `name` was loaded into all parts but `without`, which it does not change."""
        self._without.pop(name, None)
        if without is not None:
            self._without[name] = without

    def names(self, names: Sequence[Any], seeing: Sequence[bool]) -> list[Names]:
        """The adapters that the parts run for each of `names`. `seeing`: whether there are images.

        Raises:
            UsageError: a name that no part has, that a part lacks although it has weights for it,
                or that is used for two adapters; or a blend.
        """
        if any(isinstance(name, Mapping) for name in names):
            raise UsageError("blends of adapters are not supported with images: give a name")
        rows = list(zip(names, seeing, strict=True))
        found = {row: self._names(*row) for row in dict.fromkeys(rows)}
        return [found[row] for row in rows]

    def _names(self, name: str | None, sees: bool) -> Names:
        decoder, tower = self.decoder, self.tower
        if name is None:
            self._check_base()
            return None, None
        of_decoder, of_tower = _read(decoder, name), _read(tower, name)
        reader = self._name(decoder, tower, name, of_tower)
        if not sees:
            return reader, None
        seer = self._name(tower, decoder, name, of_decoder)
        if reader is not None and seer is not None:
            self._check_same(name, of_decoder, of_tower)
        return reader, seer

    def _name(
        self, session: AdapterSession, other: AdapterSession, name: str, whole: Whole | None
    ) -> str | None:
        """The adapter that `session` runs; `whole`: the complete adapter of `name` in `other`."""
        merged = whole_of(session.manifest.merged_adapter)
        if merged is not None and name in other.adapters:
            if whole is None or merged.digest != whole.digest:
                raise UsageError(
                    f"{session.path} has another adapter merged than {shown(name)} of {other.path}:"
                    " merge that one, or export without `merge`"
                )
            return None
        if self._without.get(name) is session and (whole is None or not whole.split):
            return None
        if name in session.adapters:
            return str(name)
        if whole is not None and not whole.split:
            return None
        because = "" if whole is None else f": {other.path} has only its own part of it"
        raise UsageError(
            f"the adapter {shown(name)} is not in {session.path}{because}: `load` it with this"
            " class, which gives each part its own"
        )

    def _check_same(self, name: str, of_decoder: Whole | None, of_tower: Whole | None) -> None:
        if of_decoder and of_tower and of_decoder.digest != of_tower.digest:
            raise UsageError(
                f"{shown(name)} stands for two adapters, {short(of_decoder.digest)} in"
                f" {self.decoder.path} and {short(of_tower.digest)} in {self.tower.path}: export"
                " both with one, or load one into both sessions (replace=True)"
            )

    def _merged(self) -> list[tuple[AdapterSession, AdapterSession, AdapterEntry]]:
        """The parts with a merged adapter, with the other part and the adapter."""
        pairs = ((self.decoder, self.tower), (self.tower, self.decoder))
        found = [(own, other, own.manifest.merged_adapter) for own, other in pairs]
        return [(own, other, entry) for own, other, entry in found if entry is not None]

    def _check_merged(self) -> None:
        merged = self._merged()
        if len(merged) == 2:
            first, second = (entry for _, _, entry in merged)
            both_known = first.whole_digest is not None and second.whole_digest is not None
            same = (
                first.whole_digest == second.whole_digest
                if both_known
                else first.digest == second.digest
            )
            if not same:
                raise UsageError(
                    f"{self.decoder.path} and {self.tower.path} have two adapters merged: merge one"
                    " into both"
                )
            return
        for own, other, entry in merged:
            if entry.whole_digest is None:
                logger.warning(
                    "%s has an adapter merged and %s has none: correct only if the adapter does"
                    " not change that part",
                    own.path,
                    other.path,
                )
            elif entry.split and _name_of(entry.whole_digest, other) is None:
                raise UsageError(
                    f"{own.path} has an adapter merged ({short(entry.whole_digest)}) that changes"
                    f" {other.path} too, which does not have it: merge it into both, or give it to"
                    " that one"
                )

    def _check_base(self) -> None:
        """Raise UsageError if only one part has its part of a merged adapter."""
        merged = self._merged()
        for own, other, entry in merged if len(merged) == 1 else ():
            if entry.split and entry.whole_digest is not None:
                name = _name_of(entry.whole_digest, other)
                advice = "load it there" if name is None else f"give its name there, {shown(name)}"
                raise UsageError(
                    f"{own.path} has an adapter merged that changes {other.path} too, which runs"
                    f" the base without an adapter: {advice}"
                )


def _known(session: AdapterSession, name: str) -> Whole | None:
    """The complete adapter of `name`, if known."""
    return session.wholes.of(name, session.adapters.get(name))


def _read(session: AdapterSession, name: str) -> Whole | None:
    """Like `_known`; an adapter that is only registered is read first."""
    if session.adapters.get(name, "") is None:
        with session.hold(name):
            pass
    return _known(session, name)


def _name_of(whole: str, session: AdapterSession) -> str | None:
    """The name of the session's part of the adapter with the digest `whole`."""
    for name in session.adapters:
        if (known := _known(session, name)) is not None and known.digest == whole:
            return name
    return None
