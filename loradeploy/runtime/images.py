"""Batches of images as feeds of a bundle's graph, each image with its own adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.image.pixels import pixel_settings
from loradeploy.bundle.names import PIXEL_VALUES, PREPROCESSOR_NAME
from loradeploy.errors import BundleError, RunError, UsageError
from loradeploy.given_numbers import checked_count
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.arguments import Adapters, each_row
from loradeploy.runtime.held import HeldAdapters
from loradeploy.runtime.session import AdapterSession

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.image.opening import GivenImage


@dataclass(frozen=True)
class ImageBatch:
    """The images numbered `rows`, their leased adapters, and feeds for them.

    `adapters`: the adapter of each image.
    """

    held: HeldAdapters
    rows: range
    adapters: Sequence[AdapterSpec | None]
    feeds: dict[str, NDArray[Any]]


class ImageReader:
    """Computes pixel values as the preprocessor_config.json of a session's bundle describes.

    Raises:
        BundleError: the bundle has no such file, or it does not fit the graph.
    """

    def __init__(self, session: AdapterSession) -> None:
        settings = pixel_settings(session.path)
        if settings is None:
            raise BundleError(
                f"{session.path} has no {PREPROCESSOR_NAME}, which says how an image becomes pixel"
                " values: put the one of the base there, or use AdapterSession.run"
            )
        self._session = session
        self._settings = settings
        (spec,) = (spec for spec in session.manifest.inputs if spec.name == PIXEL_VALUES)
        self._sizes, self._dtype = spec.shape[1:], spec.dtype

    def batches(
        self, images: GivenImage | Sequence[GivenImage], adapters: Adapters, batch_size: int
    ) -> Iterator[ImageBatch]:
        """Yield the images in batches, in their order.

        Raises:
            UsageError: no images, one that is not an image, or not one adapter for each.
            DataError: a file cannot be read as an image.
            MissingDependencyError: Pillow is not installed.
            UnknownAdapterError: an adapter that was never loaded.
        """
        batch_size = checked_count("batch_size", batch_size)
        given = list(images) if isinstance(images, list | tuple) else [images]
        if not given:
            raise UsageError("there are no images")
        names = each_row(adapters, len(given))
        for start in range(0, len(given), batch_size):
            rows = range(start, min(start + batch_size, len(given)))
            pixels = np.stack(list(self._pixels(given, rows)))  # [batch, 3, height, width]
            own = [names[row] for row in rows]
            with self._session.hold(own) as held:
                yield ImageBatch(held, rows, own, {PIXEL_VALUES: pixels.astype(self._dtype)})

    def _pixels(self, images: Sequence[Any], rows: Sequence[int]) -> Iterator[Any]:
        for row in rows:
            values = self._settings.values(images[row], f"image {row + 1}")
            sizes = zip(values.shape, self._sizes, strict=True)
            if any(isinstance(size, int) and size != own for own, size in sizes):
                raise BundleError(
                    f"{self._session.path / PREPROCESSOR_NAME} makes pixel values"
                    f" {list(values.shape)}, the graph takes {list(self._sizes)}"
                )
            yield values


def check_finite(values: NDArray[Any], row: int) -> None:
    """Raise RunError unless the graph's outputs `values` for the image `row` are finite."""
    if not np.isfinite(values).all():
        raise RunError(
            f"image {row + 1}: the graph gave numbers that are not finite: run"
            " `loradeploy parity` on the bundle and the adapter"
        )
