"""Generate text about images with the bundles of a decoder and of its vision tower."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.files.peft import load_adapter
from loradeploy.adapter.fitting.parts import has_part
from loradeploy.adapter.modules.renamings import renamings
from loradeploy.adapter.tasks import CAUSAL_LM, VISION_TOWER
from loradeploy.bundle.fitting.fit import fit_to
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import CONFIG_NAME, IMAGE_FEATURES, PIXEL_VALUES
from loradeploy.errors import BundleError, UsageError, shown
from loradeploy.runtime.arguments import Adapters, check_count, each_row
from loradeploy.runtime.decoding.asking.calls import Prompt, listed
from loradeploy.runtime.decoding.asking.reading import PromptReader
from loradeploy.runtime.decoding.graph import TokenEmbeds
from loradeploy.runtime.tasks.generation import Generation, TextGenerator
from loradeploy.runtime.tasks.image_grids import ImageSizes
from loradeploy.runtime.tasks.image_parts import ImageParts
from loradeploy.runtime.tasks.image_prompts import ImagePrompts

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from loradeploy.adapter.adapter import Adapter
    from loradeploy.bundle.manifest import Manifest
    from loradeploy.runtime.decoding.choosing.options import GenerationFlags
    from loradeploy.runtime.session import AdapterSession

_TOKENS: Final = ("image_token_id", "image_token_index")  # in config.json


def _has_part(adapter: Adapter, manifest: Manifest) -> bool:
    rules = partial(renamings, manifest.submodels, manifest.base_prefix)
    return has_part(adapter, manifest.other_part, rules)


class ImageTextGenerator:
    """Generates text about images with the two bundles of one model (docs/images.md).

    `decoder`: a session on its causal-lm bundle. `tower`: a session on its vision-tower bundle.
    `cache_budget`: as in `TextGenerator`.

    Raises:
        UsageError: the bundles are for other tasks or of two models, have parts of two adapters
            merged or under one name, or only one has its part of a merged adapter.
        BundleError: the decoder's bundle does not declare the token of an image, or the tower's not
            the number of features of an image.
    """

    def __init__(
        self,
        decoder: AdapterSession,
        tower: AdapterSession,
        *,
        cache_budget: int | None = None,
    ) -> None:
        for session, task in ((decoder, CAUSAL_LM), (tower, VISION_TOWER)):
            if session.manifest.task != task:
                raise UsageError(f"{session.path} is a {session.manifest.task} bundle, no {task}")
        if not decoder.manifest.embeds:
            raise UsageError(f"{decoder.path} only takes text, no images")
        if decoder.manifest.base.digest != tower.manifest.base.digest:
            raise UsageError(
                f"{decoder.path} and {tower.path} are of two models: export both of one checkpoint"
            )
        self._parts = ImageParts(decoder, tower)
        config = model_config(decoder.path)
        token = next((config[name] for name in _TOKENS if name in config), None)
        if not isinstance(token, int):
            raise BundleError(f"{decoder.path / CONFIG_NAME} has no {_TOKENS[0]}")
        self.decoder, self.tower = decoder, tower
        self.image_token = token
        self._video_token = config.get("video_token_id")
        self._sizes = ImageSizes.of(tower)
        self._text = TextGenerator(decoder, cache_budget=cache_budget)
        words = decoder.texts.base.tokenizer.vocabulary
        features = self._sizes.features or 0
        self._prompts = ImagePrompts.of(config, token, words, features, decoder.path)
        self._reader = PromptReader(decoder, self._prompts.write, images=True)

    def load(self, name: str, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        """Load the adapter at `path` as `name` into both parts, like `AdapterSession.load`.

        If it has no weights for a part, that part runs the base. It is checked against both parts
        before it is loaded; if loading fails nevertheless, neither part keeps it.

        Raises:
            AdapterError: it cannot be read, or does not fit.
        """
        adapter = load_adapter(path)
        both = (self.decoder, self.tower)
        parts = [session for session in both if _has_part(adapter, session.manifest)]
        for session in parts:
            fit_to(adapter, session.manifest)
        new: list[AdapterSession] = []
        try:
            for session in parts:
                known = name in session.adapters
                session.load(name, path, replace=replace)
                if replace or not known:
                    new.append(session)
        except BaseException:
            for session in new:
                session.unload(name)
            raise
        without = next((session for session in both if session not in parts), None)
        self._parts.loaded(name, without)

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        images: Sequence[Sequence[NDArray[np.floating[Any]]]],
        adapters: Adapters = None,
        *,
        chat: bool = False,
        batch_size: int = 8,
        **options: Unpack[GenerationFlags],
    ) -> list[Generation]:
        """Continue each prompt. `images` has for each prompt the list of its images.

        An image, or a tile of one, is float [channels, height, width]: normalized pixel values, as
        the model's processor makes them; for Qwen-VL see `split`. A prompt contains either as many
        image tokens as its images have features, as processors write it, or one for each image. The
        latter is replaced by all tokens of the image and those that the processor writes around it.
        For Gemma 3, a text or a chat contains `<start_of_image>` for each image. Adapters, by name
        or None, and options are as in `TextGenerator.generate`.

        Raises:
            UsageError: not a list of images for each prompt, images of another shape or that are
                not normalized, image tokens that do not fit the images, an adapter that one of the
                two parts lacks though it has something for it, a name for two adapters, and as
                `TextGenerator.generate`.
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
        seeing = [len(own) > 0 for own in images]
        own_names = each_row(adapters, len(given))
        names = self._parts.names(own_names, seeing)
        reads, sees = [of_decoder for of_decoder, _ in names], [of_tower for _, of_tower in names]
        ids, grids = [], []
        for number, prompt in enumerate(given):
            what = f"prompt {number + 1}"
            read = self._reader.read(number, prompt, reads[number], chat, what)
            if self._video_token in read.ids:
                raise UsageError(f"{what} has the token of a video: videos are not supported")
            sizes = [self._sizes.checked(image, what) for image in images[number]]
            tokens = [self._sizes.tokens(size) for size in sizes]
            ids.append(self._prompts.expanded(read.ids, tokens, what))
            grids.append(self._sizes.grids(sizes))
        embeds = [
            TokenEmbeds(self.image_token, np.concatenate(own), its) if own else None
            for own, its in zip(self._features(images, sees, batch_size), grids, strict=True)
        ]
        found = self._text.generate(ids, reads, batch_size=batch_size, embeds=embeds, **options)
        numbers = itertools.accumulate(one.choice == 0 for one in found)  # prompt numbers, from 1
        # An adapter that only changes the tower has no name in the decoder.
        return [
            replace(one, adapter=own_names[number - 1])
            for one, number in zip(found, numbers, strict=True)
        ]

    def split(
        self, pixel_values: NDArray[np.floating[Any]], image_grid_thw: NDArray[np.integer[Any]]
    ) -> list[NDArray[np.floating[Any]]]:
        """Split the images of Qwen-VL's processor into [rows, columns, merged, values] each.

        `pixel_values` [patches, values] of all images, `image_grid_thw` [images, 3].

        Raises:
            UsageError: the tower takes no patches, the patches do not fit the grids, or a video is
                given.
        """
        return self._sizes.split(pixel_values, image_grid_thw)

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
                (values,) = self.tower.run(
                    [IMAGE_FEATURES],
                    {PIXEL_VALUES: pixels.astype(self._sizes.pixels.dtype)},
                    [names[row] for row, _ in some],
                )
                found.update(zip(some, values, strict=True))
        return [[found[row, place] for place in range(len(own))] for row, own in enumerate(images)]
