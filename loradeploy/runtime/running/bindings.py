"""Bind values once that a graph reads and writes at every run.

A cache that is updated in place consists of the same values at each step. Binding all of them takes
longer than the rest of the overhead of a small model's step.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING

import onnxruntime

if TYPE_CHECKING:
    from loradeploy.runtime.adapters.resident import Bindable

_Values = Mapping[str, onnxruntime.OrtValue]


@dataclass(frozen=True, eq=False)
class _Kept:
    """An IOBinding, and what it was made for: side inputs, session and outputs.

    `nothing`: a placeholder to bind instead of values that must not be kept alive.
    """

    binding: onnxruntime.IOBinding
    device: weakref.ref[Bindable]
    session: weakref.ref[onnxruntime.InferenceSession]
    requested: tuple[str, ...]
    nothing: onnxruntime.OrtValue


class FixedBuffers(dict[str, onnxruntime.OrtValue]):
    """Outputs that are written to the same OrtValues at every run, with inputs that do not change.

    `inputs`: values that are fed at every run. Only for one run at a time, of a graph on the host.

    The IOBinding of the last run is kept, with the side inputs bound in it, until the adapter bank
    releases these, or the session is closed.
    """

    def __init__(self, inputs: _Values, outputs: _Values) -> None:
        super().__init__(outputs)
        self.inputs = dict(inputs)
        self._kept: _Kept | None = None

    def are_in(self, feeds: Mapping[str, object]) -> bool:
        """Whether `feeds` contains the same values as `inputs`."""
        return all(map(is_, map(feeds.get, self.inputs), self.inputs.values()))

    def take(
        self,
        device: Bindable,
        session: onnxruntime.InferenceSession,
        requested: Sequence[str],
    ) -> onnxruntime.IOBinding:
        """Return an IOBinding in which the side inputs of `device` and these values are bound.

        Other `requested` outputs are only given their positions; each run binds them.
        """
        kept, wanted = self._kept, tuple(requested)
        if kept is not None:
            same = kept.device() is device and kept.session() is session
            if same and kept.requested == wanted:
                self._kept = None
                return kept.binding
            self.release()
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
        nothing: onnxruntime.OrtValue,
    ) -> None:
        """Keep `binding` for the next run. `nothing`: see `_Kept`."""
        own = weakref.ref(self)

        def forget(_: object) -> None:
            if (buffers := own()) is not None:
                buffers._kept = None

        kept_for = weakref.ref(device, forget), weakref.ref(session, forget)
        self._kept = _Kept(binding, *kept_for, tuple(requested), nothing)

    def release(self) -> None:
        """Let other runs with the same side inputs use the kept binding, without these values."""
        kept, self._kept = self._kept, None
        if kept is None:
            return
        device, session = kept.device(), kept.session()
        if device is None or session is None:
            return
        kept.binding.clear_binding_outputs()
        for name in self.inputs:
            kept.binding.bind_ortvalue_input(name, kept.nothing)
        device.put_back(kept.binding, session)
