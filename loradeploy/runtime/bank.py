"""The adapter bank: adapters' side inputs, resident on the execution provider's device.

One adapter for a whole batch is bound as it is: swapping it for another resident one moves no
bytes. A batch whose rows differ reads a stack: slot 0 is the base, the others are adapters, and
`adapter_ids` names each row's slot. The stack grows as batches name adapters that it lacks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import ADAPTER_IDS
from loradeploy.errors import UnknownAdapterError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Arrays = Mapping[str, "NDArray[Any]"]


@dataclass(frozen=True, eq=False)
class Resident:
    """An adapter in the bank: its side inputs [1, …] on the host and on the device."""

    name: str
    digest: str
    labels: tuple[str, ...] | None
    host: Arrays
    device: Mapping[str, onnxruntime.OrtValue]


@dataclass(frozen=True, eq=False)
class Stack:
    """Several adapters' side inputs [slots, …] on the device, zero-padded to a common rank."""

    members: tuple[Resident, ...]
    device: Mapping[str, onnxruntime.OrtValue]
    slots: Mapping[str, int] = field(default_factory=dict)


class AdapterBank:
    """The resident adapters of one session. Safe from several threads.

    `defaults`: what the base has where adapters replace whole parameters, by side input, [1, …].
    `device`, `device_id`: where factors live, in onnxruntime's words.
    """

    def __init__(
        self, manifest: Manifest, defaults: Arrays, *, device: str = "cpu", device_id: int = 0
    ) -> None:
        self._manifest = manifest
        self._defaults = defaults
        self._device = (device, device_id)
        self._residents: dict[str, Resident] = {}
        self._uses: dict[Resident, int] = {}
        self._stack: Stack | None = None
        self._changed = threading.Condition()
        self._stacking = threading.Lock()

    def __contains__(self, name: str) -> bool:
        with self._changed:
            return name in self._residents

    def residents(self) -> dict[str, Resident]:
        """The adapters in the bank, by name."""
        with self._changed:
            return dict(self._residents)

    def add(
        self, name: str, arrays: Arrays, *, digest: str, labels: tuple[str, ...] | None
    ) -> None:
        """Put an adapter in. The same one again changes nothing.

        Raises:
            UsageError: another adapter has this name.
        """
        device = {side_input: self._upload(values) for side_input, values in arrays.items()}
        resident = Resident(name, digest, labels, arrays, device)
        with self._changed:
            there = self._residents.setdefault(name, resident)
            self._uses.setdefault(there, 0)
        if there.digest != digest:
            raise UsageError(
                f"another adapter is loaded as {name!r}: unload it first, or choose another name"
            )

    def remove(self, name: str) -> None:
        """Take an adapter out, once the runs that use it have ended; new runs do not find it.

        Raises:
            UnknownAdapterError: no adapter has this name.
        """
        with self._changed:
            resident = self._residents.pop(name, None)
            if resident is None:
                raise self._unknown(name)
            if self._stack is not None and resident in self._stack.members:
                self._stack = None
            self._changed.wait_for(lambda: self._uses[resident] == 0)
            del self._uses[resident]

    @contextmanager
    def lease(
        self, adapters: str | Sequence[str | None] | None
    ) -> Iterator[Mapping[str, onnxruntime.OrtValue]]:
        """The side inputs to bind for a run; what they hold stays while the context lasts.

        Raises:
            UnknownAdapterError: a name that is not in the bank.
        """
        names = [adapters] if adapters is None or isinstance(adapters, str) else list(adapters)
        used = self._acquire({name for name in names if name is not None})
        try:
            yield self._side_inputs(names, used)
        finally:
            self._release(used)

    def _acquire(self, names: set[str]) -> dict[str, Resident]:
        with self._changed:
            for name in sorted(names):
                if name not in self._residents:
                    raise self._unknown(name)
            used = {name: self._residents[name] for name in names}
            for resident in used.values():
                self._uses[resident] += 1
        return used

    def _release(self, used: Mapping[str, Resident]) -> None:
        with self._changed:
            for resident in used.values():
                self._uses[resident] -= 1
            self._changed.notify_all()

    def _side_inputs(
        self, names: Sequence[str | None], used: Mapping[str, Resident]
    ) -> Mapping[str, onnxruntime.OrtValue]:
        if not used:
            return {}  # the graph's own defaults are the base
        if len(set(names)) == 1:
            (resident,) = used.values()
            return resident.device
        stack = self._stack_of(used)
        slots = [0 if name is None else stack.slots[name] for name in names]
        rows = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(slots, np.int64))
        return {**stack.device, ADAPTER_IDS: rows}

    def _stack_of(self, used: Mapping[str, Resident]) -> Stack:
        """A stack that holds `used`: the present one, or a new one that takes its place."""
        with self._stacking:
            with self._changed:
                present = self._stack
            members = dict.fromkeys(present.members if present is not None else ())
            if present is not None and all(resident in members for resident in used.values()):
                return present
            members.update(dict.fromkeys(used.values()))
            stack = self._build(tuple(members))
            with self._changed:
                # A member that was removed meanwhile must not be kept alive by the stack.
                if all(self._residents.get(m.name) is m for m in stack.members):
                    self._stack = stack
            return stack

    def _build(self, members: tuple[Resident, ...]) -> Stack:
        slots = {member.name: slot for slot, member in enumerate(members, start=1)}
        device = {}
        for target in self._manifest.targets:
            pairs = [
                (member.host.get(target.lora_A), member.host.get(target.lora_B))
                for member in members
            ]
            rank = max((A.shape[2] for A, _ in pairs if A is not None), default=0)
            dtype = np.dtype(self._manifest.factor_dtype)
            stacked_A = np.zeros((len(members) + 1, target.in_features, rank), dtype)
            stacked_B = np.zeros((len(members) + 1, rank, target.out_features), dtype)
            for slot, (A, B) in enumerate(pairs, start=1):
                if A is not None and B is not None:
                    stacked_A[slot, :, : A.shape[2]] = A[0]
                    stacked_B[slot, : B.shape[1], :] = B[0]
            device[target.lora_A] = self._upload(stacked_A)
            device[target.lora_B] = self._upload(stacked_B)
        for saved in self._manifest.saved:
            default = self._defaults[saved.input]
            values = [default, *(member.host.get(saved.input, default) for member in members)]
            device[saved.input] = self._upload(np.concatenate(values))
        return Stack(members, device, slots)

    def _upload(self, values: NDArray[Any]) -> onnxruntime.OrtValue:
        # On the host this is a view: the array must stay unchanged, and the value keeps it alive.
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values), *self._device)

    def _unknown(self, name: str) -> UnknownAdapterError:
        loaded = ", ".join(sorted(self._residents)) or "none"
        return UnknownAdapterError(f"no adapter is loaded as {name!r}; loaded are: {loaded}")
