"""The files of a bundle under test: their digests, and whether they change during the check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loradeploy.adapter.files.digest import file_digest, short
from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import GRAPH_DATA_NAME, GRAPH_NAME
from loradeploy.bundle.proof.certificate import covered, digests
from loradeploy.errors import BundleError
from loradeploy.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class BundleFiles:
    """The digests of a bundle's files that can affect results.

    `graph`, `data`: those of the graph file and of its data file (None if there is none).
    `others`: by name. `snapshot`: the state of all files before the first was read.
    """

    graph: str
    data: str | None
    others: Mapping[str, str]
    snapshot: Snapshot

    @classmethod
    def read(cls, manifest: Manifest, snapshot: Snapshot) -> BundleFiles:
        """Read the files of the bundle `snapshot.directory`.

        Raises:
            BundleError: a file of the graph is missing, or has changed since the export.
        """
        bundle = snapshot.directory
        graph = _digest(snapshot, GRAPH_NAME, manifest.graph_digest)
        if graph is None:
            raise BundleError(_missing(snapshot, GRAPH_NAME))
        data = _digest(snapshot, GRAPH_DATA_NAME, manifest.data_digest)
        own = (GRAPH_NAME, GRAPH_DATA_NAME)
        others = digests(bundle, [name for name in covered(bundle, manifest) if name not in own])
        return cls(graph, data, others, snapshot)

    def check_unchanged(self) -> None:
        """Raise BundleError if one of the files was written to since the snapshot."""
        names = {GRAPH_NAME, GRAPH_DATA_NAME, *self.others}
        changed = self.snapshot.changed(names.__contains__)
        if changed is not None:
            raise BundleError(
                f"{self.snapshot.directory / changed} was written to while it was checked: check it"
                " again"
            )


def _digest(snapshot: Snapshot, name: str, recorded: str | None) -> str | None:
    """The digest of the file `name`, which is to be `recorded`; None if it does not exist."""
    file = snapshot.directory / name
    if not file.is_file():
        if recorded is not None:
            raise BundleError(_missing(snapshot, name))
        return None
    digest = file_digest(file)
    if recorded not in (None, digest):
        raise BundleError(
            f"{file} has changed since the export (digest {short(digest)}, the manifest says"
            f" {short(recorded)}): export again"
        )
    return digest


def _missing(snapshot: Snapshot, name: str) -> str:
    return f"{snapshot.directory} has no {name}: export again"
