"""Sizes of images that a vision tower takes, and their numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.names import IMAGE_FEATURES, PIXEL_VALUES
from loradeploy.bundle.sample import in_patches
from loradeploy.errors import BundleError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import TensorSpec
    from loradeploy.runtime.decoding.mrope import Grid
    from loradeploy.runtime.session import AdapterSession

Shape = tuple[int, ...]
# Processors divide pixels by 255 and normalize them, so that values are below 3.
_LARGEST: Final = 16.0


@dataclass(frozen=True)
class ImageSizes:
    """`pixels`: the tower's input. `features`: number per image, if fixed; otherwise None."""

    pixels: TensorSpec
    features: int | None

    @classmethod
    def of(cls, tower: AdapterSession) -> ImageSizes:
        """The sizes of a session on a vision tower.

        Raises:
            BundleError: the number of features of an image is unknown.
        """
        (pixels,) = (s for s in tower.manifest.inputs if s.name == PIXEL_VALUES)
        (found,) = (s for s in tower.manifest.outputs if s.name == IMAGE_FEATURES)
        features = found.shape[1] if isinstance(found.shape[1], int) else None
        if features is None and not in_patches(pixels):
            raise BundleError(f"{tower.path} does not say how many features an image has")
        return cls(pixels, features)

    def checked(self, image: object, what: str) -> Shape:
        """Return the shape of an image of `what`; raise UsageError if the tower refuses it."""
        values = np.asarray(image)
        expected = self.pixels.shape[1:]
        fits = len(values.shape) == len(expected) and all(
            size == other or (isinstance(other, str) and size > 0)
            for size, other in zip(values.shape, expected, strict=True)
        )
        if not fits or values.dtype.kind != "f":
            names = ", ".join(map(str, expected))
            raise UsageError(
                f"an image of {what} is {values.dtype} {list(values.shape)}, expected pixel values"
                f" of floats [{names}]"
            )
        largest = max(values.max(), -values.min())
        if largest > _LARGEST:
            raise UsageError(
                f"an image of {what} has pixel values up to {largest:.4g}, expected normalized"
                " ones, as transformers' processor makes them"
            )
        return values.shape

    def tokens(self, shape: Shape) -> int:
        """The number of tokens of an image of `shape`."""
        return shape[0] * shape[1] if self.features is None else self.features

    def grids(self, shapes: Sequence[Shape]) -> tuple[Grid, ...] | None:
        """Rows and columns of tokens of images in patches; None for other images."""
        if not in_patches(self.pixels):
            return None
        return tuple((rows, columns) for rows, columns, *_ in shapes)

    def split(self, pixel_values: Any, image_grid_thw: Any) -> list[NDArray[Any]]:
        """See `ImageTextGenerator.split`."""
        if not in_patches(self.pixels):
            raise UsageError(
                "this tower takes images of one size, no patches: give each image's pixel values"
            )
        merged, width = map(int, self.pixels.shape[3:])
        patches, grids = np.asarray(pixel_values), np.asarray(image_grid_thw)
        if patches.ndim != 2 or patches.shape[1] != width or grids.ndim != 2 or grids.shape[1] != 3:
            raise UsageError(
                f"pixel_values are {list(patches.shape)} and image_grid_thw {list(grids.shape)},"
                f" expected [patches, {width}] and [images, 3]"
            )
        side = round(merged**0.5)
        for number, (time, down, across) in enumerate(grids.tolist()):
            if time != 1:
                raise UsageError(
                    f"image {number + 1} has {time} frames: videos are not supported, give images"
                )
            if down < 1 or across < 1 or down % side or across % side:
                raise UsageError(
                    f"image {number + 1} is of {down} x {across} patches, expected multiples of"
                    f" {side}"
                )
        counts = grids.prod(axis=1)
        if counts.sum() != len(patches):
            raise UsageError(
                f"pixel_values has {len(patches)} patches, image_grid_thw {counts.sum()} together"
            )
        parts = np.split(patches, counts.cumsum()[:-1])
        return [
            part.reshape(int(down) // side, int(across) // side, merged, width)
            for part, (_, down, across) in zip(parts, grids, strict=True)
        ]
