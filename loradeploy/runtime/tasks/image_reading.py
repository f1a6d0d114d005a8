"""Read prompts with images: their tokens, and the features that replace the tokens of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.tasks import CAUSAL_LM, VISION_TOWER
from loradeploy.bundle.image.opening import opened, pillow
from loradeploy.bundle.image.processors import ImageProcessor, ModelImage, image_processor
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import CONFIG_NAME, IMAGE_FEATURES, PIXEL_VALUES
from loradeploy.errors import BundleError, UsageError, shown
from loradeploy.runtime.arguments import Adapters, check_count, each_row
from loradeploy.runtime.decoding.asking.calls import Prompt, listed
from loradeploy.runtime.decoding.asking.reading import PromptReader
from loradeploy.runtime.decoding.graph import TokenEmbeds
from loradeploy.runtime.tasks.image_grids import ImageSizes
from loradeploy.runtime.tasks.image_parts import ImageParts
from loradeploy.runtime.tasks.image_prompts import ImagePrompts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.image.opening import GivenImage
    from loradeploy.runtime.adapters.resident import AdapterSpec
    from loradeploy.runtime.session import AdapterSession

    # An image, or float pixel values as the model's processor makes them.
    ShownImage = GivenImage | NDArray[np.floating[Any]]

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
        check_count("batch_size", batch_size)
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
        ids, parts, grids = [], [], []
        for number, prompt in enumerate(given):
            what = f"prompt {number + 1}"
            seen = [
                self._prepared(image, what, place + 1) for place, image in enumerate(images[number])
            ]
            own_parts = [part for image in seen for part in image.parts]
            sizes = [self.sizes.checked(part, what) for part in own_parts]
            ids.append(self._tokens(prompt, seen, names[number][0], chat, what, new))
            parts.append(own_parts)
            grids.append(self.sizes.grids(sizes))
        features = self._features(parts, [of_tower for _, of_tower in names], batch_size)
        embeds = [
            TokenEmbeds(self.token, np.concatenate(own), its) if own else None
            for own, its in zip(features, grids, strict=True)
        ]
        return ReadPrompts(ids, [of_decoder for of_decoder, _ in names], own_names, embeds)

    def _prepared(self, image: Any, what: str, place: int) -> ModelImage:
        """An image as the tower takes it; float arrays are pixel values of an image or a tile."""
        if isinstance(image, np.ndarray) and image.dtype != np.uint8:
            return ModelImage((image,))
        where = f"image {place} of {what}"
        return self._processor.prepared(opened(image, where), where)

    def _tokens(
        self,
        prompt: Prompt,
        images: Sequence[ModelImage],
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
        counts = [sum(self.sizes.tokens(part.shape) for part in image.parts) for image in images]
        if any(map(any, tiles)) and read.ids.count(self.token) == len(images):
            raise UsageError(
                f"an image of {what} is split into tiles, whose tokens are inserted into a text:"
                " give a text or a chat, or all tokens of the processor"
            )
        ids = self._prompts.expanded(read.ids, counts, what)
        reader.check_length(len(ids), new, what)
        return ids

    def _features(
        self, images: Sequence[Sequence[Any]], names: Sequence[str | None], batch_size: int
    ) -> list[list[NDArray[Any]]]:
        """Run the tower on the images of each prompt: their features, [tokens, hidden] each."""
        # Images of one size share runs.
        alike: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for row, own in enumerate(images):
            for place, image in enumerate(own):
                alike.setdefault(np.shape(image), []).append((row, place))
        found: dict[tuple[int, int], NDArray[Any]] = {}
        for every in alike.values():
            for start in range(0, len(every), batch_size):
                some = every[start : start + batch_size]
                pixels = np.stack([images[row][place] for row, place in some])
                (values,) = self._tower.run(
                    [IMAGE_FEATURES],
                    {PIXEL_VALUES: pixels.astype(self.sizes.pixels.dtype)},
                    [names[row] for row, _ in some],
                )
                found.update(zip(some, values, strict=True))
        return [[found[row, place] for place in range(len(own))] for row, own in enumerate(images)]
