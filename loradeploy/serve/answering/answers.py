"""Convert generated texts to responses in OpenAI's format, complete or in chunks."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Literal

from loradeploy.runtime.decoding.choosing.logprobs import TokenLogprob
from loradeploy.runtime.engine.submission import GenerationEvent
from loradeploy.runtime.tasks.generation import Generation
from loradeploy.serve.schemas.text import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    LikelyToken,
    TokenLogprobs,
    Usage,
)

# JSON cannot represent -inf.
_LEAST = -9999.0


def new_id(kind: str) -> str:
    """A new id for a response."""
    return f"{kind}-{secrets.token_hex(12)}"


def ended_by(text: Generation) -> Literal["stop", "length"]:
    """OpenAI's finish reason of a text."""
    return "length" if text.finish_reason == "length" else "stop"


def chat_completion(
    texts: Sequence[Generation], usage: Usage, model: str, created: int
) -> ChatCompletion:
    """The response to a chat request."""
    choices = [
        ChatChoice(
            index=index,
            message=AssistantMessage(content=text.text),
            logprobs=_chat_logprobs(text.logprobs),
            finish_reason=ended_by(text),
        )
        for index, text in enumerate(texts)
    ]
    return ChatCompletion(
        id=new_id("chatcmpl"), created=created, model=model, choices=choices, usage=usage
    )


def completion(texts: Sequence[Generation], usage: Usage, model: str, created: int) -> Completion:
    """The response to a completion request."""
    choices = [
        CompletionChoice(
            index=index,
            text=text.text,
            logprobs=_completion_logprobs(text.logprobs, 0),
            finish_reason=ended_by(text),
        )
        for index, text in enumerate(texts)
    ]
    return Completion(id=new_id("cmpl"), created=created, model=model, choices=choices, usage=usage)


class ChatPieces:
    """The chunks of a streamed chat response."""

    def __init__(self, model: str, created: int) -> None:
        self._chunk = ChatChunk(id=new_id("chatcmpl"), created=created, model=model, choices=[])
        self._begun: set[int] = set()

    def of(self, index: int, event: GenerationEvent) -> list[ChatChunk]:
        """The chunks of an event."""
        choices = []
        if index not in self._begun:
            self._begun.add(index)
            delta = Delta(role="assistant", content="")
            choices.append(ChunkChoice(index=index, delta=delta))
        if event.text or event.logprobs:
            choices.append(
                ChunkChoice(
                    index=index,
                    delta=Delta(content=event.text),
                    logprobs=_chat_logprobs(event.logprobs),
                )
            )
        if event.generation is not None:
            reason = ended_by(event.generation)
            choices.append(ChunkChoice(index=index, delta=Delta(), finish_reason=reason))
        return [self._chunk.model_copy(update={"choices": [choice]}) for choice in choices]

    def usage(self, usage: Usage) -> ChatChunk:
        """The chunk with the usage, without choices."""
        return self._chunk.model_copy(update={"usage": usage})


class CompletionPieces:
    """The chunks of a streamed completion response."""

    def __init__(self, model: str, created: int) -> None:
        self._chunk = Completion(id=new_id("cmpl"), created=created, model=model, choices=[])
        self._lengths: dict[int, int] = {}

    def of(self, index: int, event: GenerationEvent) -> list[Completion]:
        """The chunks of an event."""
        offset = self._lengths.get(index, 0)
        for token in event.logprobs or ():
            self._lengths[index] = self._lengths.get(index, 0) + len(token.token)
        if not (event.text or event.logprobs or event.generation):
            return []
        choice = CompletionChoice(
            index=index,
            text=event.text,
            logprobs=_completion_logprobs(event.logprobs, offset),
            finish_reason=None if event.generation is None else ended_by(event.generation),
        )
        return [self._chunk.model_copy(update={"choices": [choice]})]

    def usage(self, usage: Usage) -> Completion:
        """The chunk with the usage, without choices."""
        return self._chunk.model_copy(update={"usage": usage})


def _chat_logprobs(tokens: Sequence[TokenLogprob] | None) -> ChatLogprobs | None:
    if tokens is None:
        return None
    content = [
        TokenLogprobs(**_likely(token).model_dump(), top_logprobs=[_likely(t) for t in token.top])
        for token in tokens
    ]
    return ChatLogprobs(content=content)


def _likely(token: TokenLogprob) -> LikelyToken:
    # A token that is a part of a character has no text, and its bytes are unknown.
    known = "\N{REPLACEMENT CHARACTER}" not in token.token
    return LikelyToken(
        token=token.token,
        logprob=max(token.logprob, _LEAST),
        bytes=list(token.token.encode()) if known else None,
    )


def _completion_logprobs(
    tokens: Sequence[TokenLogprob] | None, offset: int
) -> CompletionLogprobs | None:
    if tokens is None:
        return None
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return CompletionLogprobs(
        tokens=[token.token for token in tokens],
        token_logprobs=[max(token.logprob, _LEAST) for token in tokens],
        # Tokens may have equal texts: the more likely one, which comes first, is kept.
        top_logprobs=[
            {t.token: max(t.logprob, _LEAST) for t in reversed(token.top)} for token in tokens
        ],
        text_offset=offsets,
    )
