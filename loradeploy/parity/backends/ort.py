"""The ONNX Runtime side: bundles and plain sessions, opened as backends."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.tasks import CAUSAL_LM
from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import ATTENTION_MASK, ENCODER_NAME, NATIVE_SUFFIX, PAST, present_of
from loradeploy.errors import ExportError, listed, listed_names
from loradeploy.parity.backends.halves import Halves
from loradeploy.parity.context import AdapterUnderTest, CheckContext
from loradeploy.parity.inputs.row_feeds import Known, plain_feeds
from loradeploy.parity.phases.outputs import check_positions, joined, output_names
from loradeploy.parity.variants import session_options
from loradeploy.runtime.text.padding import pad

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from loradeploy.bundle.adapter_inputs.base import BaseValues
    from loradeploy.runtime.arguments import Adapters
    from loradeploy.runtime.cache import DecoderCache
    from loradeploy.runtime.session import AdapterSession

Feeds = Mapping[str, Any]
# Runs a graph: output names, feeds, and each row's adapter → values in the order of the names; for
# a model with a `cache`, and buffers of outputs by the keyword `buffers`.
Run = Callable[..., Sequence[Any]]
# A run is made once by itself, recorded the second time, and replayed from then on.
_BEFORE_A_REPLAY: Final = 2


class NotRunError(Exception):
    """A backend that cannot be run here, and why."""


@dataclass
class Replayed:
    """Of the runs of a session that captures them: how many were made, and were replays."""

    runs: int = 0
    replays: int = 0

    def take(self, other: Replayed) -> None:
        """Count what `other` counted, which begins again."""
        self.runs, self.replays = self.runs + other.runs, self.replays + other.replays
        other.runs = other.replays = 0


class OnnxModel:
    """A graph as a backend; `run` may give arrays or OrtValues.

    `cache` makes an empty cache of so many rows, which the graph may write in place. Without it the
    graph's present outputs are the next past, as they come. `known`: as `plain_feeds`. `session`:
    what the graph is open in, where it holds one adapter.
    `replayed`: what became of the runs, where they are captured.
    """

    def __init__(
        self,
        manifest: Manifest,
        run: Run,
        cache: Callable[[int], DecoderCache] | None = None,
        *,
        known: Known | None = None,
        session: AdapterSession | None = None,
        replayed: Replayed | None = None,
    ) -> None:
        self.session = session
        self.replayed = Replayed() if replayed is None else replayed
        self._known = known
        self._manifest = manifest
        self._run = run
        self._cache = cache
        self._outputs = output_names(manifest)
        self._past = [spec for spec in manifest.inputs if spec.name.startswith(PAST)]
        self._presents = [present_of(spec.name) for spec in self._past]

    def forward(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        cache: Any,
        adapters: Sequence[str | None],
        *,
        embeds: Feeds | None = None,
    ) -> tuple[NDArray[Any], Any]:
        """See `phases.models.Model` and `phases.models.EmbedsModel`."""
        dtypes = {spec.name: spec.dtype for spec in self._manifest.embeds}
        besides = {n: values.astype(dtypes[n]) for n, values in (embeds or {}).items()}
        if self._manifest.encoder is not None:
            given = self._halves().whole(self._plain(ids, mask), adapters)
            return joined([_array(value) for value in given]), None
        names, count = [*self._outputs, *self._presents], len(self._outputs)
        if not self._past and self._manifest.task == CAUSAL_LM:
            return self._without_cache(ids, mask, cache, adapters)
        if self._cache is None:
            given = self._run(names, {**self.feeds(ids, mask, cache), **besides}, adapters)
            cache = list(given[count:])
        else:
            cache = self._cache(len(ids)) if cache is None else cache
            cache.make_room(mask.shape[1])
            feeds = {**self._plain(ids, mask), **cache.inputs, **besides}
            if ATTENTION_MASK in feeds:
                feeds[ATTENTION_MASK] = cache.step_mask(feeds[ATTENTION_MASK], ids.shape[1])
            given = self._run(names, feeds, adapters, buffers=cache.buffers)
            cache.keep(given[count:])
        values = [_array(value) for value in given[:count]]
        if self._manifest.task == CAUSAL_LM:
            check_positions(values[0], ids.shape[1])
        return joined(values), cache

    def decode(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], adapters: Sequence[str | None]
    ) -> NDArray[Any]:
        """See `phases.models.SourceModel`."""
        steps = self._halves().one_by_one(self._plain(ids, mask), adapters)
        return np.concatenate([joined([_array(v) for v in step]) for step in steps], axis=1)

    def _halves(self) -> Halves:
        return Halves(self._manifest, self._run, self._outputs)

    def _plain(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        return plain_feeds(self._manifest, ids, mask, self._known)

    def _without_cache(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        before: NDArray[np.int64] | None,
        adapters: Sequence[str | None],
    ) -> tuple[NDArray[Any], Any]:
        """All tokens again, what is new in the end: each row's from its beginning, padding behind.

        `before`: the tokens so far, in place of a cache.
        """
        tokens = ids if before is None else np.concatenate([before, ids], axis=1)
        real = mask.astype(bool)
        padded, padded_mask = pad(
            [row[seen] for row, seen in zip(tokens, real, strict=True)], 0, left=False
        )
        given = [
            _array(value)
            for value in self._run(self._outputs, self.feeds(padded, padded_mask, None), adapters)
        ]
        check_positions(given[0], padded.shape[1])
        values = joined(given)
        new = ids.shape[1]
        result = np.zeros((len(ids), new, *values.shape[2:]), values.dtype)
        for row, seen in enumerate(real):
            end, count = int(seen.sum()), int(seen[-new:].sum())
            result[row, seen[-new:]] = values[row, end - count : end]
        return result, tokens

    def values(
        self, names: Sequence[str], ids: NDArray[np.int64], adapter: str | None
    ) -> list[NDArray[Any]]:
        """The outputs `names` for `ids` [rows, tokens], all of them real and without a cache."""
        feeds = self.feeds(ids, np.ones_like(ids), None)
        return [_array(value) for value in self._run(names, feeds, [adapter] * len(ids))]

    def feeds(self, ids: NDArray[np.int64], mask: NDArray[np.int64], cache: Any) -> dict[str, Any]:
        """What the graph is fed for `ids` and `mask`; a `cache` of None is one of no tokens."""
        feeds: dict[str, Any] = self._plain(ids, mask)
        if self._manifest.encoder is not None:
            return feeds  # `AdapterSession` runs the halves on them
        past = self._empty(len(ids)) if cache is None else cache
        return feeds | dict(zip((spec.name for spec in self._past), past, strict=True))

    def _empty(self, rows: int) -> list[NDArray[Any]]:
        """A cache of no tokens: [rows, heads, 0, head_dim] for each of a layer's parts."""
        shapes = [(rows, int(s.shape[1]), 0, int(s.shape[3])) for s in self._past]
        return [np.zeros(shape, s.dtype) for shape, s in zip(shapes, self._past, strict=True)]


