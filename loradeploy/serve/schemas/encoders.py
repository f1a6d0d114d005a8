"""Requests and answers of encoders: embeddings in OpenAI's shape, the others in vLLM's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from loradeploy.serve.schemas.common import Answer, ModelRequest

_TRUNCATE = Field(
    default=False,
    description="An extension: cut texts that are longer than the model takes; without it they are"
    " refused.",
)


class EmbeddingRequest(ModelRequest):
    """A request for vectors."""

    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, description="Must be the size of the vectors.")
    prompt_name: str | None = Field(
        default=None, description="An extension: which of the model's own prompts goes before."
    )
    truncate: bool = _TRUNCATE


class ClassifyRequest(ModelRequest):
    """A request for labels."""

    input: str | list[str]
    threshold: float | None = Field(
        default=None, ge=0, le=1, description="An extension, for multi-label classifiers."
    )
    truncate: bool = _TRUNCATE


class RerankRequest(ModelRequest):
    """A request for the order of documents."""

    query: str
    documents: list[str]
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = True
    truncate: bool = _TRUNCATE


class TextUsage(Answer):
    """How many tokens a request took."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Answer):
    """A text's vector; of base64, of its float32 numbers, little endian."""

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
    """What a text is."""

    index: int
    label: str
    score: float
    probs: list[float] = Field(description="By output; of a regression its numbers.")
    num_classes: int
    labels: list[str] = Field(description="All labels that the text has.")
    scores: dict[str, float]
    problem_type: str


class LabelList(Answer):
    """What the texts are."""

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
    """A document's number among those given, and its score."""

    index: int
    relevance_score: float
    document: RankedText | None = None


class Ranking(Answer):
    """The documents, the best first."""

    id: str
    model: str
    results: list[Ranked]
    usage: TextUsage
