"""Open the inference sessions of a bundle: its graph, and the encoder of an encoder-decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import GRAPH_NAME
from loradeploy.bundle.proof.requirement import CertificateMinimum
from loradeploy.runtime.devices.providers import Provider
from loradeploy.runtime.devices.table import known
from loradeploy.runtime.reading.graph import (
    check_graph,
    lacks_defaults,
    open_encoder,
    open_graph,
)
from loradeploy.runtime.reading.opening import OpenedBundle, open_bundle


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
    providers: Sequence[Provider] | None,
    options: onnxruntime.SessionOptions | None,
    *,
    required: bool | CertificateMinimum,
    capture: bool,
    operator: Path | None,
    map_weights: bool,
) -> OpenedSessions:
    """Open the sessions of the bundle at `bundle`, in one consistent state of its files.

    The arguments are those of `AdapterSession`, which lists the errors raised.
    """
    encoder: onnxruntime.InferenceSession | None = None

    def opened(place: Path, manifest: Manifest) -> onnxruntime.InferenceSession:
        nonlocal encoder
        graph = open_graph(
            place, providers, options, manifest, GRAPH_NAME, capture, operator, map_weights
        )
        check_graph(place, manifest, graph)
        encoder = open_encoder(place, providers, options, manifest, map_weights)
        return graph

    files, graph = open_bundle(
        bundle, opened, required, captured=capture, operator=operator is not None
    )
    return OpenedSessions(files, graph, encoder)