def side_inputs(context: CheckContext) -> Iterator[tuple[str | None, OnnxModel]]:
    """The base and each adapter by itself, through `AdapterSession`."""
    session = _open(context, context.bundle)
    _load(session, context.adapters)
    for name in (None, *(tested.name for tested in context.adapters)):
        replayed = Replayed()
        run = partial(_all_rows, session, replayed, name)
        made = OnnxModel(
            context.manifest,
            run,
            session.empty_cache,
            known=context.cases.known,
            session=session,
            replayed=replayed,
        )
        yield name, made


def mixed_batch(context: CheckContext) -> Iterator[tuple[str | None, OnnxModel]]:
    """All adapters and the base at once, through `AdapterSession`: each row has its own."""
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
    """Each adapter as an .onnx_adapter file, activated in an onnxruntime session.

    What an adapter lacks is then the graph's default, of rank 0.

    Raises:
        NotRunError: a provider does not take such defaults, after all adapters that lack nothing.
    """
    import onnxruntime

    from loradeploy.bundle.adapter_inputs.base import BundleBase
    from loradeploy.runtime.devices.table import known
    from loradeploy.runtime.reading.graph import open_graph

    rows = [known(name) for name, _ in context.providers]
    if names := [row.name for row in rows if not row.takes_defaults]:
        raise NotRunError(f"{names[0]} needs every side input to be fed, which they do not do")
    manifest = context.manifest
    sessions = [open_graph(context.bundle, context.providers, _options(context))]
    if manifest.encoder is not None:
        encoder = open_graph(
            context.bundle, context.providers, _options(context), name=ENCODER_NAME
        )
        sessions.append(encoder)
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
            f"{listed(left_out)}, whose default of rank 0 {ranks[0]} does not take"
            " (`AdapterSession` feeds zeros there)"
        )


