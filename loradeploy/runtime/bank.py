"""The adapter bank: adapters' side inputs, resident on the execution provider's device.

One adapter for a whole batch is bound as it is: swapping it for another resident one moves no
bytes. A batch whose rows differ reads a stack: slot 0 is the base, the others are adapters, and
`adapter_ids` names each row's slot. The stack grows as batches name adapters that it lacks. Where
the graph has no `adapter_ids` but takes a slot for each row, the stack is one of rows.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnxruntime

from loradeploy.bundle.changes import change_inputs
from loradeploy.bundle.factors import branch_choice
from loradeploy.bundle.names import ROWS
from loradeploy.bundle.pairs import factor_pairs
from loradeploy.errors import UnknownAdapterError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest

Arrays = Mapping[str, "NDArray[Any]"]

# More runs at a time than this and some of them bind their side inputs anew.
_SPARE_BINDINGS: Final = 16
# Batches whose factors are kept in the order of their rows.
_KEPT_ROWS: Final = 2


@dataclass(frozen=True, eq=False)
class Bindable:
    """Side inputs on the device, and spare IOBindings that hold them already.

    Binding all side inputs of a large model takes longer than all else around a run. An IOBinding
    serves one run at a time, so a run takes one out and puts it back.
    """

    values: Mapping[str, onnxruntime.OrtValue]
    _spare: deque[onnxruntime.IOBinding] = field(
        default_factory=lambda: deque(maxlen=_SPARE_BINDINGS)
    )

    def take(self, session: onnxruntime.InferenceSession) -> onnxruntime.IOBinding:
        """An IOBinding of `session` in which the side inputs are bound."""
        try:
            return self._spare.pop()
        except IndexError:
            binding = session.io_binding()
            for name, value in self.values.items():
                binding.bind_ortvalue_input(name, value)
            return binding

    def put_back(self, binding: onnxruntime.IOBinding) -> None:
        """Keep `binding`, in which only the side inputs are bound, for another run."""
        self._spare.append(binding)


@dataclass(frozen=True, eq=False)
class Resident:
    """An adapter in the bank: its side inputs [1, …] on the host and on the device."""

    name: str
    digest: str
    labels: tuple[str, ...] | None
    host: Arrays
    device: Bindable


@dataclass(frozen=True, eq=False)
class Stack:
    """Several adapters' side inputs [slots, …] on the device, zero-padded to a common rank.

    `slots`: each member's place; the base has slot 0.
    """

    slots: Mapping[Resident, int]
    device: Bindable


@dataclass(frozen=True, eq=False)
class Lease:
    """What the rows of a run use, kept in the bank until the lease ends.

    `rows`: each row's adapter, None for the base; a single entry where it is one for all rows.
    `per_row`: whether `rows` has an entry for each row.
    `adapter_ids`: int64 [rows], the slot of each row; None where all rows use slot 0.
    """

    rows: tuple[Resident | None, ...]
    per_row: bool
    device: Bindable
    adapter_ids: onnxruntime.OrtValue | None

    @property
    def names(self) -> list[str | None]:
        """The name of each entry of `rows`."""
        return [None if resident is None else resident.name for resident in self.rows]


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
        self._base = Bindable({})  # the graph's own defaults are the base
        self._residents: dict[str, Resident] = {}
        self._users: dict[Resident, list[int]] = {}  # by thread, once for each lease
        self._stack: Stack | None = None
        self._rows: dict[tuple[Resident | None, ...], Bindable] = {}
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
        self,
        name: str,
        arrays: Arrays,
        *,
        digest: str,
        labels: tuple[str, ...] | None,
        replace: bool = False,
    ) -> Resident:
        """Put an adapter in, and return what is in the bank under its name then.

        The same adapter again changes nothing. Another one takes the name only with `replace`: runs
        that have begun end with the old one, runs that begin later use the new one.

        Raises:
            UsageError: another adapter has this name, and `replace` is not given.
        """
        with self._changed:
            there = self._residents.get(name)
        if there is not None and _same(there, digest, arrays):
            return there
        device = {side_input: self._upload(values) for side_input, values in arrays.items()}
        resident = Resident(name, digest, labels, arrays, self._bindable(device))
        with self._changed:
            there = self._residents.get(name)
            if there is not None:
                if _same(there, digest, arrays):
                    return there
                if not replace:
                    raise UsageError(
                        f"another adapter is loaded as {name!r}: unload it first, replace it"
                        " (replace=True), or choose another name"
                    )
                self._drop_stack_with(there)
            self._residents[name] = resident
        return resident

    def remove(self, name: str) -> None:
        """Take an adapter out, and wait until the runs that use it have ended.

        Runs that begin after the call do not find it.

        Raises:
            UnknownAdapterError: no adapter has this name.
            UsageError: this thread is itself in the middle of a run with adapters.
        """
        with self._changed:
            resident = self._residents.get(name)
            if resident is None:
                raise self._unknown(name)
            # Threads that wait hold nothing, so that they cannot wait for each other.
            if any(threading.get_ident() in threads for threads in self._users.values()):
                raise UsageError(
                    f"this thread is in the middle of a run with adapters: unload {name!r} after it"
                )
            del self._residents[name]
            self._drop_stack_with(resident)
            self._changed.wait_for(lambda: resident not in self._users)

    @contextmanager
    def lease(self, adapters: str | Sequence[str | None] | None) -> Iterator[Lease]:
        """What to bind for runs with `adapters`; it stays as it is while the context lasts.

        Raises:
            UnknownAdapterError: a name that is not in the bank.
        """
        names: list[str | None]
        if adapters is None or isinstance(adapters, str):
            names, per_row = [adapters], False
        else:
            names, per_row = list(adapters), True
        thread = threading.get_ident()
        rows = self._acquire(names, thread)
        try:
            yield self._lease(rows, per_row)
        finally:
            self._release(rows, thread)

    def _acquire(self, names: Sequence[str | None], thread: int) -> tuple[Resident | None, ...]:
        with self._changed:
            for name in names:
                if name is not None and name not in self._residents:
                    raise self._unknown(name)
            rows = tuple(None if name is None else self._residents[name] for name in names)
            for resident in _used(rows):
                self._users.setdefault(resident, []).append(thread)
        return rows

    def _release(self, rows: Sequence[Resident | None], thread: int) -> None:
        with self._changed:
            for resident in _used(rows):
                self._users[resident].remove(thread)
                if not self._users[resident]:
                    del self._users[resident]
            self._changed.notify_all()

    def _lease(self, rows: tuple[Resident | None, ...], per_row: bool) -> Lease:
        used = _used(rows)
        if not used:
            return Lease(rows, per_row, self._base, None)
        if len(used) == 1 and None not in rows:
            return Lease(rows, per_row, used[0].device, None)
        if self._manifest.branches == ROWS:
            return Lease(rows, per_row, self._in_rows(rows), None)
        stack = self._stack_of(used)
        slots = [0 if resident is None else stack.slots[resident] for resident in rows]
        adapter_ids = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(slots, np.int64))
        return Lease(rows, per_row, stack.device, adapter_ids)

    def _in_rows(self, rows: tuple[Resident | None, ...]) -> Bindable:
        """The side inputs in the order of `rows`; the last few batches' are kept."""
        with self._stacking:
            with self._changed:
                if (present := self._rows.pop(rows, None)) is not None:
                    self._rows[rows] = present  # the last one that was used
                    return present
            made = self._bindable(self._side_inputs(rows))
            with self._changed:
                if self._are_there(_used(rows)):
                    while len(self._rows) >= _KEPT_ROWS:
                        del self._rows[next(iter(self._rows))]
                    self._rows[rows] = made
            return made

    def _bindable(self, values: Mapping[str, onnxruntime.OrtValue]) -> Bindable:
        """`values`, and what chooses the graph's branch for them, where it has any."""
        choice = branch_choice(self._manifest).items()
        chosen = {n: onnxruntime.OrtValue.ortvalue_from_numpy(number) for n, number in choice}
        return Bindable({**values, **chosen})

    def _stack_of(self, used: Sequence[Resident]) -> Stack:
        """A stack that holds `used`: the present one, or a larger one that takes its place."""
        with self._stacking:
            with self._changed:
                present = self._stack
            members = dict.fromkeys(present.slots if present is not None else ())
            if present is not None and all(resident in members for resident in used):
                return present
            members.update(dict.fromkeys(used))
            stack = self._build(tuple(members))
            with self._changed:
                if self._are_there(members):
                    self._stack = stack
            return stack

    def _are_there(self, members: Iterable[Resident]) -> bool:
        """Whether all may be kept alive: none was removed meanwhile. `_changed` is held."""
        return all(self._residents.get(member.name) is member for member in members)

    def _build(self, members: Sequence[Resident]) -> Stack:
        values = self._side_inputs((None, *members))
        slots = {member: slot for slot, member in enumerate(members, start=1)}
        return Stack(slots, self._bindable(values))

    def _side_inputs(self, slots: Sequence[Resident | None]) -> dict[str, onnxruntime.OrtValue]:
        """The side inputs [slots, …], zero-padded to a common rank, on the device."""
        dtype = np.dtype(self._manifest.factor_dtype)
        hosts: list[Arrays] = [{} if slot is None else slot.host for slot in slots]
        values = {}
        for pair in factor_pairs(self._manifest.targets):
            factors = [(host.get(pair.lora_A), host.get(pair.lora_B)) for host in hosts]
            rank = max((A.shape[2] for A, _ in factors if A is not None), default=0)
            stacked_A = np.zeros((len(slots), pair.in_features, rank), dtype)
            stacked_B = np.zeros((len(slots), rank, pair.out_features), dtype)
            for slot, (A, B) in enumerate(factors):
                if A is not None and B is not None:
                    stacked_A[slot, :, : A.shape[2]] = A[0]
                    stacked_B[slot, : B.shape[1], :] = B[0]
            values[pair.lora_A] = self._upload(stacked_A)
            values[pair.lora_B] = self._upload(stacked_B)
        for saved in self._manifest.saved:
            default = self._defaults[saved.input]
            whole = [host.get(saved.input, default) for host in hosts]
            values[saved.input] = self._upload(np.concatenate(whole))
        for name, (size, neutral) in change_inputs(self._manifest).items():
            stacked = np.full((len(slots), size), neutral, dtype)
            for slot, host in enumerate(hosts):
                if name in host:
                    stacked[slot] = host[name][0]
            values[name] = self._upload(stacked)
        return values

    def _upload(self, values: NDArray[Any]) -> onnxruntime.OrtValue:
        # On the host this is a view: the array must stay unchanged, and the value keeps it alive.
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values), *self._device)

    def _drop_stack_with(self, resident: Resident) -> None:
        if self._stack is not None and resident in self._stack.slots:
            self._stack = None
        self._rows = {rows: held for rows, held in self._rows.items() if resident not in rows}

    def _unknown(self, name: str) -> UnknownAdapterError:
        loaded = ", ".join(sorted(self._residents)) or "none"
        return UnknownAdapterError(f"no adapter is loaded as {name!r}; loaded are: {loaded}")


def _used(rows: Sequence[Resident | None]) -> list[Resident]:
    """The adapters in `rows`, each once."""
    return [resident for resident in dict.fromkeys(rows) if resident is not None]


def _same(resident: Resident, digest: str, arrays: Arrays) -> bool:
    """Whether an adapter computes what `resident` does, though it may come in another format."""
    if resident.digest == digest:
        return True
    host = resident.host
    return host.keys() == arrays.keys() and all(
        np.array_equal(host[name], values) for name, values in arrays.items()
    )
