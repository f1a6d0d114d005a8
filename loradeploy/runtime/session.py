"""Inference sessions on bundles, with adapters that can change per call and per row of a batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import onnxruntime

from loradeploy.adapter.heads import Head
from loradeploy.bundle.adapter_inputs.base import BundleBase
from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.model_config import context_length, model_config
from loradeploy.bundle.names import CONFIG_NAME
from loradeploy.bundle.proof.provider import ProviderFacts
from loradeploy.bundle.proof.requirement import CertificateMinimum
from loradeploy.errors import UsageError, shown
from loradeploy.paths import takes_paths
from loradeploy.runtime.adapters.bank import AdapterBank, BankStatistics
from loradeploy.runtime.adapters.leases import Lease
from loradeploy.runtime.adapters.reading import AdapterReader
from loradeploy.runtime.adapters.resident import Arrays, FittedAdapter, SideInputs
from loradeploy.runtime.adapters.wholes import Wholes
from loradeploy.runtime.arguments import Adapters, check_adapters, check_flag, check_name
from loradeploy.runtime.cache import DecoderCache
from loradeploy.runtime.capture.pool import CachePool
from loradeploy.runtime.capture.replays import CaptureStatistics, Replays
from loradeploy.runtime.devices.effect import PROBE, check_effect, probe
from loradeploy.runtime.devices.providers import Provider, device_of
from loradeploy.runtime.devices.table import CPU, KnownProvider, known
from loradeploy.runtime.held import HeldAdapters, JoinedAdapters
from loradeploy.runtime.lifetime import Lifetime, while_open
from loradeploy.runtime.loading import AdapterLoader
from loradeploy.runtime.reading.graph import Opening, open_graph
from loradeploy.runtime.reading.opening import open_bundle
from loradeploy.runtime.reading.placement import placement_of
from loradeploy.runtime.reading.weights import MAPPED
from loradeploy.runtime.running.feeds import Feeds
from loradeploy.runtime.running.graphs import open_graphs
from loradeploy.runtime.running.limits import Limits
from loradeploy.runtime.text.sides import TextSides

if TYPE_CHECKING:
    from numpy.typing import NDArray


class AdapterSession:
    """An inference session on a bundle.

    `providers`: execution providers in order of preference, "cuda" or "CUDAExecutionProvider",
    "cuda:1" for the second device (docs/devices.md); by default those that `session_options`
    choose, or the CPU's.
    A provider that is installed but does not start is skipped with a warning, if the CPU's is
    listed too; `providers` lists those in use.
    `session_options`: onnxruntime's. If they set no log severity, only errors are logged, because
    onnxruntime warns once for every side input.
    `host_budget`, `device_budget`: limits in bytes for adapters in host memory, and for their
    copies on the device, which on the CPU are the stacks that mixed batches read. The least
    recently used adapters are evicted, and read again when they are used. None is no limit.
    `require_certificate`: only open the bundle if `loradeploy parity` passed for its current files
    (all of them are read to check this), on the provider of this session. An adapter that was not
    checked is refused when it is read. A `CertificateMinimum` requires more: the scope of the
    check, its providers, its signature.

    `check_device`: on a provider other than the CPU's and CUDA's, first compare a random adapter's
    effect with the CPU's. During this check a second session on the CPU is open.

    `capture_graphs`: record runs on the device and replay them (CUDA graphs). A decoder's runs of
    one new token, and all runs of graphs without a cache, are captured when their shapes occur a
    second time, in buffers with constant addresses, with the adapters copied into fixed slots. Runs
    of several threads then take turns. Requires CUDA or WebGPU, with every node on the device
    (docs/devices.md).

    `operator`: the library that `loradeploy operator` built, whose kernels compute what a bundle
    that was exported with `operator` calls (docs/bundles.md). It is native code, and is loaded into
    this process. On the CPU only.

    `map_weights`: let onnxruntime map the weights instead of reading them into private memory, if
    no other process can write to their file meanwhile; for processes that are soon done. They start
    faster and take less memory, but a process that writes to the file waits for the end of the
    session, and after 45 seconds, runs are refused (docs/bundles.md).

    `limits`: what the graph accepts, such as the size of its vocabulary.
    `texts`: the text settings (tokenizer, chat template, pooling) of the base and the adapters.
    `wholes`: the complete adapters of those that were split between bundles (docs/images.md).

    The adapters that came with the bundle are loaded when they are first used by name. Loading,
    unloading and running are safe from several threads. A session can only be used in the process
    that opened it. After `close` or the end of its `with`, every use raises a UsageError.

    Raises:
        BundleError: the bundle is malformed, its graph does not match its manifest, or a
            certificate is required and there is no valid one.
        UsageError: a provider that is not installed or does not start, a budget below 1, or
            `capture_graphs` or `operator` with a provider or a graph that does not support it.
        DeviceError: a provider whose results differ from the CPU's.
        OperatorError: the operators' library is missing, is another file, or was built for another
            version or processor.
    """

    @takes_paths("bundle", "operator")
    def __init__(
        self,
        bundle: str | os.PathLike[str],
        providers: Sequence[Provider] | None = None,
        *,
        session_options: onnxruntime.SessionOptions | None = None,
        host_budget: int | None = None,
        device_budget: int | None = None,
        require_certificate: bool | CertificateMinimum = False,
        check_device: bool = True,
        capture_graphs: bool = False,
        operator: str | os.PathLike[str] | None = None,
        map_weights: bool = False,
    ) -> None:
        if not isinstance(session_options, onnxruntime.SessionOptions | None):
            raise UsageError(
                f"`session_options` is {shown(session_options)}: give onnxruntime's SessionOptions"
            )
        check_flag("check_device", check_device)
        check_flag("capture_graphs", capture_graphs)
        check_flag("map_weights", map_weights)
        if not isinstance(require_certificate, CertificateMinimum):
            check_flag("require_certificate", require_certificate)
        self._lifetime = Lifetime()
        self.path = Path(bundle)
        library = None if operator is None else Path(operator)
        opening = Opening(providers, session_options, capture_graphs, library, map_weights)
        opened = open_bundle(self.path, opening, require_certificate, open_graph)
        self._opened, self._session = opened.bundle, opened.graph
        self._place = self._opened.place
        self.manifest: Manifest = self._opened.manifest
        self.wholes = Wholes(self.manifest)
        reader = AdapterReader(
            self.path,
            self._place,
            self.manifest,
            BundleBase(self._place, self.manifest, self._opened.check_data),
            self._opened.certified,
            self.wholes,
        )
        self._device = device_of(self._session)
        sides = SideInputs(
            self.manifest,
            reader.defaults(),
            self._device,
            feeds_all=opened.feeds_all,
            fixed=capture_graphs,
            ranked=library is not None and self.manifest.takes_ranks,
        )
        self._bank = AdapterBank(sides, host_budget=host_budget, device_budget=device_budget)
        for name, entry in self.manifest.adapters.items():
            self._bank.register(name, partial(reader.own, name), digest=entry.digest)
        self.texts = TextSides(self._place, self.manifest, self._opened.check)
        self._loader = AdapterLoader(reader, self._bank, self.texts)
        config = model_config(self._place)
        self.limits = Limits.of(self.manifest, config, self._place / CONFIG_NAME)
        self._opened.check()
        self._replays: Replays | None = None
        self._caches: CachePool | None = None
        if capture_graphs:
            self._replays = Replays(self._session, sides, device_budget)
            self._caches = CachePool(context_length(config), self._replays.forget)
        self._graphs = open_graphs(
            self.path,
            self.manifest,
            self.limits,
            onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(1), *self._device),
            self._session,
            opened.encoder,
            self._replays,
        )
        started = map(known, self._session.get_providers())
        unlike = [provider for provider in started if not provider.like_cpu]
        if check_device and unlike:
            bank, self._bank = self._bank, AdapterBank(sides)
            self._check_device(unlike[0], config, sides.defaults)
            self._bank = bank

    def _check_device(
        self, provider: KnownProvider, config: Mapping[str, Any], defaults: Arrays
    ) -> None:
        """Raise DeviceError unless a random adapter has the same effect here as on the CPU."""
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(MAPPED, "1")
        with AdapterSession(self._place, [CPU], session_options=options) as host:
            if self.manifest.side_inputs():
                arrays = probe(self.manifest, defaults)
                for bank in (self._bank, host._bank):
                    bank.add(PROBE, lambda: FittedAdapter(arrays, PROBE, Head()))
            check_effect(self, host, self.manifest, config, provider)

    @property
    @while_open
    def providers(self) -> tuple[str, ...]:
        """The execution providers that run the graph, in order."""
        return tuple(self._session.get_providers())

    @property
    @while_open
    def provider(self) -> ProviderFacts:
        """The provider that runs the graph: its version, device, fallback providers and options."""
        return self._opened.running

    @property
    @while_open
    def placement(self) -> dict[str, dict[str, int]]:
        """The number of nodes per provider and operator; shows what falls back to the CPU."""
        return placement_of(self._session)

    @property
    @while_open
    def adapters(self) -> dict[str, str | None]:
        """Name and digest of every adapter that a run can use; None if it was not read yet."""
        return dict(sorted(self._bank.digests().items()))

    @property
    @while_open
    def statistics(self) -> BankStatistics:
        """The memory of adapters, and how often they were in memory when they were used."""
        found = self._bank.statistics()
        if self._replays is None:
            return found
        return replace(found, device_bytes=found.device_bytes + self._replays.nbytes)

    @property
    @while_open
    def captured(self) -> int | None:
        """The number of recordings that the device has; None without `capture_graphs`.

        There is one for each combination of shapes, buffers and sizes of adapters. If the number
        grows with every run, these combinations do not repeat. After 64 recordings, including
        dropped ones, nothing more is recorded (`capture_statistics`).
        """
        return None if self._replays is None else self._replays.statistics.recorded

    @property
    @while_open
    def capture_statistics(self) -> CaptureStatistics | None:
        """What was recorded and replayed so far; None without `capture_graphs`.

        `recorded`: existing recordings. `made`: recordings made so far, at most 64. `replayed`:
        runs that the device replayed. `refused`: runs whose shapes were repeated, but that ran
        normally because no further recording could be made.
        """
        return None if self._replays is None else self._replays.statistics

    @while_open
    @takes_paths("path")
    def load(
        self, name: str, path: str | os.PathLike[str] | None = None, *, replace: bool = False
    ) -> str:
        """Load the adapter at `path` as `name` and return its digest.

        `path` is a PEFT directory, its .safetensors file, or an .onnx_adapter file. Without it, the
        adapter `name` of the bundle is loaded. Loading the same adapter again has no effect. To
        load another adapter under an existing name, or the same one with other text files, give
        `replace`; runs that have started complete with the old one. A failure does not change the
        session.

        Raises:
            AdapterError: the adapter is refused, or does not fit (AdapterMismatchError), or it was
                not checked and a certificate is required.
            UnknownAdapterError: no `path` is given, and the bundle has no adapter `name`.
            UsageError: another adapter has this name.
        """
        check_name(name)
        check_flag("replace", replace)
        return self._loader.load(name, None if path is None else Path(path), replace=replace)

    @while_open
    @takes_paths("path")
    def register(self, name: str, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        """Register the adapter at `path` as `name`. It is read when a run first uses it.

        Raises:
            AdapterError: `path` does not exist. Other problems are raised by the first run.
            UsageError: the name is in use, and `replace` is not given.
        """
        check_name(name)
        check_flag("replace", replace)
        self._loader.register(name, Path(path), replace=replace)

    @while_open
    def pin(self, name: str) -> None:
        """Load the adapter `name`, and keep it in memory regardless of the budget.

        Raises:
            UnknownAdapterError: no adapter has this name.
            AdapterError: as `load`.
        """
        check_name(name)
        self._bank.pin(name)

    @while_open
    def unpin(self, name: str) -> None:
        """Allow the adapter `name` to be evicted again.

        Raises:
            UnknownAdapterError: no adapter has this name.
        """
        check_name(name)
        self._bank.pin(name, pinned=False)

    @while_open
    def unload(self, name: str) -> None:
        """Unload the adapter `name`, and wait until the runs that use it have ended.

        Runs that start after the call cannot use it, even if it came with the bundle; `load(name)`
        loads it again.

        Raises:
            UnknownAdapterError: no adapter has this name.
            UsageError: this thread is itself in the middle of a run with adapters.
        """
        check_name(name)
        self._loader.unload(name)

    def run(
        self, output_names: Sequence[str] | None, feeds: Feeds, adapters: Adapters = None
    ) -> list[NDArray[Any]]:
        """Run the graph, as `onnxruntime.InferenceSession.run` does, with adapters.

        `adapters`: None for the base, a name for one adapter in all rows, or a sequence with one
        entry for each row of the batch, in which None is the base. Instead of a name, a mapping of
        names to weights blends adapters: the weighted sum of their updates. `output_names`: None
        means all outputs. For an encoder-decoder, the feeds are the inputs of the encoder, of the
        decoder, or both (docs/seq2seq.md).

        Integers and masks can have any integer type or bool, if their values fit into the graph's.

        Raises:
            UnknownAdapterError: an adapter that was never loaded.
            UsageError: a missing, unknown or misshapen feed, a feed that the graph would silently
                answer incorrectly (tokens outside of the vocabulary, no rows, a mask that does not
                fit, more tokens than positions), an unknown output, not one adapter for each row,
                or adapters for a merged bundle.
            RunError: onnxruntime cannot run it.
        """
        with self.hold(adapters) as held:
            return held.run(output_names, feeds)

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        feeds: Feeds,
        adapters: Adapters = None,
        *,
        buffers: Mapping[str, onnxruntime.OrtValue] | None = None,
    ) -> list[onnxruntime.OrtValue]:
        """Like `run`, but the outputs stay on the device, so a cache can be fed without a copy.

        `buffers`: values to write outputs to, by name, with the outputs' shapes and dtypes.
        """
        with self.hold(adapters) as held:
            return held.run_with_ort_values(output_names, feeds, buffers=buffers)

    def empty_cache(self, batch: int) -> DecoderCache:
        """An empty decoder cache for `batch` rows, which grows or is updated in place.

        If runs are captured, a later cache reuses the buffers of one that is no longer used.
        """
        return DecoderCache(self.manifest, self._device, batch=batch, pool=self._caches)

    @contextmanager
    def hold(self, adapters: Adapters) -> Iterator[HeldAdapters]:
        """Keep `adapters` unchanged for several runs, such as the steps of a generation.

        An `unload` of one of them waits until the context ends; a replacement is used afterwards.

        Raises:
            UnknownAdapterError: an adapter that was never loaded.
            UsageError: adapters for a merged bundle.
        """
        check_adapters(adapters)
        if not (adapters is None or isinstance(adapters, str | Mapping)):
            adapters = tuple(adapters)
        named = adapters if isinstance(adapters, tuple) else (adapters,)
        if self.manifest.mode == "merged" and any(name is not None for name in named):
            raise UsageError(
                f"{self.path} is merged and takes no adapters: export the base without `merge`"
            )
        with self._lifetime.use(), self._bank.lease(adapters) as lease:
            held = HeldAdapters(
                self._run, lease, self._device, self._bank.join, self._bank.end_lease
            )
            try:
                yield held
            finally:
                try:
                    held.end()
                except KeyboardInterrupt:  # see lifetime.py
                    held.end()
                    raise

    def joined(self) -> JoinedAdapters:
        """Return the adapters of a batch whose rows join and leave; each row has its own `hold`."""
        return JoinedAdapters(self._run, self._device, self._bank.join, self._bank.end_lease)

    def close(self) -> None:
        """Wait for running calls, then release the graph and the adapters.

        Calls that start later are refused. A second call has no effect.

        Raises:
            UsageError: this thread is itself in the middle of a run.
        """
        if self._lifetime.end():
            del self._bank, self._loader, self._session, self._graphs, self._replays, self._caches

    def __enter__(self) -> AdapterSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise UsageError("a session cannot be sent to another process: open the bundle there")

    def _run(
        self,
        lease: Lease,
        output_names: Sequence[str] | None,
        feeds: Feeds,
        device: tuple[str, int],
        buffers: Mapping[str, onnxruntime.OrtValue],
    ) -> list[onnxruntime.OrtValue]:
        """See `Graphs.run`."""
        return self._graphs.run(lease, output_names, feeds, device, buffers)
