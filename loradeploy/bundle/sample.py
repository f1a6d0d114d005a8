"""Make feeds for a trial run of a graph from the names and shapes of its inputs.

Rows are random tokens below a bound, nothing is masked, a cache is all zeros. The role of a
dimension follows from its input and axis (`past_axis`, `_DIMENSIONS`), or from its symbol if
another input uses the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.manifest import TensorSpec
from loradeploy.bundle.names import (
    CACHE_POSITION,
    DECODER_INPUT_IDS,
    ENCODER_ATTENTION_MASK,
    INPUT_FEATURES,
    INPUT_IDS,
    PAST,
    PIXEL_VALUES,
    POSITION_IDS,
    is_cross,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

Feeds = dict[str, "NDArray[Any]"]

_BATCH, _SEQUENCE = 2, 4
GRID: Final = (5, 6)  # rows and columns of an image in patches
# The range of token ids: above the special tokens of most vocabularies, below the smallest size.
_FIRST_TOKEN, _END_TOKEN = 4, 48
_PATCHES: Final = 5  # dimensions of images in patches
UNNAMED: Final = ("", "?")
# The role of a dimension by input and axis; the first that applies.
_DIMENSIONS: Final[tuple[tuple[Callable[[str, int, int], bool], str], ...]] = (
    (lambda name, axis, rank: name == CACHE_POSITION, "sequence"),
    (lambda name, axis, rank: axis == 0 and rank > 0, "batch"),
    (lambda name, axis, rank: is_cross(name) and axis == rank - 2, "source"),
    (lambda name, axis, rank: name == ENCODER_ATTENTION_MASK and axis == 1, "source"),
    (lambda name, axis, rank: name == INPUT_IDS and axis == 1, "sequence"),
    (lambda name, axis, rank: "mask" in name and axis == rank - 1, "total"),
)


class Sample:
    """Makes feeds for a graph with the inputs `specs`; `config` has the sizes of images and audio.

    `pad`: the padding token, which is not used.
    """

    def __init__(
        self, specs: Sequence[TensorSpec], config: Mapping[str, Any], *, pad: int | None = None
    ) -> None:
        self._specs = specs
        self._config = config
        size = config.get("vocab_size")
        end = min(size, _END_TOKEN) if isinstance(size, int) and size > 0 else _END_TOKEN
        start = _FIRST_TOKEN if end > _FIRST_TOKEN + 1 else 0
        self._tokens = np.array([t for t in range(start, end) if t != pad] or [0], np.int64)

    def tokens(self, rows: int, length: int, *, seed: int = 0) -> NDArray[np.int64]:
        """Random tokens [rows, length], none of them padding."""
        return np.random.default_rng(seed).choice(self._tokens, (rows, length))

    def feeds(self, batch: int = _BATCH, sequence: int = _SEQUENCE, past: int = 0) -> Feeds:
        """A feed for every input: `sequence` tokens after `past`, if the graph has no fixed size.

        Raises:
            TypeError: an input has a dtype that numpy lacks.
        """
        past = next((size for spec in self._specs if (size := _fixed(spec, "past"))), past)
        sequence = next(
            (size for spec in self._specs if (size := _fixed(spec, "sequence"))), sequence
        )
        # The mask of an encoder-decoder is for its source, which has no cache before it.
        halves = any(spec.name == DECODER_INPUT_IDS for spec in self._specs)
        total = sequence if halves else past + sequence
        sizes = {
            "batch": batch,
            "source": sequence,
            "sequence": sequence,
            "past": past,
            "total": total,
        }
        symbols: dict[str, int] = {}
        for spec in sorted(self._specs, key=lambda spec: spec.name != INPUT_IDS):
            for axis, symbol in enumerate(spec.shape):
                dimension = _dimension_of(spec, axis)
                if isinstance(symbol, str) and symbol not in UNNAMED and dimension is not None:
                    symbols.setdefault(symbol, sizes[dimension])
        return {
            spec.name: self._values(spec, self._shape(spec, sizes, symbols), past)
            for spec in self._specs
        }

    def _values(self, spec: TensorSpec, shape: tuple[int, ...], past: int) -> NDArray[Any]:
        name, dtype = spec.name, np.dtype(spec.dtype)
        random = np.random.default_rng(zlib.crc32(name.encode()))
        if "past" in name and not is_cross(name):
            return np.zeros(shape, dtype)
        if "mask" in name:
            return np.ones(shape, dtype)
        if name in (POSITION_IDS, CACHE_POSITION):
            return np.broadcast_to(np.arange(shape[-1]) + past, shape).astype(dtype)
        if dtype.kind == "f":
            return random.standard_normal(shape).astype(dtype)
        if "ids" in name and "type" not in name:
            return random.choice(self._tokens, shape).astype(dtype)
        return np.zeros(shape, dtype)  # token types, and switches such as use_cache_branch

    def _shape(
        self, spec: TensorSpec, sizes: Mapping[str, int], symbols: Mapping[str, int]
    ) -> tuple[int, ...]:
        configured = self._configured(spec)
        shape = []
        for axis, size in enumerate(spec.shape):
            dimension = _dimension_of(spec, axis)
            if isinstance(size, int):
                shape.append(size)
            elif dimension is not None:
                shape.append(sizes[dimension])
            else:
                shape.append(configured.get(axis, symbols.get(size, sizes["sequence"])))
        return tuple(shape)

    def _configured(self, spec: TensorSpec) -> dict[int, int]:
        """Sizes of images and audio from the config, by axis."""
        config = self._config
        if isinstance(part := config.get("vision_config"), Mapping) and "image_size" not in config:
            config = part
        if in_patches(spec):
            return dict(enumerate(GRID, start=1))
        if spec.name == PIXEL_VALUES:
            size = config.get("image_size", 224)
            height, width = size if isinstance(size, list | tuple) else (size, size)
            return {1: int(config.get("num_channels", 3)), 2: int(height), 3: int(width)}
        if spec.name == INPUT_FEATURES:
            frames = 2 * int(config.get("max_source_positions", 1500))
            return {1: int(config.get("num_mel_bins", 80)), 2: frames}
        return {}


def in_patches(spec: TensorSpec) -> bool:
    """Whether an input has images in patches, [images, rows, columns, merged, values]."""
    return spec.name == PIXEL_VALUES and len(spec.shape) == _PATCHES


def past_axis(spec: TensorSpec) -> int | None:
    """The axis of the past tokens in a cache; None for other inputs.

    It is the last but one, [batch, heads, past, size] and [layers, 2, batch, heads, past, size], or
    the only symbol behind the first, [batch, past, heads, size].
    """
    if not spec.name.startswith(PAST.rstrip(".")) or is_cross(spec.name):
        return None
    usual = len(spec.shape) - 2
    symbols = [axis for axis, size in enumerate(spec.shape) if axis and isinstance(size, str)]
    return symbols[0] if len(symbols) == 1 and symbols != [usual] else usual


def _dimension_of(spec: TensorSpec, axis: int) -> str | None:
    if axis and axis == past_axis(spec):
        return "past"
    rank = len(spec.shape)
    return next((size for applies, size in _DIMENSIONS if applies(spec.name, axis, rank)), None)


def _fixed(spec: TensorSpec, dimension: str) -> int | None:
    """The static size of a dimension in the graph, or None."""
    sizes = [size for axis, size in enumerate(spec.shape) if _dimension_of(spec, axis) == dimension]
    return next((size for size in sizes if isinstance(size, int)), None)
