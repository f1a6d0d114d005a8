"""Requests and responses of encoders: embeddings as in OpenAI's API, others as in vLLM's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from loradeploy.serve.schemas.common import Answer, ModelRequest

_TRUNCATE = Field(
    default=False,
    description="An extension: truncate texts that are longer than the model's maximum; by default"
    " they are refused.",
)


class EmbeddingRequest(ModelRequest):
    """A request for embeddings."""

    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, description="Must be the size of the vectors.")
    prompt_name: str | None = Field(
        default=None, description="An extension: the name of a prompt of the model to prepend."
    )
    truncate: bool = _TRUNCATE


class ClassifyRequest(ModelRequest):
    """A request to classify texts."""

    input: str | list[str]
    threshold: float | None = Field(
        default=None, ge=0, le=1, description="An extension, for multi-label classifiers."
    )
    truncate: bool = _TRUNCATE


class RerankRequest(ModelRequest):
    """A request to rerank documents."""

    query: str
    documents: list[str]
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = True
    truncate: bool = _TRUNCATE


class TextUsage(Answer):
    """The token counts of a request."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Answer):
    """A text's vector; base64 encodes its float32 values in little-endian order."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(Answer):
    """The vectors of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: TextUsage


class TextLabel(Answer):
    """The classification of a text."""

    index: int
    label: str
    score: float
    probs: list[float] = Field(
        description="Probability of each output; for a regression, its numbers."
    )
    num_classes: int
    labels: list[str] = Field(description="All predicted labels.")
    scores: dict[str, float]
    problem_type: str


class LabelList(Answer):
    """The classifications of the texts."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[TextLabel]
    usage: TextUsage


class RankedText(Answer):
    """A document."""

    text: str


class Ranked(Answer):
    """A document's index in the request, and its score."""

    index: int
    relevance_score: float
    document: RankedText | None = None


class Ranking(Answer):
    """The documents, most relevant first."""

    id: str
    model: str
    results: list[Ranked]
    usage: TextUsage
