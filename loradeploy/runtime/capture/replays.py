"""Record runs on the device when their shapes occur a second time, and replay them afterwards.

ONNX Runtime records a run (a CUDA graph) under the number in its option `gpu_graph_id`, and replays
it with the addresses that were bound then. Therefore everything that such a run reads and writes is
in buffers with constant addresses: feeds and outputs in buffers of the recording, adapters in fixed
slots (slots.py), and the cache in the caller's buffers, whose addresses are part of a recording's
key. The base is recorded separately, without side inputs.

For a decoder, runs of one new token are recorded: they are many and short, so that launching
kernels takes a large part of their time. Prompts have many different lengths, which would use up
the recordings. For graphs without a cache, all runs are recorded. All other runs have the number
−1, which records nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnxruntime

from loradeploy.bundle.names import ADAPTER_IDS, INPUT_IDS, PAST
from loradeploy.printable import logger_of
from loradeploy.runtime.adapters.leases import Lease
from loradeploy.runtime.adapters.resident import SideInputs
from loradeploy.runtime.adapters.stacks import HOST, neutral
from loradeploy.runtime.capture.slots import FixedSlots

if TYPE_CHECKING:
    from numpy.typing import NDArray


logger = logger_of(__name__)

GRAPH_ID: Final = "gpu_graph_id"
_NOT_RECORDED: Final = -1
# ONNX Runtime keeps recordings until the session ends.
MOST_RECORDINGS: Final = 64
_REMEMBERED: Final = 1024  # shapes that occurred once

Values = Mapping[str, onnxruntime.OrtValue]
_Key = tuple[object, ...]
_Shaped = tuple[tuple[int, ...], int]  # a shape, and ONNX's number of the dtype


@dataclass(frozen=True)
class CaptureStatistics:
    """Counts of the captured runs of a session.

    `recorded`: existing recordings. `made`: recordings ever made, at most 64. `replayed`: runs that
    the device replayed. `refused`: runs whose shapes were repeated, but that ran normally because
    no further recording could be made.
    """

    recorded: int
    made: int
    replayed: int
    refused: int


@dataclass(eq=False)
class _Recording:
    """A run recorded as `number`, with its own buffers.

    `addresses`: the addresses of buffers that belong to the caller. `ids`: adapter_ids.
    """

    number: int
    addresses: frozenset[int]
    binding: onnxruntime.IOBinding
    feeds: dict[str, onnxruntime.OrtValue]
    ids: onnxruntime.OrtValue | None
    outputs: dict[str, onnxruntime.OrtValue]


class Replays:
    """The recorded runs of one session. Thread-safe; runs are serialized.

    `budget`: see `FixedSlots`.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        sides: SideInputs,
        budget: int | None,
    ) -> None:
        self._session, self._device = session, sides.device
        self._slots = FixedSlots(sides.manifest, sides.defaults, sides.device, budget)
        self._base = dict(neutral(sides).values) if sides.feeds_all else {}
        if ADAPTER_IDS in self._base:  # copies from the host are not recorded
            self._base[ADAPTER_IDS] = self._placed(np.zeros(1, np.int64))
        self._recordings: dict[_Key, _Recording] = {}
        self._seen: OrderedDict[_Key, dict[str, _Shaped]] = OrderedDict()
        self._numbered = 0  # recordings ever made
        self._replayed = self._refused = 0
        self._steps_alone = any(spec.name.startswith(PAST) for spec in sides.manifest.inputs)
        self._turn = threading.Lock()

    @property
    def statistics(self) -> CaptureStatistics:
        """The counts so far."""
        with self._turn:
            return CaptureStatistics(
                len(self._recordings), self._numbered, self._replayed, self._refused
            )

    def forget(self, addresses: Collection[int]) -> None:
        """Drop the recordings with buffers at these addresses, which they keep alive."""
        with self._turn:
            for key, own in list(self._recordings.items()):
                if not own.addresses.isdisjoint(addresses):
                    del self._recordings[key]

    @property
    def nbytes(self) -> int:
        """The size of the slots in bytes."""
        with self._turn:
            return self._slots.nbytes

    def run(
        self,
        lease: Lease,
        requested: Sequence[str],
        feeds: Values,
        given: Collection[str],
        on_host: bool,
        buffers: Values,
    ) -> list[onnxruntime.OrtValue]:
        """Run the graph; outputs in `buffers` are written there, others are copied.

        `given`: feeds that are OrtValues of the caller; those on the device are read in place.
        `on_host`: whether the other outputs are copied to host memory.

        Raises:
            BudgetError: the adapters' slots do not fit into the budget. Also ONNX Runtime's errors.
        """
        with self._turn:
            slotted = self._slots.write(lease)
            in_place = {n: feeds[n] for n in given if feeds[n].device_name() == self._device[0]}
            ids = None if slotted is None else slotted.ids
            key: _Key = (
                None if slotted is None else slotted.size,
                None if ids is None else len(ids),
                tuple(
                    (name, _shaped(value), _address(in_place, name))
                    for name, value in feeds.items()
                ),
                tuple((name, _address(buffers, name)) for name in requested),
            )
            sides = {**self._base, **({} if slotted is None else slotted.values)}
            recording = known = self._recordings.get(key)
            recordable = not self._steps_alone or _is_step(feeds)
            if recording is None and recordable and (outputs := self._seen.get(key)) is not None:
                recording = self._begin(key, sides, feeds, in_place, ids, outputs, buffers)
            if recording is None:
                found = self._unrecorded(sides, feeds, ids, requested, buffers)
                if recordable:
                    self._remember(key, requested, found, buffers)
            else:
                found = self._recorded(key, recording, feeds, ids)
                self._replayed += known is not None
            # Copied, because the next replay overwrites the outputs of a recording, and the memory
            # of other outputs may belong to ONNX Runtime's arena, which recordings use too.
            return [
                buffers[name] if name in buffers else self._copied(found[name], on_host)
                for name in requested
            ]

    def _recorded(
        self,
        key: _Key,
        recording: _Recording,
        feeds: Values,
        ids: NDArray[np.int64] | None,
    ) -> dict[str, onnxruntime.OrtValue]:
        for name, value in recording.feeds.items():
            value.update_inplace(feeds[name].numpy())
        if recording.ids is not None and ids is not None:
            recording.ids.update_inplace(ids)
        try:
            self._session.run_with_iobinding(recording.binding, _options(recording.number))
        except BaseException:
            del self._recordings[key]  # it may not have been recorded
            raise
        return recording.outputs

    def _begin(
        self,
        key: _Key,
        sides: Values,
        feeds: Values,
        in_place: Values,
        ids: NDArray[np.int64] | None,
        outputs: Mapping[str, _Shaped],
        buffers: Values,
    ) -> _Recording | None:
        """Bind buffers for a run to record; None if the limit of recordings is reached."""
        if self._numbered >= MOST_RECORDINGS:
            self._refused += 1
            if self._refused == 1:
                logger.warning(
                    "%d runs of different shapes or buffers are captured: further ones are not",
                    MOST_RECORDINGS,
                )
            return None
        own = {n: self._placed(v.numpy().copy()) for n, v in feeds.items() if n not in in_place}
        own_ids = None if ids is None else self._placed(ids)
        made = {
            name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, *self._device)
            for name, (shape, dtype) in outputs.items()
        }
        bound = {**sides, **in_place, **own}
        if own_ids is not None:
            bound[ADAPTER_IDS] = own_ids
        binding = self._bound(bound)
        for name, value in {**buffers, **made}.items():
            binding.bind_ortvalue_output(name, value)
        del self._seen[key]
        self._numbered += 1
        addresses = frozenset(value.data_ptr() for value in (*in_place.values(), *buffers.values()))
        recording = _Recording(self._numbered, addresses, binding, own, own_ids, made)
        self._recordings[key] = recording
        return recording

    def _unrecorded(
        self,
        sides: Values,
        feeds: Values,
        ids: NDArray[np.int64] | None,
        requested: Sequence[str],
        buffers: Values,
    ) -> dict[str, onnxruntime.OrtValue]:
        own_ids = {} if ids is None else {ADAPTER_IDS: self._placed(ids)}
        binding = self._bound({**sides, **feeds, **own_ids})
        for name in requested:
            if name in buffers:
                binding.bind_ortvalue_output(name, buffers[name])
            else:
                binding.bind_output(name, *self._device)
        self._session.run_with_iobinding(binding, _options(_NOT_RECORDED))
        return dict(zip(requested, binding.get_outputs(), strict=True))

    def _remember(
        self, key: _Key, requested: Sequence[str], found: Values, buffers: Values
    ) -> None:
        self._seen[key] = {n: _shaped(found[n]) for n in requested if n not in buffers}
        self._seen.move_to_end(key)
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    def _bound(self, values: Values) -> onnxruntime.IOBinding:
        binding = self._session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def _placed(self, array: NDArray[Any]) -> onnxruntime.OrtValue:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array, *self._device)

    def _copied(self, value: onnxruntime.OrtValue, on_host: bool) -> onnxruntime.OrtValue:
        # Allocated by onnxruntime: an array obtained from a value made from an array would outlive
        # its memory.
        place = (HOST, 0) if on_host else self._device
        copy = onnxruntime.OrtValue.ortvalue_from_shape_and_type(*_shaped(value), *place)
        copy.update_inplace(value.numpy() if place[0] == HOST else value)
        return copy


def _is_step(feeds: Values) -> bool:
    """Whether the feeds have one new token in each row."""
    return INPUT_IDS in feeds and feeds[INPUT_IDS].shape()[1:] == [1]


def _shaped(value: onnxruntime.OrtValue) -> _Shaped:
    return tuple(value.shape()), int(value.element_type())


def _address(values: Values, name: str) -> int | None:
    """The address of the value `name`, or None if it is not in `values`."""
    return values[name].data_ptr() if name in values else None


def _options(number: int) -> onnxruntime.RunOptions:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry(GRAPH_ID, str(number))
    return options
