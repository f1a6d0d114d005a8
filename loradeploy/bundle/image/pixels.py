"""Convert images to pixel values as preprocessor_config.json states, with numpy and Pillow.

The steps are those of transformers' Pillow processors for ViT, DeiT, CLIP and SigLIP: convert to
RGB, resize, center crop, rescale, normalize. Settings for other steps are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.image.opening import opened
from loradeploy.bundle.names import PREPROCESSOR_NAME, PROCESSOR_NAME
from loradeploy.errors import BundleError, DataError, shown
from loradeploy.files import read_json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from loradeploy.bundle.image.opening import GivenImage

_NESTED: Final = "image_processor"
_DONE: Final = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
_SCALE: Final = 1 / 255
_FILTERS: Final = range(6)  # Pillow's numbers of resampling filters
_LARGEST: Final = 4096  # pixels of a side
# Pixels of a resized image. A narrow image whose short side is enlarged would fill the memory.
_MOST_PIXELS: Final = 4 * _LARGEST**2


@dataclass(frozen=True)
class PixelSettings:
    """How images are converted to pixel values.

    `size`: (height, width) to resize to, or the length of the shortest edge; None: no resizing.
    `resample`: Pillow's number of the filter. `crop`: (height, width) of the center crop, or None.
    `scale`: the factor for values from 0 to 255. `mean`, `std`: for each channel.
    """

    size: tuple[int, int] | int | None
    resample: int
    crop: tuple[int, int] | None
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def values(self, given: GivenImage, where: str = "the image") -> NDArray[np.float32]:
        """The pixel values of an image: float32 [3, height, width].

        Raises:
            UsageError: it is not an image with 8 bits per channel.
            DataError: the file cannot be read as an image with 8 bits per channel, or the image is
                smaller than the crop, or too narrow to be resized.
            MissingDependencyError: Pillow is not installed.
        """
        return self.values_of(opened(given, where), where)

    def values_of(self, image: Image, where: str) -> NDArray[np.float32]:
        """Like `values`, of an image that was opened as RGB."""
        resized = _resized(image, self.size, self.resample, where)
        pixels = np.asarray(resized)  # uint8 [height, width, 3]
        if self.crop is not None:
            pixels = _cropped(pixels, self.crop, where)
        scaled = (pixels.astype(np.float64) * self.scale).astype(np.float32)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))


def pixel_settings(directory: Path) -> PixelSettings | None:
    """The settings in a checkpoint's or a bundle's directory; None if it has none.

    Raises:
        BundleError: a value is missing or out of range, or the processor has other steps.
    """
    found = processor_values(directory)
    return None if found is None else settings_of(*found)


def processor_values(directory: Path) -> tuple[Mapping[str, Any], Path] | None:
    """The image processor's values in a directory, and their file; None if it has none.

    Like transformers, those within processor_config.json take precedence.

    Raises:
        BundleError: a file cannot be read, or has no object.
    """
    for name in (PROCESSOR_NAME, PREPROCESSOR_NAME):
        file = directory / name
        if not file.is_file():
            continue
        values: Any = read_json(file, error=BundleError)
        if name == PROCESSOR_NAME:
            values = values.get(_NESTED)
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise BundleError(f"{file}: {_NESTED} is not an object")
        return values, file
    return None


def settings_of(values: Mapping[str, Any], file: Path) -> PixelSettings:
    """The settings by an image processor's `values`, which were read from `file`.

    Raises:
        BundleError: a value is missing or out of range, or the processor has other steps.
    """
    more = [key for key in values if key.startswith("do_") and values[key] and key not in _DONE]
    more += [key for key in ("crop_pct", "size_divisor") if values.get(key) is not None]
    if more:
        raise BundleError(f"{file}: {more[0]} is {shown(values[more[0]])}, which is not supported")
    for key in _DONE:
        if values.get(key) not in (None, True, False):
            raise BundleError(f"{file}: {key} is {shown(values[key])}, expected true or false")
    crops = values.get("do_center_crop")
    if crops is None and values.get("crop_size") is not None:
        raise BundleError(f"{file} has a crop_size, and no do_center_crop: set it to true or false")
    size: tuple[int, int] | int | None = None
    resample = 2
    if values.get("do_resize", True) is not False:
        size = _size(values.get("size"), file, crops=bool(crops))
        resample = filter_of(values, file)
    crop = None
    if crops:
        found = values.get("crop_size")
        crop = (found, found) if type(found) is int else height_width(found)
        if crop is None or not all(map(is_side, crop)):
            raise BundleError(f"{file}: crop_size is {shown(found)}: give height and width")
    scale = 1.0
    if values.get("do_rescale", True) is not False:
        scale = _number(values.get("rescale_factor", _SCALE), "rescale_factor", file)
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if values.get("do_normalize", True) is not False:
        mean = _channels(values.get("image_mean"), "image_mean", file)
        std = _channels(values.get("image_std"), "image_std", file)
        if not all(std):
            raise BundleError(f"{file}: image_std is {shown(std)}, expected numbers other than 0")
    return PixelSettings(size, resample, crop, scale, mean, std)


def filter_of(values: Mapping[str, Any], file: Path) -> int:
    """Pillow's number of the resampling filter.

    Raises:
        BundleError: it is missing or out of range.
    """
    resample = values.get("resample")
    if type(resample) is not int or resample not in _FILTERS:
        raise BundleError(f"{file}: resample is {shown(resample)}, expected a number from 0 to 5")
    return resample


def _size(given: Any, file: Path, *, crops: bool) -> tuple[int, int] | int:
    found: tuple[Any, Any] | int | None = height_width(given)
    if type(given) is int and not crops:
        found = (given, given)
    if isinstance(given, Mapping) and set(given) == {"shortest_edge"}:
        found = given["shortest_edge"]
    sides = found if isinstance(found, tuple) else (found,)
    if not all(map(is_side, sides)):
        raise BundleError(
            f"{file}: size is {shown(given)}: give height and width, or shortest_edge, from 1 to"
            f" {_LARGEST}"
        )
    assert found is not None
    return found


def height_width(given: Any) -> tuple[Any, Any] | None:
    """The values of an object with exactly height and width; None for another one."""
    if isinstance(given, Mapping) and set(given) == {"height", "width"}:
        return given["height"], given["width"]
    return None


def is_side(value: Any) -> bool:
    """Whether a value is a length of a side in pixels, within the limit."""
    return type(value) is int and 0 < value <= _LARGEST


def _number(value: Any, name: str, file: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise BundleError(f"{file}: {name} is {shown(value)}, expected a number")
    return float(value)


def _channels(value: Any, name: str, file: Path) -> tuple[float, float, float]:
    if not isinstance(value, list) or len(value) != 3:
        raise BundleError(f"{file}: {name} is {shown(value)}, three numbers are needed")
    red, green, blue = (_number(one, name, file) for one in value)
    return red, green, blue


def check_resizing(image: Image, height: int, width: int, where: str) -> None:
    """Raise DataError if the image in `where` would have too many pixels after it is resized."""
    if height * width > _MOST_PIXELS:
        raise DataError(
            f"{where} is {image.height} x {image.width} pixels, and {height} x {width} after the"
            f" model's resizing, more than {_MOST_PIXELS:,}: crop it"
        )


def _resized(image: Image, size: tuple[int, int] | int | None, resample: int, where: str) -> Image:
    if size is None:
        return image
    if isinstance(size, int):
        width, height = image.size
        longest = int(size * max(width, height) / min(width, height))
        size = (size, longest) if height <= width else (longest, size)
    check_resizing(image, *size, where)
    return image.resize((size[1], size[0]), resample=resample)


def _cropped(pixels: Any, crop: tuple[int, int], where: str) -> Any:
    height, width = pixels.shape[:2]
    if height < crop[0] or width < crop[1]:
        raise DataError(f"{where} is {height} x {width} pixels, smaller than the crop {list(crop)}")
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    return pixels[top : top + crop[0], left : left + crop[1]]