def _lacking(tested: AdapterUnderTest, manifest: Manifest) -> list[str]:
    """The modules that have side inputs in the bundle and no factors in the adapter."""
    return [t.module for t in manifest.targets if t.module not in tested.adapter.factors]


def native_file(context: CheckContext, tested: AdapterUnderTest, base: BaseValues) -> Path:
    """The adapter as an .onnx_adapter file: the bundle's own, or one written for the check."""
    from loradeploy.bundle.adapter_inputs.native import write_onnx_adapter

    if tested.native is not None:
        return tested.native
    file = context.scratch / f"{tested.name}{NATIVE_SUFFIX}"
    if not file.is_file():
        write_onnx_adapter(tested.adapter, context.manifest, file, base)
    return file


def merged_graph(context: CheckContext) -> Iterator[tuple[str | None, OnnxModel]]:
    """Each adapter folded into the graph: the merged bundle itself, or a merge made for the check.

    Raises:
        NotRunError: the graph cannot be merged into.
    """
    for tested in context.adapters:
        with merged_bundle(context, tested) as bundle:
            session = _open(context, bundle)
            replayed = Replayed()
            run = partial(_all_rows, session, replayed, None)
            yield (
                tested.name,
                OnnxModel(
                    session.manifest,
                    run,
                    session.empty_cache,
                    known=context.cases.known,
                    session=session,
                    replayed=replayed,
                ),
            )
            del session


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
    """Run an AdapterSession; where it captures runs, so often that the device replays this one.

    Whether it did is noted: prompts of a decoder are not captured, nor what comes after the last
    recording that there can be.
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
    """Run a plain session with the adapter that its run options have activated.

    Of `sessions`, the one that gives the outputs.
    """
    session, *others = sessions
    for other in others:
        if outputs[0] in {node.name for node in other.get_outputs()}:
            session = other
    values: Sequence[Any] = session.run(list(outputs), dict(feeds), active)
    return values


@contextmanager
def merged_bundle(context: CheckContext, tested: AdapterUnderTest) -> Iterator[Path]:
    """The context's merged bundle, or one that is made for the check.

    Raises:
        NotRunError: the graph cannot be merged into.
    """
    if context.merged:
        yield context.bundle
        return
    from loradeploy.export.api import export
    from loradeploy.lora.quiet import unremarked

    path = context.scratch / f"merged-{tested.name}"
    try:
        try:
            with unremarked():  # what it says is of this merge, and reads as said of the bundle
                export(context.bundle, path, adapters={tested.name: tested.path}, merge=True)
        except ExportError as problem:
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
    )


def _options(context: CheckContext) -> onnxruntime.SessionOptions:
    from loradeploy.runtime.reading.graph import WEIGHTS_AT

    options = session_options(context.variant)
    if context.weights is not None:
        options.add_session_config_entry(WEIGHTS_AT, os.fspath(context.weights.resolve()))
    return options


def _load(session: AdapterSession, adapters: Sequence[AdapterUnderTest]) -> None:
    """Load what did not come with the bundle; the session finds the others itself."""
    for tested in adapters:
        if tested.name not in session.adapters:
            session.load(tested.name, tested.path)


def _array(value: Any) -> NDArray[Any]:
    array: NDArray[Any] = value if isinstance(value, np.ndarray) else value.numpy()
    return array
