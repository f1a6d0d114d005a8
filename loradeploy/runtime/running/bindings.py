"""Bind values once that a graph reads and writes at every run.

A cache that is updated in place consists of the same values at each step. Binding all of them takes
longer than the rest of the overhead of a small model's step.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnxruntime

if TYPE_CHECKING:
    from loradeploy.runtime.adapters.resident import Bindable

_Values = Mapping[str, onnxruntime.OrtValue]


@dataclass(frozen=True, eq=False)
class _Kept:
    """An IOBinding, and what it was made for: side inputs, session and outputs."""

    binding: onnxruntime.IOBinding
    device: weakref.ref[Bindable]
    session: onnxruntime.InferenceSession
    requested: tuple[str, ...]


class FixedBuffers(dict[str, onnxruntime.OrtValue]):
    """Outputs that are written to the same OrtValues at every run, with inputs that do not change.

    `inputs`: values that are fed at every run. Only for one run at a time, of a graph on the host.

    The IOBinding of the last run is kept, with the side inputs bound in it, until the adapter bank
    releases these.
    """

    def __init__(self, inputs: _Values, outputs: _Values) -> None:
        super().__init__(outputs)
        self.inputs = dict(inputs)
        self._kept: _Kept | None = None

    def are_in(self, feeds: Mapping[str, object]) -> bool:
        """Whether `feeds` contains the same values as `inputs`."""
        return all(feeds.get(name) is value for name, value in self.inputs.items())

    def take(
        self,
        device: Bindable,
        session: onnxruntime.InferenceSession,
        requested: Sequence[str],
        nothing: onnxruntime.OrtValue,
    ) -> onnxruntime.IOBinding:
        """Return an IOBinding in which the side inputs of `device` and these values are bound.

        Other `requested` outputs are only given their positions; each run binds them. `nothing`: a
        placeholder to bind instead of values that must not be kept alive.
        """
        kept, self._kept = self._kept, None
        wanted = tuple(requested)
        if kept is not None:
            previous = kept.device()
            if previous is device and kept.session is session and kept.requested == wanted:
                return kept.binding
            if previous is not None:  # its side inputs may be used again
                kept.binding.clear_binding_outputs()
                for name in self.inputs:
                    kept.binding.bind_ortvalue_input(name, nothing)
                previous.put_back(kept.binding, kept.session)
        binding = device.take(session)
        for name, value in self.inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in wanted:
            if name in self:
                binding.bind_ortvalue_output(name, self[name])
            else:
                binding.bind_output(name)
        return binding

    def put_back(
        self,
        binding: onnxruntime.IOBinding,
        device: Bindable,
        session: onnxruntime.InferenceSession,
        requested: Sequence[str],
    ) -> None:
        """Keep `binding` for the next run."""

        def forget(_: object) -> None:
            self._kept = None

        self._kept = _Kept(binding, weakref.ref(device, forget), session, tuple(requested))
