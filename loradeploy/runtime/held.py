"""Adapters that stay as they are for several runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.heads import Head
from loradeploy.errors import RunError, UsageError
from loradeploy.runtime.adapters.leases import Lease
from loradeploy.runtime.running.feeds import Feeds

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from loradeploy.runtime.adapters.resident import Resident

    # Of a lease, output names, feeds, the device of new outputs, and buffers for some of them.
    Run = Callable[
        [
            Lease,
            Sequence[str] | None,
            Feeds,
            tuple[str, int],
            Mapping[str, onnxruntime.OrtValue],
        ],
        list[onnxruntime.OrtValue],
    ]
    # Of rows of leases, and of the lease that is parted with for it.
    Join = Callable[[Sequence[tuple[Lease, int]], Lease | None], Lease]

HOST: Final = ("cpu", 0)


class HeldAdapters:
    """Adapters that stay as they are from run to run; `AdapterSession.hold` gives it.

    After its context other adapters may be where these were: a run is refused then. The context's
    end waits for runs that other threads have begun.
    """

    def __init__(
        self,
        run: Run,
        lease: Lease,
        device: tuple[str, int],
        join: Join,
        part: Callable[[Lease], None],
    ) -> None:
        self._run = run
        self._all = self._lease = lease
        self._join, self._part = join, part
        self._past: list[Lease] = []  # of rows that were taken, which runs may be reading
        self._device = device
        self._running = 0
        self._ended = False
        self._changed = threading.Condition()

    @property
    def lease(self) -> Lease:
        """What runs read."""
        return self._lease

    def head(self, row: int) -> Head | None:
        """What the answers of the adapter of `row` are; None of the base."""
        return self._lease.heads[row if self._lease.per_row else 0]

    def resident(self, number: int, /) -> Resident | None:
        """The adapter of a row that was asked for, whatever was taken; None is the base."""
        return self._all.rows[number if self._all.per_row else 0]

    def run(self, output_names: Sequence[str] | None, feeds: Feeds) -> list[NDArray[Any]]:
        """As `AdapterSession.run` with the held adapters."""
        with self._while_held():
            outputs = self._run(self._lease, output_names, feeds, HOST, {})
            return [value.numpy() for value in outputs]

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        feeds: Feeds,
        *,
        buffers: Mapping[str, onnxruntime.OrtValue] | None = None,
    ) -> list[onnxruntime.OrtValue]:
        """As `AdapterSession.run_with_ort_values` with the held adapters.

        `buffers`: values that outputs are written to, by name, of their shapes and dtypes.

        Raises:
            UsageError: as `AdapterSession.run`, or a buffer for an output that is not requested.
        """
        with self._while_held():
            return self._run(self._lease, output_names, feeds, self._device, buffers or {})

    def take_rows(self, rows: Sequence[int]) -> None:
        """Run from now on with these of the held rows, in their order; one may come several times.

        `rows` counts the rows that were asked for, whatever was taken of them before.
        """
        if not self._all.per_row:
            return
        with self._while_held():
            lease = self._join([(self._all, row) for row in rows], None)
            with self._changed:
                old, self._lease = self._lease, lease
                if old is not self._all:
                    self._past.append(old)
                self._part_with_past(but=1)  # this call itself

    @contextmanager
    def _while_held(self) -> Iterator[None]:
        with self._changed:
            if self._ended:
                raise UsageError(
                    "these adapters were held by a context that has ended: run inside its with"
                )
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """Wait for the runs that have begun, and refuse others."""
        with self._changed:
            self._ended = True
            self._changed.wait_for(lambda: not self._running)
            if self._lease is not self._all:
                self._past.append(self._lease)
            self._part_with_past()

    def _part_with_past(self, but: int = 0) -> None:
        """Let go of rows that no run reads, as there are but so many. `_changed` is held."""
        if self._running <= but:
            while self._past:
                self._part(self._past.pop())


class JoinedAdapters:
    """The adapters of a batch whose rows come and go: each row's is that of a hold of its own.

    `AdapterSession.joined` gives it. A hold is for one row, and lasts from `enter` to `leave`.
    """

    def __init__(
        self,
        run: Run,
        device: tuple[str, int],
        join: Join,
        part: Callable[[Lease], None],
    ) -> None:
        self._run, self._device = run, device
        self._join, self._part = join, part
        self._holds: dict[int, HeldAdapters] = {}
        self._rows: tuple[Lease, ...] = ()  # of each row of the batch
        self._lease: Lease | None = None

    def enter(self, number: int, held: HeldAdapters) -> None:
        """Call the first row of `held` by `number`."""
        self._holds[number] = held

    def leave(self, number: int) -> None:
        """Let go of a hold; rows that have its number from now on are of no account."""
        self._holds.pop(number, None)

    def resident(self, number: int, /) -> Resident | None:
        """The adapter of a hold, by its number; None is the base."""
        return self._holds[number].resident(0)

    def take_rows(self, rows: Sequence[int]) -> None:
        """Run from now on with the holds of these numbers, in their order.

        A row whose hold has gone runs with another's, one that is among the others if it can be:
        so a batch whose rows all have one adapter is a batch of one adapter. Where this fails no
        rows are taken, and a run is refused until they are.
        """
        there = [self._holds[row].lease if row in self._holds else None for row in rows]
        living = {lease.rows[0]: lease for lease in there if lease is not None}
        if not living:
            self.close()
            return
        first = next(iter(living.values()))
        before = (*self._rows, *[first] * len(rows))
        chosen = tuple(
            lease or living.get(old.rows[0], first)
            for lease, old in zip(there, before, strict=False)
        )
        same = len(chosen) == len(self._rows) and all(
            new.rows[0] is old.rows[0] for new, old in zip(chosen, self._rows, strict=True)
        )
        if self._lease is None or not same:
            try:
                lease = self._join([(lease, 0) for lease in chosen], self._lease)
            except BaseException:
                self.close()  # the rows of before are not those of the batch
                raise
            old_lease, self._lease = self._lease, lease
            if old_lease is not None:
                self._part(old_lease)
        self._rows = chosen

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        feeds: Feeds,
        *,
        buffers: Mapping[str, onnxruntime.OrtValue] | None = None,
    ) -> list[onnxruntime.OrtValue]:
        """As `HeldAdapters.run_with_ort_values` with the rows that were taken last.

        Raises:
            RunError: there are none, as the last `take_rows` failed.
        """
        if self._lease is None:
            raise RunError("the adapters of the batch's rows could not be joined: nothing is run")
        return self._run(self._lease, output_names, feeds, self._device, buffers or {})

    @property
    def mixed(self) -> bool:
        """Whether the rows' adapters differ."""
        return self._lease is not None and self._lease.stacked

    def close(self) -> None:
        """Let go of all rows."""
        self._rows = ()
        if self._lease is not None:
            self._part(self._lease)
            self._lease = None
