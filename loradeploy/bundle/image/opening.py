"""Open images with Pillow, as RGB, and refuse those that would be read with wrong values."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.errors import (
    DataError,
    LoraDeployError,
    MissingDependencyError,
    UsageError,
    first_line,
    shown,
)
from loradeploy.files import check_file

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    # A file, an image of Pillow, or uint8 [height, width, 3].
    GivenImage = str | os.PathLike[str] | Image | NDArray[np.uint8]

# Pillow's modes with up to 8 bits per channel. `convert("RGB")` clips others, such as I;16, at 255.
_MODES: Final = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
# Advice for other modes: how to convert their values to 8 bits.
_TO_BYTES: Final = dict.fromkeys(
    ("I;16", "I;16L", "I;16B", "I;16N"),
    "convert it, such as with Image.fromarray((numpy.asarray(image) >> 8).astype('uint8'))",
)
_SCALED: Final = "scale its values to 0 to 255 and store them as uint8"
# Formats of images from clients.
FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF")
# Formats that Pillow gives to other programs to draw (Ghostscript, Windows), which run their code.
_DRAWN: Final = ("EPS", "WMF")


def opened(given: GivenImage, where: str = "the image") -> Image:
    """The image as RGB, with what is transparent on white: of an animation, the first frame.

    An image file is rotated by its EXIF orientation.

    Raises:
        UsageError: it is not an image with 8 bits per channel.
        DataError: the file cannot be read as an image with 8 bits per channel, or has more pixels
            than Pillow allows (`PIL.Image.MAX_IMAGE_PIXELS`).
        MissingDependencyError: Pillow is not installed.
    """
    pil = pillow()
    if isinstance(given, str | os.PathLike):
        file = Path(given)
        check_file(file, error=DataError)
        pil.init()
        formats = tuple(name for name in pil.OPEN if name not in _DRAWN)
        return _read(file, str(file), pil.MAX_IMAGE_PIXELS, formats)
    if isinstance(given, pil.Image):
        _check_mode(given, where, UsageError)
        return _as_rgb(given)
    if not isinstance(given, np.ndarray):
        raise UsageError(f"{where} is {shown(given)}: give a path, an image of Pillow, or an array")
    if given.dtype != np.uint8 or given.ndim != 3 or given.shape[2] != 3 or not given.size:
        raise UsageError(
            f"{where} is an array {given.dtype} {list(given.shape)}: give uint8 [height, width, 3]"
        )
    made: Image = pil.fromarray(given)
    return made


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """The bytes of an image file from a client, in one of `FORMATS`.

    `where`: its name in messages. `most_pixels`: the largest number of pixels that is decoded.
    """

    content: bytes
    where: str
    most_pixels: int

    def decoded(self) -> Image:
        """The image, as `opened` reads it.

        Raises:
            DataError: it cannot be read, or has more than `most_pixels` pixels.
            MissingDependencyError: Pillow is not installed.
        """
        return _read(io.BytesIO(self.content), self.where, self.most_pixels, FORMATS)


def pillow() -> Any:
    """The module PIL.Image.

    Raises:
        MissingDependencyError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependencyError("images are read by Pillow: pip install pillow") from None
    return Image


def _read(
    source: Path | io.BytesIO, where: str, most: int | None, formats: tuple[str, ...]
) -> Image:
    """The image in a file; its size is checked before its pixels are decoded."""
    pil = pillow()
    from PIL import ImageOps

    try:
        with pil.open(source, formats=formats) as image:
            width, height = image.size
            if most is not None and width * height > most:
                raise DataError(
                    f"{where} is {height} x {width} pixels, more than the {most:,} that are read:"
                    " resize it"
                )
            upright = ImageOps.exif_transpose(image)
            upright.load()
    except LoraDeployError:
        raise
    except Exception as problem:  # Pillow's readers raise exceptions of many types
        raise DataError(f"{where} cannot be read as an image: {first_line(problem)}") from None
    _check_mode(upright, where, DataError)
    return _as_rgb(upright)


def _as_rgb(image: Image) -> Image:
    """The image as RGB; transparency is composited onto white, as in transformers 5."""
    pil = pillow()
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = pil.new("RGBA", image.size, (255, 255, 255, 255))
        image = pil.alpha_composite(white, image)
    return image.convert("RGB")


def _check_mode(image: Image, where: str, error: type[LoraDeployError]) -> None:
    """Raise `error` if the values of the image's mode do not fit in 8 bits."""
    if image.mode in _MODES:
        return
    raise error(
        f"{where} has the mode {image.mode}, expected one of {', '.join(_MODES)}:"
        f" {_TO_BYTES.get(image.mode, _SCALED)}"
    )
