"""Open the inference sessions of a bundle: its graph, and the encoder of an encoder-decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import ENCODER_NAME, GRAPH_NAME
from loradeploy.bundle.proof.requirement import CertificateMinimum
from loradeploy.runtime.devices.table import known
from loradeploy.runtime.reading.matching import check_graph, lacks_defaults
from loradeploy.runtime.reading.opening import OpenedBundle, open_bundle

# Opens a graph of a bundle: (directory, manifest, name of the file) → session.
OpenGraph = Callable[[Path, Manifest, str], onnxruntime.InferenceSession]


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


def open_sessions(
    bundle: Path,
    open_graph: OpenGraph,
    *,
    required: bool | CertificateMinimum,
    capture: bool,
    operator: bool,
) -> OpenedSessions:
    """Open the sessions of the bundle at `bundle`, in one consistent state of its files.

    `capture`, `operator`: whether `open_graph` records runs, and uses the operators' library.
    The other arguments are those of `AdapterSession`, which lists the errors raised.
    """
    encoder: onnxruntime.InferenceSession | None = None

    def opened(place: Path, manifest: Manifest) -> onnxruntime.InferenceSession:
        nonlocal encoder
        graph = open_graph(place, manifest, GRAPH_NAME)
        check_graph(place, manifest, graph)
        if manifest.encoder is not None:
            encoder = open_graph(place, manifest, ENCODER_NAME)
            check_graph(place, manifest, encoder, encoder=True)
        return graph

    files, graph = open_bundle(bundle, opened, required, captured=capture, operator=operator)
    return OpenedSessions(files, graph, encoder)
