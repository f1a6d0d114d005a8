"""Server-sent events with the chunks of a response."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse
from starlette.types import Send

from loradeploy.serve.answering.answers import ChatPieces, CompletionPieces
from loradeploy.serve.answering.generating import Submitted
from loradeploy.serve.problems import problem_of


class EventStream(StreamingResponse):
    """A streamed response; the request ends when the client disconnects.

    An error after the first chunk is sent as an event, and [DONE] does not follow.
    """

    def __init__(
        self,
        submitted: Submitted,
        pieces: ChatPieces | CompletionPieces,
        *,
        include_usage: bool,
    ) -> None:
        events = _events(submitted, pieces, include_usage=include_usage)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._submitted = submitted

    async def stream_response(self, send: Send) -> None:
        """Send the response; when this ends, also by a slow or lost client, cancel the request."""
        try:
            await super().stream_response(send)
        finally:
            self._submitted.cancel()


async def _events(
    submitted: Submitted, pieces: ChatPieces | CompletionPieces, *, include_usage: bool
) -> AsyncIterator[str]:
    generated = 0
    try:
        async for index, event in submitted.events():
            if event.generation is not None:
                generated += event.generation.completion_tokens
            for chunk in pieces.of(index, event):
                # If usage is requested, all other chunks have null.
                left_out = None if include_usage else {"usage"}
                yield _event(chunk.model_dump_json(exclude=left_out))
        if include_usage:
            yield _event(pieces.usage(submitted.usage(generated)).model_dump_json())
        yield _event("[DONE]")
    except Exception as problem:
        yield _event(json.dumps(problem_of(problem).body))


def _event(data: str) -> str:
    return f"data: {data}\n\n"
