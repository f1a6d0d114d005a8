"""Convert images to what a vision tower takes, as the image processor of its model does.

    LLaVA, Gemma 3        pixel values                              [3, height, width]
    SmolVLM, Idefics 3    tiles, row by row, then the whole image   [3, side, side] each
    Qwen-VL               patches, 4 for each token                 [rows, columns, 4, values]

The values equal those of transformers' Pillow processors. Settings for other steps are refused by
name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from loradeploy.bundle.image.pixels import (
    PixelSettings,
    check_resizing,
    filter_of,
    height_width,
    is_side,
    processor_values,
    settings_of,
)
from loradeploy.bundle.names import PREPROCESSOR_NAME
from loradeploy.errors import BundleError, DataError, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

_LARGEST: Final = 4096  # pixels of a side after Idefics 3's first resizing
_RATIO: Final = 200  # largest ratio of an image's sides for Qwen-VL
_LANCZOS, _BICUBIC = 1, 3  # Pillow's numbers
# Default values of transformers' classes.
_IDEFICS: Final = {
    "resample": _LANCZOS,
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
_QWEN: Final = {
    "resample": _BICUBIC,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
_QWEN_SIZE: Final = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}  # pixels of an image


@dataclass(frozen=True, eq=False)
class ModelImage:
    """An image as a model takes it.

    `parts`: inputs of the tower, float32: one, or one for each tile and the whole image. `tiles`:
    the rows and columns of tiles; (0, 0) if the image is not split.
    """

    parts: tuple[NDArray[Any], ...]
    tiles: tuple[int, int] = (0, 0)


class ImageProcessor(Protocol):
    """Converts images."""

    def prepared(self, image: Image, where: str) -> ModelImage:
        """The image in `where`, which is RGB, as the model takes it.

        Raises:
            DataError: the image has a size that the processor cannot use.
        """


@dataclass(frozen=True)
class WholeImages:
    """One array for each image."""

    pixels: PixelSettings

    @classmethod
    def of(cls, values: Mapping[str, Any], file: Path) -> WholeImages:
        return cls(settings_of(values, file))

    def prepared(self, image: Image, where: str) -> ModelImage:
        """See `ImageProcessor`."""
        return ModelImage((self.pixels.values_of(image, where),))


@dataclass(frozen=True)
class TiledImages:
    """Tiles of `side` pixels, and the whole image as one more tile.

    `size`: the length to which the longest edge is resized first, (height, width), or None: no
    resizing. `splits`: False for the whole image alone. `pixels`: settings without resizing.
    """

    size: int | tuple[int, int] | None
    side: int
    splits: bool
    resample: int
    pixels: PixelSettings

    @classmethod
    def of(cls, values: Mapping[str, Any], file: Path) -> TiledImages:
        values = {**_IDEFICS, **values}
        side = _longest_edge(values["max_image_size"], "max_image_size", file)
        size: int | tuple[int, int] | None = None
        if values.get("do_resize", True) is not False:
            size = height_width(values["size"])
            if size is None or not all(map(is_side, size)):
                size = _longest_edge(values["size"], "size", file)
        splits = values.get("do_image_splitting", True)
        if type(splits) is not bool:
            raise BundleError(f"{file}: do_image_splitting is {shown(splits)}: give true or false")
        resample = filter_of(values, file)
        return cls(size, side, splits, resample, _without_resizing(values, file))

    def prepared(self, image: Image, where: str) -> ModelImage:
        """See `ImageProcessor`."""
        if isinstance(self.size, tuple):
            image = self._resized(image, *self.size)
        elif self.size is not None:
            image = self._resized(image, *_within(image, self.size))
        side = self.side
        tiles, parts = (0, 0), []
        if self.splits:
            height, width = _multiples(image, side)
            check_resizing(image, height, width, where)
            image = self._resized(image, height, width)
            if height > side or width > side:
                tiles = (height // side, width // side)
            for row in range(tiles[0]):
                for column in range(tiles[1]):
                    box = column * side, row * side, (column + 1) * side, (row + 1) * side
                    parts.append(image.crop(box))
        parts.append(self._resized(image, side, side))
        made = tuple(self.pixels.values_of(part, where) for part in parts)
        return ModelImage(made, tiles)

    def _resized(self, image: Image, height: int, width: int) -> Image:
        if image.size == (width, height):
            return image
        return image.resize((width, height), resample=self.resample)


@dataclass(frozen=True)
class PatchedImages:
    """Patches of `side` pixels, `merged` × `merged` of them for each token.

    `frames`: how often an image is repeated, as the frames of a patch. `sizes`: the least and the
    most pixels of an image after resizing; None: no resizing. `pixels`: settings without resizing.
    """

    side: int
    merged: int
    frames: int
    sizes: tuple[int, int] | None
    resample: int
    pixels: PixelSettings

    @classmethod
    def of(cls, values: Mapping[str, Any], file: Path) -> PatchedImages:
        values = {**_QWEN, **values}
        for name in ("patch_size", "merge_size", "temporal_patch_size"):
            if not is_side(values[name]):
                raise BundleError(f"{file}: {name} is {shown(values[name])}: give a number above 0")
        sizes = None
        if values.get("do_resize", True) is not False:
            sizes = _pixel_counts(values, file)
        return cls(
            side=values["patch_size"],
            merged=values["merge_size"],
            frames=values["temporal_patch_size"],
            sizes=sizes,
            resample=filter_of(values, file),
            pixels=_without_resizing(values, file),
        )

    def prepared(self, image: Image, where: str) -> ModelImage:
        """See `ImageProcessor`."""
        factor = self.side * self.merged
        width, height = image.size
        if self.sizes is not None:
            if max(height, width) > _RATIO * min(height, width):
                raise DataError(
                    f"{where} is {height} x {width} pixels, the model takes no image with one side"
                    f" more than {_RATIO} times as long as the other"
                )
            height, width = _fitting(height, width, factor, *self.sizes)
            image = image.resize((width, height), resample=self.resample)
        elif height % factor or width % factor:
            raise DataError(
                f"{where} is {height} x {width} pixels, the model takes multiples of {factor}"
            )
        values = self.pixels.values_of(image, where)  # [3, height, width]
        rows, columns = height // factor, width // factor
        apart = values.reshape(len(values), rows, self.merged, self.side, columns, self.merged, -1)
        # [rows, columns, merged, merged, 3, 1, side, side]
        patches = apart.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, np.newaxis]
        patches = patches.repeat(self.frames, axis=5)
        return ModelImage((patches.reshape(rows, columns, self.merged**2, -1),))


# By `image_processor_type`.
_PROCESSORS: Final[Mapping[str, Callable[[Mapping[str, Any], Path], ImageProcessor]]] = {
    "CLIPImageProcessor": WholeImages.of,
    "SiglipImageProcessor": WholeImages.of,
    "LlavaImageProcessor": WholeImages.of,
    "Gemma3ImageProcessor": WholeImages.of,
    "Idefics3ImageProcessor": TiledImages.of,
    "SmolVLMImageProcessor": TiledImages.of,
    "Qwen2VLImageProcessor": PatchedImages.of,
}


def image_processor(directory: Path) -> ImageProcessor:
    """The image processor of the model in a bundle's directory.

    Raises:
        BundleError: there are no settings of one, or it is not supported.
    """
    found = processor_values(directory)
    if found is None:
        raise BundleError(
            f"{directory} has no {PREPROCESSOR_NAME}, which says how an image becomes pixel values:"
            " put the one of the base there, or give pixel values"
        )
    values, file = found
    given = values.get("image_processor_type")
    # The names of variants of a class, which compute the same.
    name = str(given).removesuffix("Fast").removesuffix("Pil")
    if name not in _PROCESSORS:
        raise BundleError(
            f"{file}: image_processor_type is {shown(given)}, supported are"
            f" {', '.join(_PROCESSORS)}: give pixel values"
        )
    return _PROCESSORS[name](values, file)


def _without_resizing(values: Mapping[str, Any], file: Path) -> PixelSettings:
    """The settings of rescaling and normalizing alone."""
    own = ("do_resize", "do_image_splitting", "do_pad", "do_center_crop", "crop_size")
    return settings_of(
        {**{key: value for key, value in values.items() if key not in own}, "do_resize": False},
        file,
    )


def _longest_edge(given: Any, name: str, file: Path) -> int:
    if isinstance(given, Mapping) and set(given) == {"longest_edge"}:
        edge = given["longest_edge"]
        if is_side(edge):
            return int(edge)
    raise BundleError(
        f"{file}: {name} is {shown(given)}: give longest_edge, from 1 to {_LARGEST} pixels"
    )


def _pixel_counts(values: Mapping[str, Any], file: Path) -> tuple[int, int]:
    """The least and the most pixels of an image for Qwen-VL."""
    size = values.get("size") or {}
    if not isinstance(size, Mapping):
        raise BundleError(f"{file}: size is {shown(size)}: give shortest_edge and longest_edge")
    size = {**_QWEN_SIZE, **size}
    found = []
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        value = size[edge] if values.get(name) is None else values[name]
        if type(value) is not int or value < 1:
            raise BundleError(f"{file}: {name} is {shown(value)}: give a number of pixels")
        found.append(value)
    least, most = found
    return least, most


def _within(image: Image, longest: int) -> tuple[int, int]:
    """Height and width of an image whose longest edge is resized to `longest`.

    The other edge is even, except for what the limit of 4096 pixels changes.
    """
    width, height = image.size
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if width >= height and width > _LARGEST:
        width, height = _LARGEST, int(_LARGEST / ratio)
    elif height > width and height > _LARGEST:
        width, height = int(_LARGEST * ratio), _LARGEST
    return max(height, 1), max(width, 1)


def _multiples(image: Image, side: int) -> tuple[int, int]:
    """Height and width of an image resized to multiples of `side`."""
    width, height = image.size
    ratio = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        height = math.ceil(int(width / ratio) / side) * side
    else:
        height = math.ceil(height / side) * side
        width = math.ceil(int(height * ratio) / side) * side
    return height, width


def _fitting(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Height and width as multiples of `factor`, with `least` to `most` pixels, if possible."""
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if high * wide > most:
        by = math.sqrt(height * width / most)
        high = max(factor, math.floor(height / by / factor) * factor)
        wide = max(factor, math.floor(width / by / factor) * factor)
    elif high * wide < least:
        by = math.sqrt(least / (height * width))
        high, wide = (math.ceil(size * by / factor) * factor for size in (height, width))
    return high, wide
