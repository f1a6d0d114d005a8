"""Submit a request for text to the engine: its settings, its prompts, and its results."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from fastapi import Request

from loradeploy.errors import EngineClosedError, shown
from loradeploy.runtime.decoding.prompts.calls import Prompt
from loradeploy.runtime.engine.submission import GenerationEvent, Submission
from loradeploy.runtime.tasks.generation import Generation
from loradeploy.serve.keys import ApiKey
from loradeploy.serve.problems import refused
from loradeploy.serve.schemas.text import (
    STOP_LENGTH,
    CachedTokens,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ImagePart,
    TextPart,
    TextRequest,
    Usage,
)
from loradeploy.serve.service import Service
from loradeploy.serve.settings import ServeLimits

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Submitted:
    """The submissions of a request's prompts. `texts`: the number of texts of each prompt."""

    submissions: Sequence[Submission]
    texts: int

    def cancel(self) -> None:
        """Cancel all that have not ended."""
        for submission in self.submissions:
            if not submission.done:
                submission.cancel()

    async def started(self) -> None:
        """Wait until all prompts are admitted.

        Raises:
            LoraDeployError: a prompt or the adapter is refused.
        """
        for submission in self.submissions:
            await submission.started()

    async def generations(self) -> list[Generation]:
        """All texts, in the order of the prompts.

        Raises:
            LoraDeployError: a submission failed.
        """
        done = [await submission.completion() for submission in self.submissions]
        texts = [text for completion in done for text in completion.generations]
        for text in texts:
            _check_whole(text)
        return texts

    async def events(self) -> AsyncIterator[tuple[int, GenerationEvent]]:
        """Yield events as they arrive, each with its text's index.

        Raises:
            LoraDeployError: a submission failed.
        """
        if len(self.submissions) == 1:  # needs no tasks
            async for event in self.submissions[0]:
                if event.generation is not None:
                    _check_whole(event.generation)
                yield event.choice, event
            return
        queue: asyncio.Queue[tuple[int, GenerationEvent] | BaseException | None] = asyncio.Queue()

        async def read(number: int, submission: Submission) -> None:
            try:
                async for event in submission:
                    queue.put_nowait((number * self.texts + event.choice, event))
                queue.put_nowait(None)
            except Exception as problem:  # raised by the loop below
                queue.put_nowait(problem)

        readers = [asyncio.create_task(read(*one)) for one in enumerate(self.submissions)]
        try:
            ended = 0
            while ended < len(readers):
                news = await queue.get()
                if news is None:
                    ended += 1
                elif isinstance(news, BaseException):
                    raise news
                else:
                    if news[1].generation is not None:
                        _check_whole(news[1].generation)
                    yield news
        finally:
            for reader in readers:
                reader.cancel()

    def usage(self, generated: int) -> Usage:
        """The usage with the tokens of the prompts and `generated` ones."""
        prompts = sum(submission.prompt_tokens or 0 for submission in self.submissions)
        cached = sum(submission.cached_tokens for submission in self.submissions)
        return Usage(
            prompt_tokens=prompts,
            completion_tokens=generated,
            total_tokens=prompts + generated,
            prompt_tokens_details=CachedTokens(cached_tokens=cached),
        )


def _check_whole(text: Generation) -> None:
    """Raise EngineClosedError if a text was cancelled, as when the service ends."""
    if text.finish_reason == "cancelled":
        raise EngineClosedError("the text was cancelled")


def chat_images(body: ChatRequest) -> list[str]:
    """The URLs of the conversation's images.

    Raises:
        RequestError: an image with another `detail` than auto.
    """
    images = [
        part.image_url
        for message in body.messages
        if not isinstance(message.content, str)
        for part in message.content
        if isinstance(part, ImagePart)
    ]
    if other := [image.detail for image in images if image.detail != "auto"]:
        raise refused("messages", f"the detail of an image is {shown(other[0])}: give auto")
    return [image.url for image in images]


def _content(message: ChatMessage) -> str | list[dict[str, str]]:
    """The text of a message, or its texts and the places of its images."""
    parts = message.content
    if isinstance(parts, str):
        return parts
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    if len(texts) == len(parts):
        return "".join(texts)
    return [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in parts
    ]


def chat_prompt(body: ChatRequest) -> Prompt:
    """The conversation in the form that chat templates expect."""
    messages = []
    for message in body.messages:
        role = "system" if message.role == "developer" else message.role
        name = {} if message.name is None else {"name": message.name}
        messages.append({"role": role, "content": _content(message), **name})
    return cast(Prompt, messages)


def completion_prompts(body: CompletionRequest) -> list[Prompt]:
    """The prompts: texts, or token ids."""
    prompt = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [cast(Prompt, prompt)]
    return list(cast("list[Prompt]", prompt))


