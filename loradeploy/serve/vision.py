"""The images of chat requests: decoded one by one, and run through the vision tower.

The tower runs one request at a time: on a CPU, a batch of images takes as long as one after
another, so that the first request would only wait for the others.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loradeploy.bundle.image.opening import FORMATS, EncodedImage
from loradeploy.errors import AdapterError, DeadlineError, EngineFullError, UsageError
from loradeploy.runtime.tasks.image_text import ImageTextGenerator
from loradeploy.serve.problems import refused

if TYPE_CHECKING:
    from loradeploy.runtime.adapters.resident import AdapterSpec
    from loradeploy.runtime.decoding.graph import TokenEmbeds
    from loradeploy.runtime.decoding.prompts.calls import Prompt
    from loradeploy.runtime.session import AdapterSession
    from loradeploy.runtime.vision.parts import Names
    from loradeploy.serve.settings import ServeLimits

_DATA: Final = re.compile(r"data:image/(?:png|jpe?g|webp|gif);base64,", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class SeenPrompt:
    """A prompt with images for the engine: its tokens, the decoder's adapter, the features."""

    ids: list[int]
    adapter: AdapterSpec | None
    embeds: TokenEmbeds | None


class Vision:
    """The vision tower of a service, whose `decoder` runs in the engine.

    `waiting`: number of requests whose images are waiting or being processed.

    Raises:
        UsageError, BundleError: as `ImageTextGenerator`, or its image processor is not supported.
        MissingDependencyError: Pillow is not installed.
    """

    def __init__(self, decoder: AdapterSession, tower: AdapterSession, limits: ServeLimits) -> None:
        self.generator = ImageTextGenerator(decoder, tower)
        self.generator.reader.check_processor()
        self._limits = limits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loradeploy-vision")
        self.waiting = 0

    def decoder_adapter(self, adapter: AdapterSpec | None) -> AdapterSpec | None:
        """The adapter that the decoder runs for a prompt without images.

        Raises:
            AdapterError: a part of the adapter is missing.
        """
        if adapter is not None and not isinstance(adapter, str):
            return adapter  # a blend, which only needs the decoder's parts
        return self._names(adapter, images=False)[0]

    def _names(self, adapter: str | None, *, images: bool) -> Names:
        """The adapters that the decoder and the tower run.

        Raises:
            AdapterError: a part of the adapter is missing. The message has paths, so it is not for
                the client.
        """
        try:
            (names,) = self.generator.reader.parts.names([adapter], [images])
        except UsageError as problem:
            raise AdapterError(str(problem)) from None
        return names

    async def read(
        self, prompt: Prompt, urls: Sequence[str], adapter: AdapterSpec | None
    ) -> SeenPrompt:
        """Decode the images in `urls`, insert them into the prompt, and run the tower.

        Raises:
            RequestError: 400, too many images, another URL than of data, or no image.
            UsageError: images that do not fit the prompt, or a blend of adapters.
            AdapterError: a part of the adapter is missing.
            EngineFullError: too many requests with images are waiting.
            DeadlineError: it did not complete in time.
        """
        limits = self._limits
        if len(urls) > limits.max_images:
            raise refused("messages", f"{len(urls)} images; this service takes {limits.max_images}")
        for number, url in enumerate(urls, start=1):
            if _DATA.match(url) is None:
                raise refused(
                    "messages",
                    f"image {number}: give a data: URL of a {', '.join(FORMATS)} image, such as"
                    " data:image/png;base64,…; this service fetches nothing",
                    code="unsupported_image_url",
                )
        if self.waiting >= limits.max_waiting:
            raise EngineFullError(
                f"{self.waiting} requests with images are waiting, the maximum", retry_after=1.0
            )
        self.waiting += 1
        loop = asyncio.get_running_loop()
        try:
            work = loop.run_in_executor(self._thread, self._read, prompt, urls, adapter)
            return await asyncio.wait_for(work, limits.request_timeout)
        except asyncio.TimeoutError:
            raise DeadlineError("the request took longer than the service allows") from None
        finally:
            self.waiting -= 1

    def _read(self, prompt: Prompt, urls: Sequence[str], adapter: AdapterSpec | None) -> SeenPrompt:
        if adapter is None or isinstance(adapter, str):
            self._names(adapter, images=True)
        images = [self._encoded(url, f"image {number}") for number, url in enumerate(urls, start=1)]
        reader, rows = self.generator.reader, self._limits.max_rows
        read = reader.read([prompt], [images], [adapter], chat=False, batch_size=rows)
        return SeenPrompt(read.ids[0], read.adapters[0], read.embeds[0])

    def _encoded(self, url: str, where: str) -> EncodedImage:
        try:
            content = base64.b64decode(url.partition(",")[2], validate=True)
        except ValueError:
            raise UsageError(f"{where} is not base64") from None
        return EncodedImage(content, where, self._limits.max_image_pixels)

    def close(self) -> None:
        """Wait for the running request, and end the others."""
        self._thread.shutdown(cancel_futures=True)
        self.generator.tower.close()
