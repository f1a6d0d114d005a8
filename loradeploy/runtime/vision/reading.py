"""Read prompts with images: their tokens, and the features that replace the tokens of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.tasks import CAUSAL_LM, VISION_TOWER
from loradeploy.bundle.image.opening import EncodedImage, opened, pillow
from loradeploy.bundle.image.processors import ImageProcessor, ModelImage, image_processor
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import CONFIG_NAME
from loradeploy.errors import BundleError, UsageError, shown
from loradeploy.given_numbers import checked_count
from loradeploy.runtime.arguments import Adapters, each_row
from loradeploy.runtime.decoding.graph import TokenEmbeds
from loradeploy.runtime.decoding.prompts.calls import Prompt, listed
from loradeploy.runtime.decoding.prompts.reading import PromptReader
from loradeploy.runtime.vision.parts import ImageParts
from loradeploy.runtime.vision.prompts import ImagePrompts
from loradeploy.runtime.vision.sizes import ImageSizes, Shape
from loradeploy.runtime.vision.tower_runs import TowerRuns

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.image.opening import GivenImage
    from loradeploy.runtime.adapters.resident import AdapterSpec
    from loradeploy.runtime.session import AdapterSession

    # An image, or float pixel values as the model's processor makes them.
    ShownImage = GivenImage | EncodedImage | NDArray[np.floating[Any]]

_TOKENS: Final = ("image_token_id", "image_token_index")  # in config.json


@dataclass(frozen=True, eq=False)
class ReadPrompts:
    """Prompts with images, as the decoder takes them.

    `ids`: the tokens of each prompt. `adapters`: the decoder's for each prompt. `names`: the
    requested ones; an adapter that only changes the tower has no name in the decoder. `embeds`: the
    features of each prompt's images.
    """

    ids: list[list[int]]
    adapters: list[AdapterSpec | None]
    names: list[AdapterSpec | None]
    embeds: list[TokenEmbeds | None]


@dataclass(frozen=True)
class _Seen:
    """An image whose pixel values are in `TowerRuns`: its tiles, and the shapes of its parts."""

    tiles: tuple[int, int]
    shapes: Sequence[Shape]


class ImagePromptReader:
    """Reads prompts with images for a `decoder`, with the bundle of its vision `tower`.

    `parts`: which adapter each of them runs.

    Raises:
        UsageError: the bundles are for other tasks or of two models, have parts of two adapters
            merged or under one name, or only one has its part of a merged adapter.
        BundleError: the decoder's bundle does not declare the token of an image, or the tower's not
            the number of features of an image.
    """

    def __init__(self, decoder: AdapterSession, tower: AdapterSession) -> None:
        for session, task in ((decoder, CAUSAL_LM), (tower, VISION_TOWER)):
            if session.manifest.task != task:
                raise UsageError(f"{session.path} is a {session.manifest.task} bundle, no {task}")
        if not decoder.manifest.embeds:
            raise UsageError(f"{decoder.path} only takes text, no images")
        if decoder.manifest.base.digest != tower.manifest.base.digest:
            raise UsageError(
                f"{decoder.path} and {tower.path} are of two models: export both of one checkpoint"
            )
        self.parts = ImageParts(decoder, tower)
        config = model_config(decoder.path)
        token = next((config[name] for name in _TOKENS if name in config), None)
        if not isinstance(token, int):
            raise BundleError(f"{decoder.path / CONFIG_NAME} has no {_TOKENS[0]}")
        self.token = token
        self._decoder, self._tower = decoder, tower
        self._video_token = config.get("video_token_id")
        self.sizes = ImageSizes.of(tower)
        words = decoder.texts.base.tokenizer.vocabulary
        features = self.sizes.features or 0
        self._prompts = ImagePrompts.of(config, token, words, features, decoder.path)

    def check_processor(self) -> None:
        """Check that images can be read.

        Raises:
            BundleError: there are no settings of an image processor, or it is not supported.
            MissingDependencyError: Pillow is not installed.
        """
        pillow()
        image_processor(self._tower.path)

    @cached_property
    def _processor(self) -> ImageProcessor:
        """The image processor of the model; only needed for images that are no pixel values."""
        return image_processor(self._tower.path)

    def read(
        self,
        prompts: str | Sequence[Prompt],
        images: Sequence[Sequence[ShownImage]],
        adapters: Adapters,
        *,
        chat: bool,
        batch_size: int,
        new: int = 1,
    ) -> ReadPrompts:
        """Encode each prompt, and run the tower on `batch_size` images at a time.

        `new`: 0 if no token is generated after the prompts.

        Raises:
            UsageError, DataError: see `ImageTextGenerator.generate`.
        """
        batch_size = checked_count("batch_size", batch_size)
        given = listed(prompts, "prompts")
        if len(images) != len(given):
            raise UsageError(
                f"there are lists of images for {len(images)} of {len(given)} prompts: give one"
                " for each, empty if it has none"
            )
        for number, own in enumerate(images):
            if not isinstance(own, list | tuple | np.ndarray):
                raise UsageError(
                    f"the images of prompt {number + 1} are {shown(own)}: give a list, empty if it"
                    " has none"
                )
        own_names = each_row(adapters, len(given))
        names = self.parts.names(own_names, [len(own) > 0 for own in images])
        runs = TowerRuns(self._tower, self.sizes.pixels.dtype, batch_size)
        ids, grids = [], []
        for number, (prompt, (of_decoder, of_tower)) in enumerate(zip(given, names, strict=True)):
            what = f"prompt {number + 1}"
            seen = []
            for place, image in enumerate(images[number]):
                made = self._prepared(image, what, place + 1)
                shapes = [self.sizes.checked(part, what) for part in made.parts]
                seen.append(_Seen(made.tiles, shapes))
                runs.add(number, made.parts, of_tower)
            ids.append(self._tokens(prompt, seen, of_decoder, chat, what, new))
            grids.append(self.sizes.grids([shape for image in seen for shape in image.shapes]))
        features = runs.finished()
        embeds = [
            TokenEmbeds(self.token, np.concatenate(features[number]), its)
            if number in features
            else None
            for number, its in enumerate(grids)
        ]
        return ReadPrompts(ids, [of_decoder for of_decoder, _ in names], own_names, embeds)

    def _prepared(self, image: Any, what: str, place: int) -> ModelImage:
        """An image as the tower takes it; float arrays are pixel values of an image or a tile."""
        if isinstance(image, np.ndarray) and image.dtype != np.uint8:
            return ModelImage((image,))
        if isinstance(image, EncodedImage):
            return self._processor.prepared(image.decoded(), image.where)
        where = f"image {place} of {what}"
        return self._processor.prepared(opened(image, where), where)

    def _tokens(
        self,
        prompt: Prompt,
        images: Sequence[_Seen],
        adapter: AdapterSpec | None,
        chat: bool,
        what: str,
        new: int,
    ) -> list[int]:
        """The tokens of a prompt with all tokens of its images."""
        if chat and isinstance(prompt, str) and images:
            text = {"type": "text", "text": prompt}
            content = [*({"type": "image"} for _ in images), text]
            prompt = [{"role": "user", "content": content}]
        tiles = [image.tiles for image in images]
        write = partial(self._prompts.write, images=tiles)
        reader = PromptReader(self._decoder, write, images=True)
        read = reader.read(0, prompt, adapter, chat, what)
        if self._video_token in read.ids:
            raise UsageError(f"{what} has the token of a video: videos are not supported")
        counts = [sum(map(self.sizes.tokens, image.shapes)) for image in images]
        if any(map(any, tiles)) and read.ids.count(self.token) == len(images):
            raise UsageError(
                f"an image of {what} is split into tiles, whose tokens are inserted into a text:"
                " give a text or a chat, or all tokens of the processor"
            )
        ids = self._prompts.expanded(read.ids, counts, what)
        reader.check_length(len(ids), new, what)
        return ids
