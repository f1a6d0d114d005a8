"""Values that a graph reads and writes at every run, bound once.

A cache that is written in place is the same values from step to step. Binding all of them takes
longer than everything else around a step of a small model.
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
    """An IOBinding, and what it was made for."""

    binding: onnxruntime.IOBinding
    device: weakref.ref[Bindable]
    session: onnxruntime.InferenceSession
    requested: tuple[str, ...]


class FixedBuffers(dict[str, onnxruntime.OrtValue]):
    """The outputs of a run that are written to the same values each time, with their inputs.

    `inputs`: values that are fed as they are here, each time. It is for one run at a time, of a
    graph on the host.

    The IOBinding of the last run is kept, and with it the side inputs that it read, as long as the
    adapter bank keeps these.
    """

    def __init__(self, inputs: _Values, outputs: _Values) -> None:
        super().__init__(outputs)
        self.inputs = dict(inputs)
        self._kept: _Kept | None = None

    def are_in(self, feeds: Mapping[str, object]) -> bool:
        """Whether the inputs are fed as they are here."""
        return all(feeds.get(name) is value for name, value in self.inputs.items())

    def take(
        self,
        device: Bindable,
        session: onnxruntime.InferenceSession,
        requested: Sequence[str],
        nothing: onnxruntime.OrtValue,
    ) -> onnxruntime.IOBinding:
        """An IOBinding in which the side inputs of `device` and all of this are bound.

        The other outputs that are `requested` are bound by each run, in the places that they have
        here. `nothing`: what is bound in place of values that are not to be kept.
        """
        kept, self._kept = self._kept, None
        wanted = tuple(requested)
        if kept is not None:
            there = kept.device()
            if there is device and kept.session is session and kept.requested == wanted:
                return kept.binding
            if there is not None:  # the side inputs in it may be wanted again
                kept.binding.clear_binding_outputs()
                for name in self.inputs:
                    kept.binding.bind_ortvalue_input(name, nothing)
                there.put_back(kept.binding, kept.session)
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
