"""The onnxruntime graphs of a bundle, run with the adapters of a lease.

Most bundles have one graph. An encoder-decoder has two, and the feeds decide which of them run:

    inputs of the encoder           the encoder: its outputs, the cross-attention cache
    inputs of the decoder           the decoder: one step, with both caches
    both, without cross-attention   the encoder, then the decoder on its outputs: the whole model,
    cache (or any cache)            as PyTorch runs it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime

from loradeploy.bundle.manifest import Manifest, TensorSpec, default_of
from loradeploy.bundle.names import (
    ADAPTER_IDS,
    ATTENTION_MASK,
    ENCODER_ATTENTION_MASK,
    INPUT_IDS,
    PAST,
    is_cross,
    present_of,
)
from loradeploy.errors import LoraDeployError, RunError, UsageError, first_line, shown
from loradeploy.runtime.adapters.leases import Lease
from loradeploy.runtime.adapters.stacks import HOST
from loradeploy.runtime.adapters.tokens import check_tokens_of
from loradeploy.runtime.arguments import check_buffers, check_rows, requested_outputs
from loradeploy.runtime.capture.replays import Replays
from loradeploy.runtime.running.bindings import FixedBuffers
from loradeploy.runtime.running.feeds import Feeds, feed_values
from loradeploy.runtime.running.limits import Limits

Values = Mapping[str, onnxruntime.OrtValue]


@dataclass(frozen=True, eq=False)
class Graph:
    """One graph: its inputs, without side inputs, and its outputs.

    `optional`: inputs that need not be fed. `nothing`: a placeholder that is bound instead of
    feeds. `replays`: set if its runs are captured.
    """

    path: Path
    manifest: Manifest
    session: onnxruntime.InferenceSession
    inputs: Mapping[str, TensorSpec]
    outputs: tuple[str, ...]
    limits: Limits
    nothing: onnxruntime.OrtValue
    replays: Replays | None
    optional: Mapping[str, TensorSpec]

    @cached_property
    def _defaults(self) -> dict[str, onnxruntime.OrtValue]:
        """The defaults of optional inputs; no positions for `logits_to_keep` means all.

        They are bound at every run, because a binding keeps earlier values.
        """
        return {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(default_of(spec))
            for name, spec in self.optional.items()
        }

    @cached_property
    def _first(self) -> str:
        """An input whose first dimension is the batch."""
        return INPUT_IDS if INPUT_IDS in self.inputs else next(iter(self.inputs))

    def run(
        self,
        lease: Lease,
        requested: Sequence[str],
        feeds: Feeds,
        device: tuple[str, int],
        buffers: Values,
    ) -> list[onnxruntime.OrtValue]:
        """Run the graph; outputs in `buffers` are written there, others are allocated on `device`.

        Raises:
            UsageError: feeds that do not fit. RunError: onnxruntime cannot run it.
        """
        fixed = buffers if isinstance(buffers, FixedBuffers) and self.replays is None else None
        if fixed is not None and fixed.are_in(feeds):
            return self._run_fixed(lease, requested, feeds, device, fixed)
        fed = feed_values(feeds, self.inputs, self.limits, self.optional)
        values = {**self._defaults, **fed}
        self._check_rows(lease, values)
        if self.replays is not None:
            given = [name for name, feed in feeds.items() if isinstance(feed, onnxruntime.OrtValue)]
            on_host = device[0] == HOST
            try:
                return self.replays.run(lease, requested, fed, given, on_host, buffers)
            except LoraDeployError:
                raise
            except Exception as problem:  # onnxruntime's own errors
                raise self._failed(problem) from None
        binding = lease.device.take(self.session)
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        if lease.adapter_ids is not None:
            binding.bind_ortvalue_input(ADAPTER_IDS, lease.adapter_ids)
        for name in requested:
            if name in buffers:
                binding.bind_ortvalue_output(name, buffers[name])
            else:
                binding.bind_output(name, *device)
        self._run_bound(binding)
        outputs: list[onnxruntime.OrtValue] = binding.get_outputs()
        # A spare binding must not keep a whole cache alive.
        binding.clear_binding_outputs()
        for name in fed:
            binding.bind_ortvalue_input(name, self.nothing)
        lease.device.put_back(binding, self.session)
        return outputs

    def _run_fixed(
        self,
        lease: Lease,
        requested: Sequence[str],
        feeds: Feeds,
        device: tuple[str, int],
        fixed: FixedBuffers,
    ) -> list[onnxruntime.OrtValue]:
        """Like `run`, with most values already bound.

        A bound value whose shape has the number of rows is checked with the other feeds.
        """
        bound = fixed.inputs.keys() - {self.limits.first_past}
        fed = feed_values(
            {name: feed for name, feed in feeds.items() if name not in bound},
            {name: spec for name, spec in self.inputs.items() if name not in bound},
            self.limits,
            self.optional,
        )
        values = {**self._defaults, **fed}
        self._check_rows(lease, values)
        binding = fixed.take(lease.device, self.session, requested)
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        if lease.adapter_ids is not None:
            binding.bind_ortvalue_input(ADAPTER_IDS, lease.adapter_ids)
        others = [name for name in requested if name not in fixed]
        for name in others:  # the caller owns the last run's
            binding.bind_output(name, *device)
        self._run_bound(binding)
        made = binding.get_outputs_as_ortvaluevector()
        fixed.put_back(binding, lease.device, self.session, requested, self.nothing)
        outputs = dict(fixed)
        for name in others:
            outputs[name] = onnxruntime.OrtValue(made[requested.index(name)])
        return list(map(outputs.__getitem__, requested))

    def _run_bound(self, binding: onnxruntime.IOBinding) -> None:
        """Run the graph; after an error the binding is not used again."""
        try:
            self.session.run_with_iobinding(binding)
        except LoraDeployError:  # the weights are mapped, and have changed
            raise
        except Exception as problem:  # onnxruntime's own errors
            raise self._failed(problem) from None

    def _check_rows(self, lease: Lease, values: Values) -> None:
        """Raise UsageError for a number of rows other than the lease's, or tokens that a row lacks.

        Tokens on a device are not checked.
        """
        if lease.per_row:
            check_rows(len(lease.rows), values[self._first].shape()[0])
        if self.manifest.added_tokens is not None and values[INPUT_IDS].device_name() == HOST:
            check_tokens_of(lease, values[INPUT_IDS].numpy(), self.manifest)

    def _failed(self, problem: Exception) -> RunError:
        return RunError(f"onnxruntime cannot run {self.path} on these feeds: {first_line(problem)}")


class Graphs:
    """The graphs of a bundle, run as one; `encoder` is None if there is one graph."""

    def __init__(self, decoder: Graph, encoder: Graph | None, manifest: Manifest) -> None:
        self._decoder, self._encoder = decoder, encoder
        self._outputs = tuple(spec.name for spec in manifest.outputs)

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """The inputs of the graph that computes the task's output."""
        return self._decoder.inputs

    def run(
        self,
        lease: Lease,
        output_names: Sequence[str] | None,
        feeds: Feeds,
        device: tuple[str, int],
        buffers: Values,
    ) -> list[onnxruntime.OrtValue]:
        """See `Graph.run`; if `output_names` is None, all outputs of the graphs that run.

        Raises:
            UsageError: as `Graph.run`, or an output of a graph that is not fed.
        """
        requested = requested_outputs(output_names, self._outputs)
        if not isinstance(buffers, FixedBuffers):  # those of the decoding loop
            check_buffers(buffers)
        if unknown := buffers.keys() - set(requested):
            first = next(name for name in buffers if name in unknown)
            raise UsageError(f"there is a buffer for {shown(first)}, which is not requested")
        if self._encoder is None:
            return self._decoder.run(lease, requested, feeds, device, buffers)
        return self._run_halves(
            self._encoder,
            lease,
            None if output_names is None else requested,
            feeds,
            device,
            buffers,
        )

    def _run_halves(
        self,
        encoder: Graph,
        lease: Lease,
        requested: Sequence[str] | None,
        feeds: Feeds,
        device: tuple[str, int],
        buffers: Values,
    ) -> list[onnxruntime.OrtValue]:
        if not isinstance(feeds, Mapping):
            return self._decoder.run(lease, self._decoder.outputs, feeds, device, buffers)
        source = {name: feed for name, feed in feeds.items() if name in encoder.inputs}
        target = {name: feed for name, feed in feeds.items() if name not in encoder.inputs}
        if requested is None:
            both = (*self._decoder.outputs, *encoder.outputs)
            halves = (target and self._decoder.outputs, source and encoder.outputs)
            requested = [name for name in both if any(half and name in half for half in halves)]
        found: dict[str, onnxruntime.OrtValue] = {}
        own = [name for name in requested if name in encoder.outputs]
        rest = [name for name in requested if name not in encoder.outputs]
        crosses = [name for name in self._decoder.inputs if is_cross(name)]
        lacking = bool(rest and source) and not any(name in target for name in crosses)
        if own or lacking or not (target or rest):
            names = own or list(encoder.outputs)
            if lacking:
                names = [*map(present_of, crosses), *(n for n in own if not is_cross(n))]
            given = encoder.run(
                lease, names, source, device, {n: buffers[n] for n in names if n in buffers}
            )
            found.update(zip(names, given, strict=True))
        if rest:
            if lacking:
                target.update((name, found[present_of(name)]) for name in crosses)
                if ENCODER_ATTENTION_MASK in self._decoder.inputs and ATTENTION_MASK in source:
                    target.setdefault(ENCODER_ATTENTION_MASK, source[ATTENTION_MASK])
            if source:
                target = {**self._empty(source), **target}
            given = self._decoder.run(
                lease, rest, target, device, {n: buffers[n] for n in rest if n in buffers}
            )
            found.update(zip(rest, given, strict=True))
        return [found[name] for name in requested]

    def _empty(self, source: Feeds) -> dict[str, onnxruntime.OrtValue]:
        """An empty self-attention cache for the rows of `source`."""
        first = next(iter(source.values()))
        shape = first.shape() if isinstance(first, onnxruntime.OrtValue) else np.shape(first)
        rows = shape[0] if shape else 1
        return {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros((rows, int(spec.shape[1]), 0, int(spec.shape[3])), spec.dtype)
            )
            for name, spec in self._decoder.inputs.items()
            if name.startswith(PAST) and not is_cross(name)
        }


def open_graphs(
    path: Path,
    manifest: Manifest,
    limits: Limits,
    nothing: onnxruntime.OrtValue,
    session: onnxruntime.InferenceSession,
    encoder: onnxruntime.InferenceSession | None,
    replays: Replays | None,
) -> Graphs:
    """Wrap the graphs of the bundle at `path`, opened as `session` and `encoder`.

    `replays`: the recorded runs of `session`, if runs are captured.
    """
    apart = manifest.encoder
    taken = () if apart is None else apart.inputs
    given = () if apart is None else apart.outputs

    def graph(opened: onnxruntime.InferenceSession, *, source: bool) -> Graph:
        return Graph(
            path,
            manifest,
            opened,
            {spec.name: spec for spec in manifest.inputs if (spec.name in taken) is source},
            tuple(spec.name for spec in manifest.outputs if (spec.name in given) is source),
            limits,
            nothing,
            None if source else replays,
            {} if source else {spec.name: spec for spec in manifest.optional_inputs()},
        )

    return Graphs(
        graph(session, source=False),
        None if encoder is None else graph(encoder, source=True),
        manifest,
    )
