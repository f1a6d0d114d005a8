"""Labels of images from a bundle, each image with its own adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.heads import SINGLE_LABEL, Head, stated_problem
from loradeploy.adapter.tasks import IMAGE_CLASSIFICATION
from loradeploy.bundle.image.pixels import PREPROCESSOR_NAME, pixel_settings
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import CONFIG_NAME, PIXEL_VALUES
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import BundleError, RunError, UsageError
from loradeploy.runtime.arguments import Adapters, check_count, each_row
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.classification import (
    Classification,
    base_head,
    classified,
    head_of_row,
    named_outputs,
)

if TYPE_CHECKING:
    from loradeploy.bundle.image.pixels import GivenImage


class ImageClassifier:
    """Classifies images with a session on an image classification bundle.

    Images become pixel values as the base's preprocessor_config.json specifies: in numpy and
    Pillow, as transformers' processors of ViT, DeiT, CLIP and SigLIP do.

    Raises:
        UsageError: the bundle is no classifier of images.
        BundleError: it has no preprocessor_config.json, or one that does not fit its graph.
    """

    def __init__(self, session: AdapterSession) -> None:
        if session.manifest.task != IMAGE_CLASSIFICATION:
            raise UsageError(
                f"{session.path} is a {session.manifest.task} bundle, no classifier of images"
            )
        settings = pixel_settings(session.path)
        if settings is None:
            raise BundleError(
                f"{session.path} has no {PREPROCESSOR_NAME}, which says how an image becomes pixel"
                " values: put the one of the base there, or use AdapterSession.run"
            )
        self.session = session
        self._settings = settings
        self._head = base_head(session)
        stated = stated_problem(model_config(session.path), CONFIG_NAME, error=BundleError)
        self._problem = stated or SINGLE_LABEL
        (spec,) = (spec for spec in session.manifest.inputs if spec.name == PIXEL_VALUES)
        self._sizes, self._dtype = spec.shape[1:], spec.dtype

    def __call__(
        self,
        images: GivenImage | Sequence[GivenImage],
        adapters: Adapters = None,
        *,
        batch_size: int = 32,
    ) -> list[Classification]:
        """What each image is. `adapters` is as in `AdapterSession.run`.

        An image is a path, an image of Pillow, or an array uint8 [height, width, 3].

        Raises:
            UsageError: no images, one is none, or not one adapter for each.
            DataError: a file cannot be read as an image.
            MissingDependencyError: Pillow is not installed.
            UnknownAdapterError: an adapter that was never loaded.
            RunError: the graph gave logits that are not finite numbers.
        """
        check_count("batch_size", batch_size)
        given = list(images) if isinstance(images, list | tuple) else [images]
        if not given:
            raise UsageError("there are no images")
        names = each_row(adapters, len(given))
        output, found = output_of(self.session.manifest), []
        for start in range(0, len(given), batch_size):
            rows = range(start, min(start + batch_size, len(given)))
            pixels = np.stack(list(self._pixels(given, rows)))  # [batch, 3, height, width]
            with self.session.hold([names[row] for row in rows]) as held:
                feeds = {PIXEL_VALUES: pixels.astype(self._dtype)}
                (logits,) = held.run([output], feeds)  # [batch, labels]
                heads = [held.head(row) for row in range(len(rows))]
            for row, values, own in zip(rows, logits, heads, strict=True):
                head = head_of_row(own, self._head, names[row])
                head = Head(head.labels, head.problem_type or self._problem, head.outputs)
                values, labels = named_outputs(values, head)
                if not np.isfinite(values).all():
                    raise RunError(
                        f"image {row + 1}: the graph gave numbers that are not finite: run"
                        " `loradeploy parity` on the bundle and the adapter"
                    )
                found.append(classified(values, labels, head, names[row]))
        return found

    def _pixels(self, images: Sequence[Any], rows: Sequence[int]) -> Iterator[Any]:
        for row in rows:
            values = self._settings.values(images[row], f"image {row + 1}")
            sizes = zip(values.shape, self._sizes, strict=True)
            if any(isinstance(size, int) and size != own for own, size in sizes):
                raise BundleError(
                    f"{self.session.path / PREPROCESSOR_NAME} makes pixel values"
                    f" {list(values.shape)}, the graph takes {list(self._sizes)}"
                )
            yield values
