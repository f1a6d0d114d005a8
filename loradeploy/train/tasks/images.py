"""Training examples for image classification: files with labels, read as pixel values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from loradeploy.adapter.files.digest import file_digest
from loradeploy.bundle.image.pixels import PixelSettings, pixel_settings
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import PIXEL_VALUES, PREPROCESSOR_NAME
from loradeploy.errors import BundleError, DataError, ModelError
from loradeploy.train.data.examples import label_of, non_empty, text_of
from loradeploy.train.data.features import Encoded, label_number
from loradeploy.train.data.sources import Row, Source, is_dataset, rows
from loradeploy.train.tasks.losses import BatchLoss, classification_loss

_ENDINGS: Final = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_IMAGE: Final = "image"


@dataclass(frozen=True)
class LabeledImage:
    """An example for a classifier of images."""

    where: str
    image: Path
    label: str

    @property
    def labels(self) -> tuple[str, ...]:
        """The one label."""
        return (self.label,)


def read_labeled_images(source: Source) -> list[LabeledImage]:
    """The examples: rows of `image` and `label`, or a folder with one folder for each class.

    `image` is a path, relative to the directory of the data.

    Raises:
        DataError: there are no examples, or a row (named) has no path or no label.
    """
    beside = source.path if source.path.is_dir() else source.path.parent
    examples = [
        LabeledImage(where, beside / text_of(where, row, _IMAGE), label_of(where, row))
        for where, row in _rows(source)
    ]
    return non_empty(examples, source)


def _rows(source: Source) -> Iterator[Row]:
    if source.path.is_dir() and not is_dataset(source):
        found = list(_class_folders(source.path))
        if not found:
            raise DataError(
                f"{source} has no folder of images ({', '.join(_ENDINGS)}): expected one for"
                " each class"
            )
        return iter(found)
    return rows(source, (_IMAGE, "label"))


def _class_folders(path: Path) -> Iterator[Row]:
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in _ENDINGS:
                yield str(file), {_IMAGE: f"{folder.name}/{file.name}", "label": folder.name}


@dataclass(frozen=True)
class ImageSettings:
    """The preprocessing of images for a checkpoint's model."""

    settings: PixelSettings

    @classmethod
    def of(cls, directory: Path) -> ImageSettings:
        """The preprocessing for the model in `directory`.

        Raises:
            ModelError: it has no preprocessor_config.json, or one that does not fit the model.
        """
        try:
            settings = pixel_settings(directory)
        except BundleError as problem:
            raise ModelError(str(problem)) from None
        if settings is None:
            raise ModelError(
                f"{directory} has no {PREPROCESSOR_NAME}, which specifies how to compute pixel"
                " values"
            )
        given = model_config(directory, error=ModelError).get("image_size")
        taken = (given, given) if isinstance(given, int) else tuple(given or ())
        made = settings.crop or settings.size
        if taken and isinstance(made, tuple) and made != taken:
            raise ModelError(
                f"{directory}: {PREPROCESSOR_NAME} makes images of {list(made)} (height, width),"
                f" the model takes {list(taken)}"
            )
        return cls(settings)

    def encode(
        self, examples: Sequence[LabeledImage], labels: Sequence[str], *_: object
    ) -> Encoded:
        """The file of each image and the index of its label; `input_ids` are empty.

        Raises:
            DataError: a file cannot be read as an image, or a label is unknown.
        """
        features = []
        for example in examples:
            try:
                self.settings.values(example.image)
            except DataError as problem:
                raise DataError(f"{example.where}: {problem}") from None
            features.append(
                {
                    _IMAGE: str(example.image),
                    "digest": file_digest(example.image),
                    "input_ids": [],
                    "labels": label_number(example.where, example.label, labels),
                }
            )
        return Encoded(features, 0)

    def collator(self, _: int) -> ImageCollator:
        """The collator for these features."""
        return ImageCollator(self.settings)


@dataclass(frozen=True)
class ImageCollator:
    """Reads the images of a batch: `pixel_values` [batch, 3, height, width], `labels` [batch]."""

    settings: PixelSettings

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        images = [torch.from_numpy(self.settings.values(f[_IMAGE])) for f in features]
        shapes = {tuple(image.shape): f[_IMAGE] for image, f in zip(images, features, strict=True)}
        if len(shapes) > 1:
            raise DataError(
                f"images of a batch have different sizes, {' and '.join(map(str, shapes))}:"
                f" {PREPROCESSOR_NAME} does not resize them to one size"
            )
        labels = torch.tensor([feature["labels"] for feature in features])
        return {PIXEL_VALUES: torch.stack(images), "labels": labels}


def image_loss(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> BatchLoss:
    """Cross-entropy of the class of each image (`labels` [batch])."""
    dtype = cast(Any, extract_model_from_parallel(model)).dtype  # the dtype of the base
    return classification_loss(model, {**inputs, PIXEL_VALUES: inputs[PIXEL_VALUES].to(dtype)})
