"""The inputs of a model for rows of tokens, by name: the same for PyTorch and all graphs.

A row of tokens determines all of its inputs: an image or a sound is noise seeded by the tokens, and
the target of an encoder-decoder consists of the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.image.pixels import PixelSettings
from loradeploy.bundle.names import (
    ATTENTION_MASK,
    DECODER_INPUT_IDS,
    ENCODER_ATTENTION_MASK,
    INPUT_FEATURES,
    INPUT_IDS,
    PAST,
    PIXEL_VALUES,
    POSITION_IDS,
    TOKEN_TYPE_IDS,
)
from loradeploy.bundle.sample import GRID, in_patches
from loradeploy.errors import DataError, UsageError, shown
from loradeploy.runtime.text.padding import positions_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest, TensorSpec

    Ids = NDArray[np.int64]

Tokens = tuple[int, ...]
# The token types of pairs of texts, by the row's tokens.
Types = Mapping[Tokens, Tokens]


@dataclass(frozen=True)
class Picture:
    """The image file that a row of tokens stands for, and the settings of its preprocessing."""

    file: Path
    settings: PixelSettings

    def values(self) -> NDArray[np.float32]:
        """Return pixel values [3, height, width]; raise DataError if the file cannot be read."""
        return self.settings.values(self.file)


# Additional inputs of rows, by their tokens: the token types of a pair, or an image.
Known = Mapping[Tokens, Tokens | Picture]

# Tokens of an encoder-decoder's target, for a source of any length.
TARGET: Final = 8


def plain_feeds(
    manifest: Manifest, ids: Ids, mask: Ids, known: Known | None = None
) -> dict[str, NDArray[Any]]:
    """Return the inputs except the cache for `ids` [rows, new tokens] and `mask` [rows, tokens].

    `known`: token types or images of rows, by their tokens; other rows have token types 0, and
    noise as their image.
    """
    feeds = {
        spec.name: _MAKERS[spec.name](ids, mask, spec).astype(spec.dtype, copy=False)
        for spec in manifest.inputs
        if spec.name in _MAKERS
    }
    for row, real in enumerate(mask.astype(bool) if known else ()):
        own = known.get(tuple(ids[row, real].tolist())) if known else None
        if isinstance(own, Picture):
            feeds[PIXEL_VALUES][row] = own.values()
        elif own is not None and TOKEN_TYPE_IDS in feeds:
            feeds[TOKEN_TYPE_IDS][row, real] = own
    return feeds


def types_of(rows: Iterable[tuple[Tokens, Tokens | None]]) -> Types:
    """Return token types by tokens, for `rows` of (tokens, types or None if all types are 0).

    Raises:
        DataError: two rows of the same tokens have different types.
    """
    found: dict[Tokens, Tokens] = {}
    for tokens, types in rows:
        own = types or (0,) * len(tokens)
        if found.setdefault(tokens, own) != own:
            raise DataError(
                f"a text and a pair of texts are the same tokens {shown(tokens)}: leave one out"
            )
    return {tokens: types for tokens, types in found.items() if any(types)}


def check_inputs(manifest: Manifest) -> None:
    """Raise UsageError if the graph has an input that cannot be derived from tokens.

    Halves of encoder-decoders are refused too: PyTorch's model is the whole.
    """
    if any(name.rpartition(".")[2] in _HALVES for name in manifest.other_part):
        raise UsageError(
            "parity compares whole models, and this bundle is one half of an encoder-decoder:"
            " export the PyTorch checkpoint, or compare the half with `loradeploy.compare`"
        )
    for spec in manifest.inputs:
        sized = spec.name not in _DRAWN or all(isinstance(size, int) for size in _sizes(spec))
        if (spec.name not in _MAKERS and not spec.name.startswith(PAST)) or not sized:
            shape = ", ".join(map(str, spec.shape))
            raise UsageError(
                f"parity cannot feed a {manifest.task} bundle's {spec.name} [{shape}]: it knows"
                f" {', '.join(_MAKERS)}, and images and sounds of fixed sizes"
            )
    _check_sizes(manifest)


def _check_sizes(manifest: Manifest) -> None:
    """Raise UsageError unless batch size and length of the graph's inputs are dynamic."""
    for spec in manifest.inputs:
        free = 1 if manifest.tower is not None or spec.name not in _TOKENS else 2
        if any(isinstance(size, int) for size in spec.shape[:free]):
            shape = ", ".join(map(str, spec.shape))
            raise UsageError(
                f"the graph takes {spec.name} [{shape}], and parity feeds rows of many lengths,"
                " alone and in batches: check a bundle of the same model whose batch and sequence"
                " are free"
            )


def _noise(ids: Ids, mask: Ids, spec: TensorSpec) -> NDArray[np.float32]:
    """Return normal noise [rows, …], exact in float16 and seeded by each row's tokens."""
    sizes = [int(size) for size in _sizes(spec)]
    drawn = [np.random.default_rng(row).standard_normal(sizes) for row in _real(ids, mask)]
    return np.stack(drawn).astype(np.float16).astype(np.float32)


def _sizes(spec: TensorSpec) -> tuple[int | str, ...]:
    """Return the shape of one image or sound; an image in patches gets the grid `GRID`."""
    return (*GRID, *spec.shape[3:]) if in_patches(spec) else spec.shape[1:]


def _target(ids: Ids, mask: Ids, spec: TensorSpec) -> Ids:
    """Return targets [rows, TARGET] that repeat the tokens of each row."""
    return np.stack([np.resize(row, TARGET) for row in _real(ids, mask)])


def _real(ids: Ids, mask: Ids) -> list[Ids]:
    """Return the tokens of each row without padding."""
    return [row[real] for row, real in zip(ids, mask.astype(bool), strict=True)]


_HALVES: Final = ("encoder", "decoder")
_DRAWN: Final = (PIXEL_VALUES, INPUT_FEATURES)
# The inputs of shape [rows, tokens].
_TOKENS: Final = (
    *(INPUT_IDS, ATTENTION_MASK, POSITION_IDS, TOKEN_TYPE_IDS),
    *(DECODER_INPUT_IDS, ENCODER_ATTENTION_MASK),
)
_MAKERS: Final[Mapping[str, Callable[[Ids, Ids, TensorSpec], NDArray[Any]]]] = {
    INPUT_IDS: lambda ids, mask, spec: ids,
    ATTENTION_MASK: lambda ids, mask, spec: mask,
    POSITION_IDS: lambda ids, mask, spec: positions_of(mask, ids.shape[1]),
    TOKEN_TYPE_IDS: lambda ids, mask, spec: np.zeros_like(ids),
    DECODER_INPUT_IDS: _target,
    ENCODER_ATTENTION_MASK: lambda ids, mask, spec: mask,
    **dict.fromkeys(_DRAWN, _noise),
}
FED: Final = tuple(_MAKERS)
