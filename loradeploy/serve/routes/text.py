"""Routes for text generation, with the interface of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from loradeploy.runtime.tasks.generation import Generation
from loradeploy.serve.answering.answers import (
    ChatPieces,
    CompletionPieces,
    chat_completion,
    completion,
)
from loradeploy.serve.answering.generating import (
    Submitted,
    chat_images,
    chat_prompt,
    completion_prompts,
    submit,
    watched,
)
from loradeploy.serve.answering.streaming import EventStream
from loradeploy.serve.problems import refused
from loradeploy.serve.routes.bodies import JsonRoute
from loradeploy.serve.routes.dependencies import KeyOf, ServiceOf
from loradeploy.serve.schemas.text import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    TextRequest,
    Usage,
)
from loradeploy.serve.service import Service

router = APIRouter(route_class=JsonRoute, tags=["text generation"])
_Answer = TypeVar("_Answer")
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream, its pieces as server-sent events.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=_STREAMED)
async def answer_chat(
    body: ChatRequest, request: Request, service: ServiceOf, key: KeyOf
) -> ChatCompletion | Response:
    """Answer a conversation."""
    if body.top_logprobs is not None and not body.logprobs:
        raise refused("top_logprobs", "only with logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    images = chat_images(body)
    submitted = await submit(request, service, key, body, [chat_prompt(body)], logprobs, images)
    return await _answered(request, body, service, submitted, chat_completion, ChatPieces)


@router.post("/v1/completions", response_model=Completion, responses=_STREAMED)
async def complete(
    body: CompletionRequest, request: Request, service: ServiceOf, key: KeyOf
) -> Completion | Response:
    """Continue one or several prompts."""
    if body.best_of is not None and body.best_of != body.n:
        raise refused("best_of", "must be equal to n: choosing the best texts is not supported")
    submitted = await submit(request, service, key, body, completion_prompts(body), body.logprobs)
    return await _answered(request, body, service, submitted, completion, CompletionPieces)


async def _answered(
    request: Request,
    body: TextRequest,
    service: Service,
    submitted: Submitted,
    whole: Callable[[Sequence[Generation], Usage, str, int], _Answer],
    pieces: Callable[[str, int], ChatPieces | CompletionPieces],
) -> _Answer | Response:
    """Answer with `whole`, or with a stream of `pieces` once the first text has started."""
    async with watched(request, submitted):
        if not body.stream:
            texts = await submitted.generations()
            usage = submitted.usage(sum(text.completion_tokens for text in texts))
            return whole(texts, usage, body.model, service.now())
        await submitted.started()
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStream(submitted, pieces(body.model, service.now()), include_usage=include_usage)
