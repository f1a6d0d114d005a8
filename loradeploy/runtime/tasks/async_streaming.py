"""Stream texts while they are generated, with asyncio.

A separate module, because importing asyncio takes longer than all other imports of a generator.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from types import TracebackType

from loradeploy.runtime.tasks.streaming import Pieces, TextPiece


class AsyncTextStream:
    """The pieces of texts while they are generated, for `async for`.

    A separate thread generates. It ends after the last piece, or before the next token if the task
    is cancelled, the loop is left or `aclose` is called. Then the rows, their cache and the
    adapters are released.
    """

    def __init__(self, pieces: Pieces) -> None:
        self._cancelled: set[int] = set()
        self._pieces = pieces
        self._ended = threading.Event()
        self._queue: asyncio.Queue[TextPiece | BaseException | None] = asyncio.Queue()
        self._thread: threading.Thread | None = None
        self._done: asyncio.Event | None = None

    def __aiter__(self) -> AsyncTextStream:
        return self

    async def __anext__(self) -> TextPiece:
        if self._thread is None:
            self._start()
        if self._ended.is_set() and self._queue.empty():
            raise StopAsyncIteration
        try:
            piece = await self._queue.get()
        except asyncio.CancelledError:
            self._ended.set()
            raise
        if piece is None:
            self._ended.set()
            raise StopAsyncIteration
        if isinstance(piece, BaseException):
            self._ended.set()
            raise piece
        return piece

    def cancel(self, row: int) -> None:
        """End a row before its next token, as "cancelled"; the others continue.

        The rows of a beam search end together.
        """
        self._cancelled.add(row)

    async def aclose(self) -> None:
        """End all rows, and wait until they have ended."""
        self._ended.set()
        if self._done is not None:
            await self._done.wait()
        while not self._queue.empty():
            self._queue.get_nowait()

    async def __aenter__(self) -> AsyncTextStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._ended.set()

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._done = asyncio.Event()
        # The thread does not reference this object, so that deleting it ends the thread.
        self._thread = threading.Thread(
            target=_generate,
            args=(self._pieces, self._cancelled, self._ended, self._queue, self._done, loop),
            name="loradeploy-stream",
            daemon=True,
        )
        self._thread.start()


def _generate(
    pieces: Pieces,
    cancelled: set[int],
    ended: threading.Event,
    queue: asyncio.Queue[TextPiece | BaseException | None],
    done: asyncio.Event,
    loop: asyncio.AbstractEventLoop,
) -> None:
    """Put each piece into `queue`, then None or the error, until `ended`."""

    def hand(piece: TextPiece | BaseException | None) -> None:
        queue.put_nowait(piece)
        if not isinstance(piece, TextPiece):
            done.set()

    last: BaseException | None = None
    running = pieces(cancelled)
    try:
        for piece in running:
            if ended.is_set() or loop.is_closed():
                break
            loop.call_soon_threadsafe(hand, piece)
    except BaseException as problem:  # raised by the next __anext__
        last = problem
    finally:
        running.close()
    with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
        loop.call_soon_threadsafe(hand, last)
