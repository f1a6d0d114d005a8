"""Generate text about images with the bundles of a decoder and of its vision tower."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from loradeploy.adapter.files.peft import load_adapter
from loradeploy.adapter.fitting.parts import has_part
from loradeploy.adapter.modules.renamings import renamings
from loradeploy.bundle.fitting.fit import fit_to
from loradeploy.runtime.arguments import Adapters
from loradeploy.runtime.decoding.prompts.calls import Call, Prompt
from loradeploy.runtime.decoding.scoring import TextScore
from loradeploy.runtime.tasks.generation import Generation, OnResult, OnText, TextGenerator
from loradeploy.runtime.tasks.session_argument import check_session
from loradeploy.runtime.tasks.streaming import TextPiece, TextStream
from loradeploy.runtime.vision.reading import ImagePromptReader

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from loradeploy.adapter.adapter import Adapter
    from loradeploy.bundle.manifest import Manifest
    from loradeploy.runtime.decoding.choosing.options import GenerationFlags
    from loradeploy.runtime.session import AdapterSession
    from loradeploy.runtime.tasks.async_streaming import AsyncTextStream
    from loradeploy.runtime.vision.reading import ShownImage


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
        for session in (decoder, tower):
            check_session(session, type(self).__name__)
        self.reader = ImagePromptReader(decoder, tower)
        self.decoder, self.tower = decoder, tower
        self.image_token = self.reader.token
        self._text = TextGenerator(decoder, cache_budget=cache_budget)

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
        self.reader.parts.loaded(name, without)

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        images: Sequence[Sequence[ShownImage]],
        adapters: Adapters = None,
        *,
        seed: int | Sequence[int] = 0,
        chat: bool = False,
        batch_size: int = 8,
        per_prompt: Sequence[Mapping[str, Any] | None] | None = None,
        on_text: OnText | None = None,
        on_result: OnResult | None = None,
        **options: Unpack[GenerationFlags],
    ) -> list[Generation]:
        """Continue each prompt. `images` has for each prompt the list of its images.

        An image is a path, a Pillow image, or a uint8 array [height, width, 3], which is converted
        as by the model's processor in transformers. A float array [channels, height, width] is the
        pixel values of an image or of one of its tiles, as that processor makes them; for Qwen-VL
        see `split`.

        A prompt contains the model's placeholder once for each image, such as `<image>`, or all
        tokens of its images, as processors write them. With `chat`, the images come before the
        text. Adapters are names or None; the other arguments are as in `TextGenerator.generate`.

        Raises:
            UsageError: not a list of images for each prompt, pixel values of another shape or that
                are not normalized, image tokens that do not fit the images, an adapter that one of
                the two parts lacks though it has something for it, a name for two adapters, and as
                `TextGenerator.generate`.
            DataError: a file cannot be read as an image.
            BundleError: images other than pixel values, and a processor that is not supported.
            MissingDependencyError: Pillow is not installed.
        """
        call, named = self._read(
            prompts, images, adapters, seed, chat, batch_size, per_prompt, options
        )

        def show(row: int, result: Generation) -> None:
            assert on_result is not None
            on_result(row, named(row, result))

        found = self._text._results(call, on_text, None if on_result is None else show)
        return [named(row, result) for row, result in enumerate(found)]

    def stream(
        self,
        prompts: str | Sequence[Prompt],
        images: Sequence[Sequence[ShownImage]],
        adapters: Adapters = None,
        *,
        seed: int | Sequence[int] = 0,
        chat: bool = False,
        batch_size: int = 8,
        per_prompt: Sequence[Mapping[str, Any] | None] | None = None,
        **options: Unpack[GenerationFlags],
    ) -> TextStream:
        """Like `generate`, piece by piece: `for piece in generator.stream(…)`.

        Raises:
            LoraDeployError: as `generate`, with the first piece.
        """
        read = partial(
            self._read, prompts, images, adapters, seed, chat, batch_size, per_prompt, options
        )
        return TextStream(lambda cancelled: self._pieces(read, cancelled))

    def astream(
        self,
        prompts: str | Sequence[Prompt],
        images: Sequence[Sequence[ShownImage]],
        adapters: Adapters = None,
        *,
        seed: int | Sequence[int] = 0,
        chat: bool = False,
        batch_size: int = 8,
        per_prompt: Sequence[Mapping[str, Any] | None] | None = None,
        **options: Unpack[GenerationFlags],
    ) -> AsyncTextStream:
        """Like `stream`, for asyncio, as `TextGenerator.astream`."""
        from loradeploy.runtime.tasks.async_streaming import AsyncTextStream

        read = partial(
            self._read, prompts, images, adapters, seed, chat, batch_size, per_prompt, options
        )
        return AsyncTextStream(lambda cancelled: self._pieces(read, cancelled))

    def score(
        self,
        texts: str | Sequence[Prompt],
        images: Sequence[Sequence[ShownImage]],
        adapters: Adapters = None,
        *,
        chat: bool = False,
        batch_size: int = 8,
        logprobs: int = 0,
    ) -> list[TextScore]:
        """The log-probability of every token of each text, given the tokens and images before it.

        The tokens of images have no probability. Arguments are as in `generate` and
        `TextGenerator.score`.

        Raises:
            LoraDeployError: as `generate` and `TextGenerator.score`.
        """
        read = self.reader.read(texts, images, adapters, chat=chat, batch_size=batch_size, new=0)
        found = self._text.score(
            read.ids,
            read.adapters,
            batch_size=batch_size,
            logprobs=logprobs,
            embeds=read.embeds,
        )
        return [replace(score, adapter=name) for score, name in zip(found, read.names, strict=True)]

    def split(
        self, pixel_values: NDArray[np.floating[Any]], image_grid_thw: NDArray[np.integer[Any]]
    ) -> list[NDArray[np.floating[Any]]]:
        """Split the images of Qwen-VL's processor into [rows, columns, merged, values] each.

        `pixel_values` [patches, values] of all images, `image_grid_thw` [images, 3].

        Raises:
            UsageError: the tower takes no patches, the patches do not fit the grids, or a video is
                given.
        """
        return self.reader.sizes.split(pixel_values, image_grid_thw)

    def _read(
        self,
        prompts: str | Sequence[Prompt],
        images: Sequence[Sequence[ShownImage]],
        adapters: Adapters,
        seed: int | Sequence[int],
        chat: bool,
        batch_size: int,
        per_prompt: Sequence[Mapping[str, Any] | None] | None,
        options: Mapping[str, Any],
    ) -> tuple[Call, Callable[[int, Generation], Generation]]:
        """Read prompts and images: the decoder's call, and what completes the result of a row.

        A result has the requested adapter: one that only changes the tower is no decoder's.
        """
        read = self.reader.read(prompts, images, adapters, chat=chat, batch_size=batch_size)
        call = Call.of(
            read.ids, read.adapters, seed, False, batch_size, per_prompt, options, read.embeds
        )

        def named(row: int, result: Generation) -> Generation:
            return replace(result, adapter=read.names[bisect_right(call.firsts, row) - 1])

        return call, named

    def _pieces(
        self,
        read: Callable[[], tuple[Call, Callable[[int, Generation], Generation]]],
        cancelled: set[int],
    ) -> Generator[TextPiece]:
        call, named = read()
        for piece in self._text._pieces(call, cancelled):
            if piece.result is not None:
                piece = replace(piece, result=named(piece.row, piece.result))
            yield piece
