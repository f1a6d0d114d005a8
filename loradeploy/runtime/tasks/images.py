"""Classify and embed images with a bundle, each image with its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.adapter.heads import SINGLE_LABEL, Head, stated_problem
from loradeploy.adapter.tasks import IMAGE_CLASSIFICATION, IMAGE_FEATURE_EXTRACTION
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import CONFIG_NAME, IMAGE_EMBEDS, POOLER_OUTPUT
from loradeploy.bundle.outputs import output_of
from loradeploy.bundle.text.vectors.steps import normalize
from loradeploy.errors import BundleError, UsageError, shown
from loradeploy.runtime.arguments import Adapters
from loradeploy.runtime.images import ImageReader, check_finite
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.classification import (
    Classification,
    base_head,
    classified,
    head_of_row,
    named_outputs,
)
from loradeploy.runtime.tasks.session_argument import check_session, check_task

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.image.opening import GivenImage

# Models whose first token represents the image if they have no pooler.
_FIRST_TOKEN: Final = ("vit", "deit")


class ImageClassifier:
    """Classifies images with a session on an image classification bundle.

    Images are preprocessed as the base's preprocessor_config.json specifies, with numpy and Pillow,
    like in transformers' processors of ViT, DeiT, CLIP and SigLIP.

    Raises:
        UsageError: the bundle is not an image classifier.
        BundleError: it has no preprocessor_config.json, or one that does not fit its graph.
    """

    def __init__(self, session: AdapterSession) -> None:
        check_session(session, type(self).__name__)
        check_task(session, IMAGE_CLASSIFICATION, ", no classifier of images")
        self.session = session
        self._reader = ImageReader(session)
        self._head = base_head(session)
        stated = stated_problem(model_config(session.path), CONFIG_NAME, error=BundleError)
        self._problem = stated or SINGLE_LABEL

    def __call__(
        self,
        images: GivenImage | Sequence[GivenImage],
        adapters: Adapters = None,
        *,
        batch_size: int = 32,
    ) -> list[Classification]:
        """Classify each image. `adapters` is as in `AdapterSession.run`.

        An image is a path, a Pillow image, or a uint8 array [height, width, 3].

        Raises:
            UsageError: no images, one that is not an image, not one adapter for each, or an image
                without an adapter if the base has no trained head.
            DataError: a file cannot be read as an image.
            MissingDependencyError: Pillow is not installed.
            UnknownAdapterError: an adapter that was never loaded.
            RunError: the graph gave logits that are not finite numbers.
        """
        output, found = output_of(self.session.manifest), []
        for batch in self._reader.batches(images, adapters, batch_size):
            (logits,) = batch.held.run([output], batch.feeds)  # [batch, labels]
            for index, (row, values) in enumerate(zip(batch.rows, logits, strict=True)):
                name = batch.adapters[index]
                head = head_of_row(batch.held.head(index), self._head, name)
                head = Head(head.labels, head.problem_type or self._problem, head.outputs)
                values, labels = named_outputs(values, head)
                check_finite(values, row)
                found.append(classified(values, labels, head, name))
        return found


class ImageEmbedder:
    """Embeds images with a session on an image feature extraction bundle.

    The vector is the model's representation of the whole image: the projection of CLIP's image
    tower, the pooled output of SigLIP, DINOv2 and ViT with a pooler, or the last hidden state of
    the first token for ViT and DeiT without a pooler. It is scaled to length 1. Images are
    preprocessed as in `ImageClassifier`.

    Raises:
        UsageError: the bundle is for another task, or its graph gives no vector for an image.
        BundleError: it has no preprocessor_config.json, or one that does not fit its graph.
    """

    def __init__(self, session: AdapterSession) -> None:
        check_session(session, type(self).__name__)
        check_task(session, IMAGE_FEATURE_EXTRACTION, ": it gives no vectors of images")
        self.session = session
        self._output = _vector_output(session)
        self._reader = ImageReader(session)

    def __call__(
        self,
        images: GivenImage | Sequence[GivenImage],
        adapters: Adapters = None,
        *,
        batch_size: int = 32,
    ) -> NDArray[np.float32]:
        """The vector of each image, float32 [images, size]. `adapters` as in `AdapterSession.run`.

        An image is a path, a Pillow image, or a uint8 array [height, width, 3].

        Raises:
            UsageError: no images, one that is not an image, or not one adapter for each.
            DataError: a file cannot be read as an image.
            MissingDependencyError: Pillow is not installed.
            UnknownAdapterError: an adapter that was never loaded.
            RunError: the graph gave numbers that are not finite.
        """
        found = []
        for batch in self._reader.batches(images, adapters, batch_size):
            (values,) = batch.held.run([self._output], batch.feeds)
            vectors = values[:, 0] if values.ndim == 3 else values  # [batch, size]
            for row, vector in zip(batch.rows, vectors, strict=True):
                check_finite(vector, row)
            found.append(normalize(vectors.astype(np.float32)))
        return np.concatenate(found)


def _vector_output(session: AdapterSession) -> str:
    """The output with the vector of an image [batch, size], or of tokens, the first of them."""
    ranks = {spec.name: len(spec.shape) for spec in session.manifest.outputs}
    for name in (IMAGE_EMBEDS, POOLER_OUTPUT):
        if ranks.get(name) == 2:
            return name
    output = output_of(session.manifest)
    model_type = model_config(session.path).get("model_type")
    if ranks.get(output) == 3 and model_type in _FIRST_TOKEN:
        return output
    raise UsageError(
        f"{session.path} gives {', '.join(ranks)}, and no {IMAGE_EMBEDS} or {POOLER_OUTPUT}"
        f" [batch, size]: the vector of an image of {shown(model_type)} is not known, use"
        " AdapterSession.run"
    )
