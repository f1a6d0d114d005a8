"""Open a bundle in one consistent state, even if its files are being replaced.

The state of the directory is recorded before the first file is read and compared after the last; if
it changed, everything is read again. A link to the directory is resolved once. Files that the
session reads later are compared with the recorded state too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import onnxruntime

from loradeploy.bundle.manifest import Manifest, check_is_bundle, read_manifest
from loradeploy.bundle.names import (
    ADAPTERS_DIRECTORY,
    CERTIFICATE_NAME,
    ENCODER_NAME,
    GRAPH_DATA_NAME,
    GRAPH_NAME,
    MANIFEST_NAME,
    SIGNATURE_NAME,
)
from loradeploy.bundle.proof.certificate import check_certificate, check_provider, is_covered
from loradeploy.bundle.proof.provider import ProviderFacts
from loradeploy.bundle.proof.requirement import CertificateMinimum
from loradeploy.errors import BundleError, LoraDeployError
from loradeploy.paths import resolved
from loradeploy.runtime.devices.facts import facts_of
from loradeploy.runtime.devices.table import known
from loradeploy.runtime.reading.graph import Opening
from loradeploy.runtime.reading.matching import check_graph, lacks_defaults
from loradeploy.snapshot import Snapshot

_ATTEMPTS: Final = 3
# Files that are read when a session opens, and never again.
_AT_ONCE: Final = (GRAPH_NAME, ENCODER_NAME, MANIFEST_NAME, CERTIFICATE_NAME, SIGNATURE_NAME)
_ADAPTERS: Final = f"{ADAPTERS_DIRECTORY}/"


@dataclass(frozen=True)
class OpenedBundle:
    """An opened bundle.

    `place`: its directory, with links resolved. `certified`: the digests of the adapters that may
    run; None allows any. `running`: the provider that runs the graph. `snapshot`: the state of its
    files.
    """

    place: Path
    manifest: Manifest
    certified: frozenset[str] | None
    running: ProviderFacts
    snapshot: Snapshot

    def check(self, folder: str | None = None) -> None:
        """Raise BundleError if files that are read later changed since the bundle was opened.

        `folder`: the part of the bundle to check, such as adapters/NAME; by default all but the
        adapters.
        """

        def wanted(name: str) -> bool:
            if folder is not None:
                return name.startswith((f"{folder}/", f"{folder}."))
            apart = name in (*_AT_ONCE, GRAPH_DATA_NAME) or name.startswith(_ADAPTERS)
            return not apart and is_covered(name, self.manifest)

        self._check(wanted)

    def check_data(self) -> None:
        """Like `check`, for the data file, from which weights of the base are read."""
        self._check(lambda name: name == GRAPH_DATA_NAME)

    def _check(self, wanted: Callable[[str], bool]) -> None:
        changed = self.snapshot.changed(wanted, strict=self.certified is not None)
        if changed is not None:
            raise BundleError(
                f"{self.place / changed} has changed since the session was opened: open a new"
                " session (a bundle is rolled out as a new directory, see docs/bundles.md)"
            )


@dataclass(frozen=True, eq=False)
class OpenedSessions:
    """The inference sessions of `bundle`. `encoder`: None if the model has no separate encoder."""

    bundle: OpenedBundle
    graph: onnxruntime.InferenceSession
    encoder: onnxruntime.InferenceSession | None

    @property
    def feeds_all(self) -> bool:
        """Whether every side input must be fed, because the graph was opened without defaults.

        That may be so even if the provider for which it was opened did not start.
        """
        started = self.graph.get_providers()
        return any(known(name).feeds_all for name in started) or lacks_defaults(
            self.bundle.manifest, self.graph
        )


def open_bundle(
    bundle: Path,
    opening: Opening,
    required: bool | CertificateMinimum,
    open_one: Callable[..., onnxruntime.InferenceSession],
) -> OpenedSessions:
    """Open the bundle at `bundle` in one consistent state of its files.

    `required`: as `require_certificate` of `AdapterSession`. `open_one`: opens a graph, as
    `open_graph`.

    Raises:
        BundleError: as `read_manifest`, `check_certificate` and `open_graph`; or it was written to
            at each of several attempts.
        UsageError: as `open_graph`.
    """
    check_is_bundle(bundle)  # so that the message has the path as it was given
    name: str | None = None
    for _ in range(_ATTEMPTS):
        place = resolved(bundle)
        check_is_bundle(place)
        snapshot = Snapshot.take(place)
        try:
            manifest = read_manifest(place)
            certificate = certified = None
            minimum = required if isinstance(required, CertificateMinimum) else None
            if required:
                certificate = check_certificate(place, manifest, minimum)
            graph, encoder = _open_graphs(place, opening, manifest, open_one)
            running = replace(
                facts_of(graph),
                captured=opening.capture_graphs,
                operator=opening.operator is not None,
            )
            if certificate is not None:
                certified = check_provider(bundle, manifest, certificate, running, minimum)
        except LoraDeployError:
            name = snapshot.changed(strict=True)
            if name is None:
                raise
            continue
        name = snapshot.changed(partial(is_covered, manifest=manifest), strict=True)
        if name is None:
            files = OpenedBundle(place, manifest, certified, running, snapshot)
            return OpenedSessions(files, graph, encoder)
        del graph, encoder
    raise BundleError(
        f"{bundle} is being written to ({name}): roll a bundle out as a new directory, and switch a"
        " link to it"
    )


def _open_graphs(
    place: Path,
    opening: Opening,
    manifest: Manifest,
    open_one: Callable[..., onnxruntime.InferenceSession],
) -> tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession | None]:
    """Open the graph, and the encoder of an encoder-decoder, which calls no operators."""
    graph = open_one(place, opening, manifest)
    check_graph(place, manifest, graph)
    if manifest.encoder is None:
        return graph, None
    plain = replace(opening, capture_graphs=False, operator=None)
    encoder = open_one(place, plain, manifest, ENCODER_NAME)
    check_graph(place, manifest, encoder, encoder=True)
    return graph, encoder
