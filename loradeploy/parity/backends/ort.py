"""The backends on ONNX Runtime: bundles in `AdapterSession`, and plain sessions."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import ENCODER_NAME, GRAPH_NAME, NATIVE_SUFFIX
from loradeploy.errors import ExportError, listed, listed_names
from loradeploy.parity.backends.onnx_model import Feeds, NotRunError, OnnxModel, Replayed
from loradeploy.parity.context import AdapterUnderTest, CheckContext
from loradeploy.parity.variants import session_options
from loradeploy.paths import resolved

if TYPE_CHECKING:
    import onnxruntime

    from loradeploy.bundle.adapter_inputs.base import BaseValues
    from loradeploy.runtime.arguments import Adapters
    from loradeploy.runtime.session import AdapterSession

# The first run is a plain one, the second is recorded, and later ones are replays.
_BEFORE_A_REPLAY: Final = 2


def side_inputs(context: CheckContext) -> Iterator[tuple[str | None, OnnxModel]]:
    """Yield the base and each adapter by itself, in an `AdapterSession`."""
    session = _open(context, context.bundle)
    _load(session, context.adapters)
    for name in (None, *(tested.name for tested in context.adapters)):
        yield name, _with_one(context, session, name)


def mixed_batch(context: CheckContext) -> Iterator[tuple[str | None, OnnxModel]]:
    """Yield one model of mixed batches in an `AdapterSession`: each row has its own adapter."""
    session = _open(context, context.bundle)
    _load(session, context.adapters)
    replayed = Replayed()
    yield (
        None,
        OnnxModel(
            context.manifest,
            partial(_each_row, session, replayed),
            session.empty_cache,
            known=context.cases.known,
            replayed=replayed,
        ),
    )


def native_adapter(context: CheckContext) -> Iterator[tuple[str | None, OnnxModel]]:
    """Yield each adapter as an .onnx_adapter file, activated in an onnxruntime session.

    Side inputs that an adapter does not have keep the graph's defaults of rank 0.

    Raises:
        NotRunError: the provider does not support such defaults; raised after the adapters that do
            not need them.
    """
    import onnxruntime

    from loradeploy.bundle.adapter_inputs.base import BundleBase
    from loradeploy.runtime.devices.table import known
    from loradeploy.runtime.reading.graph import Opening, open_graph

    rows = [known(name) for name, _ in context.providers]
    if names := [row.name for row in rows if not row.takes_defaults]:
        raise NotRunError(f"{names[0]} does not support defaults of side inputs")
    manifest = context.manifest
    files = [GRAPH_NAME] if manifest.encoder is None else [GRAPH_NAME, ENCODER_NAME]
    sessions = [
        open_graph(context.bundle, Opening(context.providers, _options(context)), name=name)
        for name in files
    ]
    base = BundleBase(context.bundle, context.manifest)
    ranks = [row.name for row in rows if not row.takes_rank_zero]
    left_out: list[str] = []
    for tested in context.adapters:
        if ranks and (lacking := _lacking(tested, context.manifest)):
            left_out.append(f"{tested.name} has no factors for {listed_names(lacking, 2)}")
            continue
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(os.fspath(native_file(context, tested, base)))
        active = onnxruntime.RunOptions()
        active.add_active_adapter(adapter)
        yield (
            tested.name,
            OnnxModel(
                context.manifest, partial(_activated, sessions, active), known=context.cases.known
            ),
        )
    if left_out:
        raise NotRunError(
            f"{listed(left_out)}, whose default of rank 0 {ranks[0]} does not support"
            " (`AdapterSession` feeds zeros there)"
        )


def _lacking(tested: AdapterUnderTest, manifest: Manifest) -> list[str]:
    """Return the target modules of the bundle for which the adapter has no factors."""
    return [t.module for t in manifest.targets if t.module not in tested.adapter.factors]


def native_file(context: CheckContext, tested: AdapterUnderTest, base: BaseValues) -> Path:
    """Return the adapter's .onnx_adapter file: the bundle's, or one written for the check."""
    from loradeploy.bundle.adapter_inputs.native import write_onnx_adapter

    if tested.native is not None:
        return tested.native
    file = context.scratch / f"{tested.name}{NATIVE_SUFFIX}"
    if not file.is_file():
        write_onnx_adapter(tested.adapter, context.manifest, file, base)
    return file


def merged_graph(context: CheckContext) -> Iterator[tuple[str | None, OnnxModel]]:
    """Yield each adapter merged into the graph: the merged bundle, or one made for the check.

    Raises:
        NotRunError: the graph cannot be merged into.
    """
    for tested in context.adapters:
        with merged_bundle(context, tested) as bundle:
            session = _open(context, bundle)
            yield tested.name, _with_one(context, session, None)
            del session


def _with_one(context: CheckContext, session: AdapterSession, name: str | None) -> OnnxModel:
    """Return `session` as a backend with the adapter `name` for all rows."""
    replayed = Replayed()
    return OnnxModel(
        session.manifest,
        partial(_all_rows, session, replayed, name),
        session.empty_cache,
        known=context.cases.known,
        session=session,
        replayed=replayed,
    )


def _all_rows(
    session: AdapterSession,
    replayed: Replayed,
    adapter: str | None,
    outputs: Sequence[str],
    feeds: Feeds,
    adapters: object,
    buffers: Mapping[str, onnxruntime.OrtValue] | None = None,
) -> Sequence[Any]:
    """Run an AdapterSession with one adapter for all rows."""
    return _each_row(session, replayed, outputs, feeds, adapter, buffers)


def _each_row(
    session: AdapterSession,
    replayed: Replayed,
    outputs: Sequence[str],
    feeds: Feeds,
    adapters: Adapters,
    buffers: Mapping[str, onnxruntime.OrtValue] | None = None,
) -> Sequence[Any]:
    """Run an AdapterSession; if it captures runs, repeat the run so that the last one is a replay.

    `replayed` counts whether it was: a decoder's prompts are not captured, nor are runs beyond the
    largest number of recordings.
    """
    for _ in range(0 if session.capture_statistics is None else _BEFORE_A_REPLAY):
        session.run_with_ort_values(outputs, feeds, adapters, buffers=buffers)
    before = session.capture_statistics
    found = session.run_with_ort_values(outputs, feeds, adapters, buffers=buffers)
    if before is not None and (after := session.capture_statistics) is not None:
        replayed.runs += 1
        replayed.replays += after.replayed - before.replayed
    return found


def _activated(
    sessions: Sequence[Any], active: Any, outputs: Sequence[str], feeds: Feeds, adapters: object
) -> Sequence[Any]:
    """Run the one of `sessions` that has the outputs, with the adapter active in its options."""
    session, *others = sessions
    for other in others:
        if outputs[0] in {node.name for node in other.get_outputs()}:
            session = other
    values: Sequence[Any] = session.run(list(outputs), dict(feeds), active)
    return values


@contextmanager
def merged_bundle(context: CheckContext, tested: AdapterUnderTest) -> Iterator[Path]:
    """Yield the context's merged bundle, or one made for the check.

    Raises:
        NotRunError: the graph cannot be merged into.
    """
    if context.merged:
        yield context.bundle
        return
    from loradeploy.export.adapters.own_weights import QuantizedTieError
    from loradeploy.export.api import export
    from loradeploy.lora.quiet import quiet_loradeploy

    path = context.scratch / f"merged-{tested.name}"
    try:
        try:
            with quiet_loradeploy():  # log lines would be about this merge, not the user's bundle
                export(context.bundle, path, adapters={tested.name: tested.path}, merge=True)
        except (ExportError, QuantizedTieError) as problem:
            raise NotRunError(str(problem)) from None
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _open(context: CheckContext, bundle: Path) -> AdapterSession:
    from loradeploy.runtime.session import AdapterSession

    return AdapterSession(
        bundle,
        context.providers,
        session_options=_options(context),
        check_device=False,
        capture_graphs=context.captured,
        operator=context.operator,
    )


def _options(context: CheckContext) -> onnxruntime.SessionOptions:
    from loradeploy.bundle.proof.provider import WEIGHTS_AT

    options = session_options(context.variant)
    if context.weights is not None:
        options.add_session_config_entry(WEIGHTS_AT, os.fspath(resolved(context.weights)))
    return options


def _load(session: AdapterSession, adapters: Sequence[AdapterUnderTest]) -> None:
    """Load the adapters that are not in the bundle; the session knows the others."""
    for tested in adapters:
        if tested.name not in session.adapters:
            session.load(tested.name, tested.path)
