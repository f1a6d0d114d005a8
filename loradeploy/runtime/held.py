"""Adapters that stay as they are for several runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from loradeploy.adapter.heads import Head
from loradeploy.errors import RunError, UsageError
from loradeploy.runtime.adapters.leases import Lease
from loradeploy.runtime.lifetime import wait_until
from loradeploy.runtime.running.feeds import Feeds

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from loradeploy.runtime.adapters.resident import Resident

    # (lease, output names, feeds, device of new outputs, buffers for some outputs) → outputs.
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
    # (rows of other leases, a lease that this one may reuse the memory of) → lease.
    Join = Callable[[Sequence[tuple[Lease, int]], Lease | None], Lease]

HOST: Final = ("cpu", 0)
_Result = TypeVar("_Result")


class HeldAdapters:
    """Adapters that are kept unchanged from run to run; made by `AdapterSession.hold`.

    Runs after the end of its context are refused, because other adapters may use the memory then.
    The end of the context waits for running calls of other threads.
    """

    def __init__(
        self,
        run: Run,
        lease: Lease,
        device: tuple[str, int],
        join: Join,
        end_lease: Callable[[Lease], None],
    ) -> None:
        self._run = run
        self._all = self._lease = lease
        self._join, self._end_lease = join, end_lease
        self._past: list[Lease] = []  # earlier rows, which runs may still read
        self._device = device
        self._running: set[object] = set()
        self._ended = False
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    @property
    def lease(self) -> Lease:
        """The lease that runs read from."""
        return self._lease

    def head(self, row: int) -> Head | None:
        """The head (labels, problem type) of the adapter of `row`; None for the base."""
        return self._lease.heads[row if self._lease.per_row else 0]

    def resident(self, number: int, /) -> Resident | None:
        """The adapter of row `number` of the `hold`, regardless of `take_rows`; None: the base."""
        return self._all.rows[number if self._all.per_row else 0]

    def run(self, output_names: Sequence[str] | None, feeds: Feeds) -> list[NDArray[Any]]:
        """Like `AdapterSession.run`, with the held adapters."""
        outputs = self._while_held(
            lambda: self._run(self._lease, output_names, feeds, HOST, {}),
        )
        return [value.numpy() for value in outputs]

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        feeds: Feeds,
        *,
        buffers: Mapping[str, onnxruntime.OrtValue] | None = None,
    ) -> list[onnxruntime.OrtValue]:
        """Like `AdapterSession.run_with_ort_values`, with the held adapters.

        `buffers`: values to write outputs to, by name, with the outputs' shapes and dtypes.

        Raises:
            UsageError: as `AdapterSession.run`, or a buffer for an output that is not requested.
        """
        given = {} if buffers is None else buffers
        return self._while_held(
            lambda: self._run(self._lease, output_names, feeds, self._device, given)
        )

    def take_rows(self, rows: Sequence[int]) -> None:
        """Select the rows of later runs, in this order; a row may be repeated.

        `rows` are numbers of the rows of the `hold`, regardless of earlier calls.
        """
        if self._all.per_row:
            self._while_held(lambda: self._take_rows(rows))

    def _take_rows(self, rows: Sequence[int]) -> None:
        lease = self._join([(self._all, row) for row in rows], None)
        with self._lock:
            old, self._lease = self._lease, lease
            if old is not self._all:
                self._past.append(old)
            self._release_past(but=1)  # this call itself

    def _while_held(self, call: Callable[[], _Result]) -> _Result:
        """Return the result of `call`, during which the adapters do not change."""
        run = object()
        try:
            with self._lock:
                if self._ended:
                    raise UsageError(
                        "the context that held these adapters has ended: run inside its `with`"
                        " block"
                    )
                self._running.add(run)
            return call()
        finally:
            self._running.discard(run)  # first, see lifetime.py
            with self._lock:
                self._changed.notify_all()

    def end(self) -> None:
        """Wait for the running calls, and refuse later ones."""
        with self._lock:
            self._ended = True
            wait_until(self._changed, lambda: not self._running)
            if self._lease is not self._all:
                self._past.append(self._lease)
            self._release_past()

    def _release_past(self, but: int = 0) -> None:
        """Release earlier rows if at most `but` runs are running. The caller holds the lock."""
        if len(self._running) <= but:
            while self._past:
                self._end_lease(self._past.pop())


class JoinedAdapters:
    """The adapters of a batch whose rows join and leave; each row's adapter has its own hold.

    Made by `AdapterSession.joined`. A hold has one row, and is used from `enter` to `leave`.
    """

    def __init__(
        self,
        run: Run,
        device: tuple[str, int],
        join: Join,
        end_lease: Callable[[Lease], None],
    ) -> None:
        self._run, self._device = run, device
        self._join, self._end_lease = join, end_lease
        self._holds: dict[int, HeldAdapters] = {}
        self._rows: tuple[Lease, ...] = ()  # one for each row of the batch
        self._lease: Lease | None = None

    def enter(self, number: int, held: HeldAdapters) -> None:
        """Add a hold, whose first row is referred to by `number`."""
        self._holds[number] = held

    def leave(self, number: int) -> None:
        """Remove a hold. The outputs of rows that still refer to `number` are meaningless."""
        self._holds.pop(number, None)

    def resident(self, number: int, /) -> Resident | None:
        """The adapter of the hold `number`; None for the base."""
        return self._holds[number].resident(0)

    def take_rows(self, rows: Sequence[int]) -> None:
        """Select the holds of later runs, one for each row, in this order.

        A row whose hold was removed runs with its previous adapter if another row uses that one,
        otherwise with the first row's: a batch in which all rows use one adapter stays unmixed. If
        this fails, no rows are selected, and runs are refused until the next call.
        """
        own_leases = [self._holds[row].lease if row in self._holds else None for row in rows]
        by_adapter = {lease.rows[0]: lease for lease in own_leases if lease is not None}
        if not by_adapter:
            self.close()
            return
        first = next(iter(by_adapter.values()))
        before = (*self._rows, *[first] * len(rows))
        chosen = tuple(
            lease or by_adapter.get(old.rows[0], first)
            for lease, old in zip(own_leases, before, strict=False)
        )
        same = len(chosen) == len(self._rows) and all(
            new.rows[0] is old.rows[0] for new, old in zip(chosen, self._rows, strict=True)
        )
        if self._lease is None or not same:
            try:
                lease = self._join([(lease, 0) for lease in chosen], self._lease)
            except BaseException:
                self.close()  # the previous rows are not those of the batch
                raise
            old_lease, self._lease = self._lease, lease
            if old_lease is not None:
                self._end_lease(old_lease)
        self._rows = chosen

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        feeds: Feeds,
        *,
        buffers: Mapping[str, onnxruntime.OrtValue] | None = None,
    ) -> list[onnxruntime.OrtValue]:
        """Like `HeldAdapters.run_with_ort_values`, with the rows of the last `take_rows`.

        Raises:
            RunError: no rows are selected, because the last `take_rows` failed.
        """
        if self._lease is None:
            raise RunError("the adapters of the batch's rows could not be joined: nothing is run")
        return self._run(self._lease, output_names, feeds, self._device, buffers or {})

    @property
    def mixed(self) -> bool:
        """Whether the rows' adapters differ."""
        return self._lease is not None and self._lease.stacked

    def close(self) -> None:
        """Release all rows."""
        self._rows = ()
        if self._lease is not None:
            self._end_lease(self._lease)
            self._lease = None
