"""The key/value cache of a decoder, from step to step.

A graph with ONNX's Attention returns the whole cache at each step, one position longer. A graph
with GroupQueryAttention writes in place into a buffer with room for further positions, so that
nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnxruntime

from loradeploy.bundle.names import PAST, is_cross, present_of
from loradeploy.errors import UsageError
from loradeploy.runtime.adapters.stacks import HOST
from loradeploy.runtime.running.bindings import FixedBuffers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest, TensorSpec
    from loradeploy.runtime.capture.pool import BorrowedBuffers, CachePool

# Additional positions that are allocated for later tokens; buffers grow by doubling.
_ROOM: Final = 256
_DTYPES: Final = ("float32", "float16", "float64")


def cache_inputs(manifest: Manifest) -> list[TensorSpec]:
    """The cache inputs [batch, heads, past, size] of the graph; empty if it has no cache.

    Raises:
        UsageError: numpy lacks the dtype, or the number of heads or the size is unknown, so that no
            cache can be allocated.
    """
    # The cross-attention cache of an encoder-decoder does not grow, and is not included.
    specs = [s for s in manifest.inputs if s.name.startswith(PAST) and not is_cross(s.name)]
    for spec in specs:
        if spec.dtype not in _DTYPES:
            raise UsageError(
                f"{spec.name} is {spec.dtype}, of which numpy makes no cache: pass your own"
                " OrtValues to AdapterSession.run"
            )
    for spec in specs:
        if len(spec.shape) != 4 or not all(isinstance(spec.shape[i], int) for i in (1, 3)):
            raise UsageError(
                f"{spec.name} is {list(spec.shape)}, a cache of [batch, heads, past, size] with"
                " numbers for heads and size is needed: pass your own OrtValues to"
                " AdapterSession.run"
            )
    return specs


class DecoderCache:
    """The cache inputs and outputs of a decoder's graph, for `batch` rows on `device`.

    `inputs`: past keys and values [batch, heads, past, size] to feed, by input name; no positions
    at first. `outputs`: the names of the present keys and values. `buffers`: OrtValues that the
    graph writes them to; empty if the graph allocates its outputs.
    `pool`: provides the buffers of a cache that is updated in place, with constant addresses.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: tuple[str, int],
        *,
        batch: int,
        pool: CachePool | None = None,
    ) -> None:
        self._specs = cache_inputs(manifest)
        if batch < 1:
            raise UsageError(f"a cache for {batch} rows: give 1 or more")
        self._batch = batch
        self._device = device
        fixed = any(isinstance(spec.shape[2], int) for spec in self._specs)
        self._in_place = manifest.cache_in_place and not fixed
        self._pool = pool if self._in_place else None
        self._borrowed: BorrowedBuffers | None = None
        self._positions = 0
        self._used = 0  # the positions that were written
        self.outputs = tuple(present_of(spec.name) for spec in self._specs)
        self.buffers: Mapping[str, onnxruntime.OrtValue] = {}
        self.inputs: dict[str, onnxruntime.OrtValue] = {}
        self._allocate(0)

    def make_room(self, positions: int, most: int | None = None) -> None:
        """Ensure room for `positions` if the graph writes in place; call it before each run.

        `most`: the final number of positions, if it is known.
        """
        if self._in_place and positions > self._positions:
            room = max(positions + _ROOM, 2 * self._positions)
            if self._pool is not None:
                room = self._pool.room(positions, room if most is None else most)
            elif most is not None:
                room = max(positions, min(room, most))
            self._allocate(room)
            self._set_buffers()
        self._used = positions

    def keep(self, present: Sequence[onnxruntime.OrtValue]) -> None:
        """Use the outputs of a run, in the order of `outputs`, as the inputs of the next one."""
        self.inputs = dict(zip(self.inputs, present, strict=True))

    def take_rows(self, rows: Sequence[int]) -> None:
        """Select the rows of the batch, in this order; a row may be repeated."""
        self._allocate(self._positions, rows)
        self._set_buffers()

    def fill(self, values: Sequence[NDArray[Any]]) -> None:
        """Replace the contents by keys and values [rows, heads, tokens, size], one per input."""
        used = values[0].shape[2]
        room = used + _ROOM if self._in_place else used
        if self._pool is not None:
            room = self._pool.room(used, room)
        put, borrowed = self._placing(len(values[0]), room)
        inputs = {}
        for spec, own in zip(self._specs, values, strict=True):
            whole = np.zeros((*own.shape[:2], room, own.shape[3]), spec.dtype)
            whole[:, :, :used] = own
            inputs[spec.name] = put(spec.name, whole)
        self.inputs, self._borrowed = inputs, borrowed
        self._batch, self._positions, self._used = len(values[0]), room, used
        self._set_buffers()

    def join(
        self,
        rows: Sequence[int],
        width: int,
        other: DecoderCache,
        joining: Sequence[tuple[int, NDArray[np.intp]]],
        left: bool,
    ) -> None:
        """Make a batch of the rows `rows` of this cache and the rows `joining` of `other`.

        `width`: how many positions of this cache are kept. `joining`: pairs of a row of `other` and
        its positions to copy. `left`: whether rows are padded on the left, so that tokens are at
        the last positions. A failure leaves the cache unchanged.
        """
        most = max([width, *(len(positions) for _, positions in joining)])
        room = max(most, self._positions) if self._in_place else most
        count = len(rows) + len(joining)
        if self._pool is not None:
            room = self._pool.room(most, room)
        put, borrowed = self._placing(count, room)
        inputs = {}
        for spec in self._specs:
            _, heads, _, size = spec.shape
            values = np.zeros((count, int(heads), room, int(size)), spec.dtype)
            if len(rows) and width:
                old = self.inputs[spec.name].numpy()
                if left:
                    values[: len(rows), :, most - width : most] = old[
                        list(rows), :, old.shape[2] - width :
                    ]
                else:
                    values[: len(rows), :, :width] = old[list(rows), :, :width]
            new = other.inputs[spec.name].numpy()
            for at, (row, positions) in enumerate(joining, start=len(rows)):
                begin = most - len(positions) if left else 0
                values[at, :, begin : begin + len(positions)] = new[row][:, span_of(positions)]
            inputs[spec.name] = put(spec.name, values)
        self.inputs, self._borrowed = inputs, borrowed
        self._batch, self._positions, self._used = count, room, most
        self._set_buffers()

    def _allocate(self, positions: int, rows: Sequence[int] | None = None) -> None:
        """Reallocate the inputs with `positions`, keeping the contents of all rows or of `rows`.

        A failure leaves the cache unchanged. Only in-place buffers without a pool are replaced one
        by one, to save memory: a failure then leaves the cache without some of its inputs, so that
        runs refuse it.
        """
        batch = self._batch if rows is None else len(rows)
        moves = self._in_place and self._pool is None
        # An OrtValue that a run returned for a buffer does not own its memory; the one in `buffers`
        # does.
        old = dict(self.buffers)
        if moves:
            self.release()
            self.buffers = {}
        put, borrowed = self._placing(batch, positions)
        inputs = {}
        for spec in self._specs:
            _, heads, _, size = spec.shape
            if rows is not None and not self._in_place:
                values = self.inputs[spec.name].numpy()[list(rows)]
            else:
                values = np.zeros((batch, int(heads), positions, int(size)), spec.dtype)
                used = min(self._used, self._positions)
                if used:
                    taken = slice(None) if rows is None else list(rows)
                    values[:, :, :used] = self.inputs[spec.name].numpy()[taken, :, :used]
            inputs[spec.name] = put(spec.name, values)
            if moves:
                self.inputs.pop(spec.name, None)
                old.pop(present_of(spec.name), None)
        self.inputs, self._borrowed = inputs, borrowed
        self._batch, self._positions = batch, positions

    def _set_buffers(self) -> None:
        """Write outputs to the inputs, if the graph writes in place."""
        if not self._in_place:
            return
        self.release()
        outputs = dict(zip(self.outputs, self.inputs.values(), strict=True))
        bound = self._pool is None and self._device[0] == HOST
        self.buffers = FixedBuffers(self.inputs, outputs) if bound else outputs

    def release(self) -> None:
        """Release the bindings of the last run, which another cache can use then."""
        if isinstance(self.buffers, FixedBuffers):
            self.buffers.release()

    @property
    def length(self) -> int | None:
        """Positions of buffers with constant addresses and of their masks; None without them."""
        return None if self._pool is None else self._positions

    def step_mask(self, mask: NDArray[Any], new: int) -> NDArray[Any]:
        """The mask [rows, tokens] to feed to a run of `new` tokens.

        For buffers with constant addresses, a step's mask has a constant length, so that a captured
        run can be replayed.
        """
        if self.length is None or new != 1:
            return mask
        return np.pad(mask, ((0, 0), (0, self.length - mask.shape[1])))

    def _placing(
        self, rows: int, positions: int
    ) -> tuple[Callable[[str, NDArray[Any]], onnxruntime.OrtValue], BorrowedBuffers | None]:
        """Return a function (input name, array) → OrtValue, and the buffers that it writes to.

        The current buffers remain readable until all the new ones are written.
        """
        if self._pool is None or not positions:
            make = onnxruntime.OrtValue.ortvalue_from_numpy
            return lambda _, array: make(array, *self._device), None
        borrowed = self._pool.borrow(rows, positions, self._nbytes(rows, positions))
        return lambda name, array: borrowed.put(name, array, self._device), borrowed

    def _nbytes(self, rows: int, positions: int) -> int:
        return sum(
            rows * int(heads) * positions * int(size) * np.dtype(spec.dtype).itemsize
            for spec in self._specs
            for _, heads, _, size in [spec.shape]
        )


def span_of(positions: NDArray[np.intp]) -> NDArray[np.intp] | slice:
    """Sorted positions as a slice if they are consecutive, so that indexing makes no copy."""
    if not len(positions) or positions[-1] - positions[0] + 1 != len(positions):
        return positions
    return slice(int(positions[0]), int(positions[-1]) + 1)
