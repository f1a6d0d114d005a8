"""Requests and responses of text generation, as in OpenAI's API."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
)
from pydantic_core import PydanticCustomError

from loradeploy.serve.schemas.common import Answer, ModelRequest, RequestBody

_Token = Annotated[int, Field(ge=0)]
# Maximum characters of a stop string.
STOP_LENGTH: Final = 256
_Stop = Annotated[str, Field(min_length=1, max_length=STOP_LENGTH)]
_Bias = Annotated[float, Field(ge=-1000, le=1000)]


def _prompt(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Refuse a prompt of no accepted type with one message for all types; pydantic's is of one."""
    try:
        return handler(value)
    except ValidationError:
        message = "give a text, token ids (integers from 0), or a list of either"
        raise PydanticCustomError("prompt", message) from None


class StreamOptions(RequestBody):
    """Options of a stream."""

    include_usage: bool = Field(default=False, description="Send the usage in the last chunk.")


class JsonSchema(RequestBody):
    """A JSON schema."""

    name: str
    description: str | None = None
    strict: bool | None = Field(
        default=None, description="Has no effect: texts always match the schema."
    )
    schema_: dict[str, Any] = Field(default_factory=lambda: {"type": "object"}, alias="schema")


class ResponseFormat(RequestBody):
    """The format of a text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class TextRequest(ModelRequest):
    """Fields of both kinds of text requests."""

    temperature: float = Field(default=1.0, ge=0, le=100, description="0 is greedy.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(
        default=None, ge=-1, description="An extension; 0 and -1 mean all tokens."
    )
    min_p: float | None = Field(default=None, ge=0, le=1, description="An extension.")
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(
        default=None, gt=0, le=100, description="An extension."
    )
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        lt=2**63,
        description="The seed of each prompt. The same seed gives the same text; without one it is"
        " random.",
    )
    stop: str | Annotated[list[_Stop], Field(max_length=16)] | None = None
    n: int = Field(default=1, ge=1, description="Number of texts for each prompt.")
    max_tokens: int | None = Field(
        default=None, ge=1, description="By default the maximum of the service."
    )
    logit_bias: dict[str, _Bias] | None = Field(
        default=None, description="Added to the logits of tokens, by token id."
    )
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    metadata: dict[str, str] | None = Field(default=None, description="Has no effect.")
    safety_identifier: str | None = Field(default=None, description="Has no effect.")
    prompt_cache_key: str | None = Field(default=None, description="Has no effect.")
    service_tier: Literal["auto", "default"] = Field(default="auto", description="Has no effect.")
    store: Literal[False] = False


class CompletionRequest(TextRequest):
    """A request to continue prompts."""

    prompt: Annotated[
        str | list[str] | list[_Token] | list[list[_Token]], WrapValidator(_prompt)
    ] = Field(description="A text, token ids, or a list of either.")
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Return this many most likely tokens per position."
    )
    echo: Literal[False] = False
    best_of: int | None = Field(default=None, description="Must be n.")


class TextPart(RequestBody):
    """A text in a message."""

    type: Literal["text"]
    text: str


class ImageUrl(RequestBody):
    """An image."""

    url: str = Field(description="A data: URL; nothing is fetched.")
    detail: str = Field(default="auto", description="Must be auto.")


class ImagePart(RequestBody):
    """An image in a message, for a service with a vision tower."""

    type: Literal["image_url"]
    image_url: ImageUrl


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(RequestBody):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="The chat template must support it; developer is treated as system."
    )
    content: str | list[ContentPart]
    name: str | None = Field(default=None, description="For chat templates that read it.")


class ChatRequest(TextRequest):
    """A request to answer a conversation."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(
        default=None, ge=1, description="The same as max_tokens."
    )
    logprobs: bool = False
    top_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="With logprobs, return this many most likely tokens per position.",
    )


class CachedTokens(Answer):
    """Prompt tokens whose keys and values were in the prefix cache."""

    cached_tokens: int


class Usage(Answer):
    """The token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(Answer):
    """The log-probabilities of a text's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Answer):
    """A text, or a part of a streamed one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(Answer):
    """The texts for a request's prompts, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class LikelyToken(Answer):
    """A likely token at a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(LikelyToken):
    """A token of a text, with the most likely tokens at its position."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(Answer):
    """The log-probabilities of a message's tokens."""

    content: list[TokenLogprobs]


class AssistantMessage(Answer):
    """The model's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Answer):
    """One of the `n` responses."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Answer):
    """The response to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Answer):
    """The new part of a streamed message."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _without_nulls(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if value is not None}


class ChunkChoice(Answer):
    """A new part of one of the responses."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(Answer):
    """A chunk of a streamed chat response."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