async def submit(
    request: Request,
    service: Service,
    key: ApiKey,
    body: TextRequest,
    prompts: Sequence[Prompt],
    logprobs: int | None,
    images: Sequence[str] = (),
) -> Submitted:
    """Submit the prompts of `body`. `images`: URLs of images, of its only prompt.

    They are read before the prompt is submitted, unless the client of `request` disconnects.

    Raises:
        RequestError, LoraDeployError: the request is refused, or too many requests are waiting.
    """
    engine = service.text_engine()
    _check_request(body, len(prompts), service.limits)
    adapter = await service.catalog.resolve(body.model, body.adapters, key)
    options = _options(service, body, logprobs)
    deadline = service.limits.request_timeout
    if images:
        if service.vision is None:
            raise refused("messages", "this service reads no images: it has no vision tower")
        began = time.monotonic()
        (prompt,) = prompts
        seen = await _while_connected(request, service.vision.read(prompt, images, adapter))
        prompts, adapter, options["embeds"] = [seen.ids], seen.adapter, seen.embeds
        deadline = max(deadline - (time.monotonic() - began), 1e-3)
    elif service.vision is not None:
        adapter = service.vision.decoder_adapter(adapter)
    submissions: list[Submission] = []
    try:
        for prompt in prompts:
            if body.response_format is not None:
                options["allowed_tokens"] = await asyncio.to_thread(
                    service.grammars.allowed, body.response_format, adapter
                )
            submissions.append(
                engine.submit(
                    prompt,
                    adapter,
                    # With a seed, a prompt's text does not depend on the other prompts.
                    seed=secrets.randbits(63) if body.seed is None else body.seed % 2**64,
                    scope=key.name or None,
                    deadline=deadline,
                    **options,
                )
            )
    except BaseException:
        Submitted(submissions, body.n).cancel()
        raise
    return Submitted(submissions, body.n)


def _check_request(body: TextRequest, prompts: int, limits: ServeLimits) -> None:
    """Raise RequestError if the request asks for more than the service allows, or contradicts."""
    if not prompts:
        raise refused("prompt", "there is none")
    if prompts > limits.max_inputs:
        raise refused("prompt", f"{prompts} prompts; this service takes {limits.max_inputs}")
    if prompts * body.n > limits.max_n:
        texts = f"{prompts} prompts × n {body.n}"
        raise refused("n", f"{texts} are more than the {limits.max_n} texts of one request")
    if prompts > limits.max_waiting:  # they would never all fit into the queue
        raise refused("prompt", f"{prompts} prompts; {limits.max_waiting} may wait at this service")
    if isinstance(body.stop, str) and not 0 < len(body.stop) <= STOP_LENGTH:
        raise refused("stop", f"give 1 to {STOP_LENGTH} characters")
    if body.stream_options is not None and not body.stream:
        raise refused("stream_options", "only with stream")


def _options(service: Service, body: TextRequest, logprobs: int | None) -> dict[str, Any]:
    """The generation settings, by their names in `GenerationOptions`."""
    most = service.limits.max_tokens
    limits = {"max_tokens": body.max_tokens}
    if isinstance(body, ChatRequest):
        limits["max_completion_tokens"] = body.max_completion_tokens
    given = {name: value for name, value in limits.items() if value is not None}
    if len(set(given.values())) > 1:
        raise refused("max_completion_tokens", "is another number than max_tokens")
    for name, value in given.items():
        if value > most:
            raise refused(name, f"{value} is more than the {most} tokens of this service")
    if body.n > 1 and body.temperature == 0:
        raise refused("n", "at temperature 0 all texts would be the same: give a temperature")
    bias = {}
    for token, added in (body.logit_bias or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise refused("logit_bias", "give token ids")
        if int(token) in bias:  # "7" and "07"
            raise refused("logit_bias", f"two values of the token {int(token)}")
        bias[int(token)] = added
    return {
        "max_new_tokens": next(iter(given.values()), most),
        "shorten": not given,  # the service's default may be reduced
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": 0 if body.top_k == -1 else body.top_k,
        "min_p": body.min_p,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "logit_bias": bias or None,
        "stop": body.stop if body.stop else None,
        "n": body.n,
        "logprobs": logprobs,
    }


@asynccontextmanager
async def watched(request: Request, submitted: Submitted) -> AsyncIterator[None]:
    """Cancel the submissions if the client disconnects during the context."""

    async def watch() -> None:
        await _disconnected(request)
        submitted.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except BaseException:
        submitted.cancel()
        raise
    finally:
        watcher.cancel()


async def _while_connected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is cancelled if the client disconnects.

    Raises:
        EngineClosedError: the client disconnected.
    """
    working = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise EngineClosedError("the client disconnected")
        return working.result()
    finally:
        working.cancel()
        watcher.cancel()


async def _disconnected(request: Request) -> None:
    """Wait until the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
