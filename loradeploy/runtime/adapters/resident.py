"""The nouns of an adapter bank: names, and side inputs in memory, of adapters and of blends."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import onnxruntime

from loradeploy.adapter.heads import Head
from loradeploy.bundle.adapter_inputs.factors import computable
from loradeploy.bundle.fitting.added_tokens import tokens_in
from loradeploy.errors import UsageError, shortened, shown
from loradeploy.given_numbers import checked_number
from loradeploy.runtime.adapters.block import in_one_block

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest

Arrays = Mapping[str, "NDArray[Any]"]
# The choice for a row: an adapter's name, or several names with weights.
AdapterSpec = str | Mapping[str, float]


@dataclass(frozen=True, eq=False)
class FittedAdapter:
    """An adapter that was read for a bundle. `arrays`: its side inputs [1, …], by input name."""

    arrays: Arrays
    digest: str
    head: Head


@dataclass(frozen=True, eq=False)
class SideInputs:
    """The side inputs of a session's graph, and how adapters are given to them.

    `defaults`: the base's values of parameters that adapters replace, by side input, [1, …].
    `device`: where factors are kept, in onnxruntime's terms, and its number.
    `feeds_all`: whether side inputs that an adapter lacks are bound too, with the base's values and
    a rank above 0.
    `fixed`: whether runs copy adapters into their own slots, so that the bank keeps no copies on
    the device.
    `ranked`: whether stacks have the ranks of their adapters, which the operator reads.
    """

    manifest: Manifest
    defaults: Arrays
    device: tuple[str, int]
    feeds_all: bool
    fixed: bool
    ranked: bool


# Reads an adapter.
Read = Callable[[], FittedAdapter]

# If more runs are concurrent, some of them bind their side inputs again.
_SPARE_BINDINGS: Final = 16
_LARGEST: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Bindable:
    """Side inputs on the device, and spare IOBindings in which they are bound.

    Binding all side inputs of a large model takes longer than the rest of a run's overhead. An
    IOBinding serves one run at a time, so a run takes one and returns it. It belongs to one
    onnxruntime session (a bundle's other graph has its own), and is dropped with it: who still has
    adapters of a closed session does not keep its graph.
    """

    values: Mapping[str, onnxruntime.OrtValue]
    _spare: WeakKeyDictionary[onnxruntime.InferenceSession, deque[onnxruntime.IOBinding]] = field(
        default_factory=WeakKeyDictionary
    )

    def take(self, session: onnxruntime.InferenceSession) -> onnxruntime.IOBinding:
        """Take an IOBinding of `session` in which the side inputs are bound."""
        try:
            return self._spare[session].pop()
        except (KeyError, IndexError):
            binding = session.io_binding()
            for name, value in self.values.items():
                binding.bind_ortvalue_input(name, value)
            return binding

    def put_back(
        self, binding: onnxruntime.IOBinding, session: onnxruntime.InferenceSession
    ) -> None:
        """Return `binding` of `session`, in which only side inputs are bound, for other runs."""
        self._spare.setdefault(session, deque(maxlen=_SPARE_BINDINGS)).append(binding)


@dataclass(eq=False)
class Entry:
    """A registered name.

    `read`: reads the adapter. `head`: None until it was read. `digest`: None until it was read, if
    it was not given. `loading`: held by the thread that reads it.
    """

    name: str
    read: Read
    digest: str | None
    head: Head | None = None
    pinned: bool = False
    loading: threading.Lock = field(default_factory=threading.Lock)

    def holds(self, adapter: FittedAdapter) -> bool:
        """Whether this is the name of `adapter`, with the same head."""
        return (self.digest, self.head) == (adapter.digest, adapter.head)


@dataclass(eq=False)
class Resident:
    """An adapter's side inputs [1, …] in host memory, identified by their digest.

    `host`: may be replaced by equal arrays elsewhere. The previous ones may then be overwritten,
    unless the adapter is in use (see `Stacks`). `parts`: the digests of a blend's members.
    """

    digest: str
    host: Arrays
    parts: tuple[str, ...] = ()

    @cached_property
    def nbytes(self) -> int:
        """The size of its side inputs in bytes."""
        return sum(values.nbytes for values in self.host.values())

    def computes(self, adapter: FittedAdapter) -> bool:
        """Whether `adapter` has the same side inputs; digests differ between file formats."""
        if self.digest == adapter.digest:
            return True
        return self.host.keys() == adapter.arrays.keys() and all(
            np.array_equal(self.host[name], values) for name, values in adapter.arrays.items()
        )


def used(rows: Sequence[Resident | None]) -> list[Resident]:
    """The distinct adapters in `rows`."""
    return [resident for resident in dict.fromkeys(rows) if resident is not None]


def weights_of(spec: AdapterSpec) -> tuple[tuple[str, float], ...]:
    """The adapters that `spec` names, with their weights.

    Raises:
        UsageError: no adapter, or a weight that is not a finite number.
    """
    if isinstance(spec, str):
        return ((spec, 1.0),)
    weights = []
    for name, weight in spec.items():
        number = checked_number(weight)
        # Larger weights do not fit into float32.
        if number is None or not -_LARGEST <= number <= _LARGEST:
            raise UsageError(
                f"the weight of {shown(name)} is {shown(weight)}: give a finite number"
            )
        if not isinstance(name, str):
            raise UsageError(f"a blend names {shown(name)}: give the name of an adapter")
        weights.append((name, number))
    if not weights:
        raise UsageError("a blend names no adapter: give {name: weight, …}, or None for the base")
    return tuple(sorted(weights))


def blend(members: Sequence[tuple[Resident, float]], manifest: Manifest) -> Resident:
    """Σ weight · adapter: the factors concatenated, with the weights multiplied into B.

    Raises:
        UsageError: a member has more than low-rank factors, which are all that can be added.
    """
    for resident, _ in members:
        if more := sorted(resident.host.keys() - set(manifest.factors)):
            raise UsageError(
                f"an adapter with {more[0]} cannot be blended: only low-rank factors can be scaled"
                " and added"
            )
        if manifest.added_tokens is not None and (
            tokens_in(resident.host, manifest) != manifest.added_tokens.base
        ):
            raise UsageError("an adapter that adds tokens cannot be blended: use it alone")
    host = {}
    for target in manifest.targets:
        A, B = target.lora_A, target.lora_B
        touched = [(r.host, weight) for r, weight in members if A in r.host]
        if touched:
            host[A] = np.concatenate([own[A] for own, _ in touched], axis=2)
            with np.errstate(over="ignore", invalid="ignore"):
                scaled = [own[B] * own[B].dtype.type(w) for own, w in touched]
            host[B] = np.concatenate(scaled, axis=1)
            if not computable(host[B]):
                weights = ", ".join(f"{weight:g}" for _, weight in members)
                raise UsageError(
                    f"the weights {shortened(weights)} of a blend do not fit into {host[B].dtype}:"
                    " give smaller ones"
                )
    parts = tuple(resident.digest for resident, _ in members)
    return Resident(blend_digest(members), in_one_block(host), parts)


def blend_head(heads: Mapping[str, Head]) -> Head:
    """The head of a blend, on which its members must agree.

    Raises:
        UsageError: the members declare different labels or problem types.
    """
    (first, head), *others = heads.items()
    for name, other in others:
        if other != head:
            raise UsageError(
                f"{first!r} and {name!r} declare different labels or problem types: they cannot be"
                " blended"
            )
    return head


def blend_digest(members: Sequence[tuple[Resident, float]]) -> str:
    """The identity of a blend, from the digests and weights of its members."""
    return "blend:" + "+".join(f"{weight!r}*{resident.digest}" for resident, weight in members)


class Once:
    """Reads an adapter immediately; the first call returns the result, later calls read again."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._found = [read()]

    def __call__(self) -> FittedAdapter:
        """The adapter."""
        try:
            return self._found.pop()
        except IndexError:
            return self._read()
