"""Routes for embeddings, classification and reranking, by encoders."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from fastapi import APIRouter

from loradeploy.adapter.tasks import FEATURE_EXTRACTION, SEQUENCE_CLASSIFICATION
from loradeploy.bundle.text.pairs import pair_tokens
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.arguments import Adapters
from loradeploy.runtime.tasks.classification import Classification, TextClassifier
from loradeploy.runtime.tasks.embedding import TextEmbedder
from loradeploy.runtime.tasks.encoder import chosen_prompt
from loradeploy.runtime.tasks.pairs import TextPairScorer
from loradeploy.serve.answering.answers import new_id
from loradeploy.serve.encoding import RowWork
from loradeploy.serve.keys import ApiKey
from loradeploy.serve.problems import refused
from loradeploy.serve.routes.bodies import JsonRoute
from loradeploy.serve.routes.dependencies import KeyOf, ServiceOf
from loradeploy.serve.schemas.encoders import (
    ClassifyRequest,
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    LabelList,
    Ranked,
    RankedText,
    Ranking,
    RerankRequest,
    TextLabel,
    TextUsage,
)
from loradeploy.serve.service import Service
from loradeploy.serve.settings import MOST_TOKENS

if TYPE_CHECKING:
    from numpy.typing import NDArray

router = APIRouter(route_class=JsonRoute, tags=["encoders"])
_Row = TypeVar("_Row")
_Result = TypeVar("_Result")


@router.post("/v1/embeddings")
async def embed(body: EmbeddingRequest, service: ServiceOf, key: KeyOf) -> EmbeddingList:
    """Embed each text."""
    service.check_task(FEATURE_EXTRACTION, "embeddings")
    texts = _texts(service, body.input, "input")
    adapter = await service.catalog.resolve(body.model, body.adapters, key)

    def usage() -> TextUsage:
        recipe = service.session.texts.of(adapter).recipe
        name = recipe.default_prompt if body.prompt_name is None else body.prompt_name
        prompt = recipe.prompts.get(name or "", "")  # an unknown name is refused below
        prompted, own = [prompt + text for text in texts], recipe.max_length
        return _usage(service, prompted, adapter, truncate=body.truncate, own=own)

    def run(rows: Sequence[str], adapters: Adapters) -> Sequence[NDArray[np.float32]]:
        embedder = TextEmbedder(service.session)
        return list(embedder(rows, adapters, prompt_name=body.prompt_name))

    work = RowWork(("embed", body.prompt_name), usage, run)
    used, vectors = await _run(service, key, work, texts, adapter)
    if body.dimensions is not None and body.dimensions != len(vectors[0]):
        raise refused("dimensions", f"the model's vectors have {len(vectors[0])} numbers")
    as_text = body.encoding_format == "base64"
    data = [
        Embedding(
            index=index,
            embedding=b64encode(vector.astype("<f4").tobytes()).decode()
            if as_text
            else [float(value) for value in vector],
        )
        for index, vector in enumerate(vectors)
    ]
    return EmbeddingList(data=data, model=body.model, usage=used)


@router.post("/v1/classify")
async def classify(body: ClassifyRequest, service: ServiceOf, key: KeyOf) -> LabelList:
    """Classify each text."""
    service.check_task(SEQUENCE_CLASSIFICATION, "labels of texts")
    texts = _texts(service, body.input, "input")
    adapter = await service.catalog.resolve(body.model, body.adapters, key)

    def usage() -> TextUsage:
        return _usage(service, texts, adapter, truncate=body.truncate)

    def run(rows: Sequence[str], adapters: Adapters) -> Sequence[Classification]:
        return TextClassifier(service.session)(rows, adapters, threshold=body.threshold)

    # Whether a threshold is allowed depends on the adapter.
    group = "classify" if body.threshold is None else (body.threshold, repr(adapter))
    work = RowWork(group, usage, run)
    used, found = await _run(service, key, work, texts, adapter)
    data = [
        TextLabel(
            index=index,
            label=one.label,
            score=one.score,
            probs=list(one.scores.values()),
            num_classes=len(one.scores),
            labels=list(one.labels),
            scores=one.scores,
            problem_type=one.problem_type,
        )
        for index, one in enumerate(found)
    ]
    return LabelList(
        id=new_id("classify"), created=service.now(), model=body.model, data=data, usage=used
    )


@router.post("/v1/rerank")
async def rerank(body: RerankRequest, service: ServiceOf, key: KeyOf) -> Ranking:
    """Sort documents by their relevance to a query."""
    service.check_task(SEQUENCE_CLASSIFICATION, "scores of documents")
    documents = _texts(service, body.documents, "documents")
    adapter = await service.catalog.resolve(body.model, body.adapters, key)

    pairs = [(body.query, document) for document in documents]

    def usage() -> TextUsage:
        own = service.session.texts.of(adapter).scoring
        query = chosen_prompt(own.prompts, own.default_prompt, None) + body.query
        prompted = [(query, document) for document in documents]
        return _usage(service, prompted, adapter, truncate=body.truncate, own=own.max_length)

    def run(rows: Sequence[tuple[str, str]], adapters: Adapters) -> Sequence[float]:
        return [float(score) for score in TextPairScorer(service.session).score(rows, adapters)]

    used, scores = await _run(service, key, RowWork("score", usage, run), pairs, adapter)
    # Descending; ties keep their order.
    order = sorted(range(len(scores)), key=lambda number: -scores[number])[: body.top_n]
    results = [
        Ranked(
            index=index,
            relevance_score=scores[index],
            document=RankedText(text=documents[index]) if body.return_documents else None,
        )
        for index in order
    ]
    return Ranking(id=new_id("rerank"), model=body.model, results=results, usage=used)


async def _run(
    service: Service,
    key: ApiKey,
    work: RowWork[_Row, TextUsage, _Result],
    rows: Sequence[_Row],
    adapter: AdapterSpec | None,
) -> tuple[TextUsage, list[_Result]]:
    begin = time.perf_counter()
    answer = await service.encoder.run(work, rows, adapter, key)
    service.metrics.encoded(len(rows), time.perf_counter() - begin)
    return answer


def _texts(service: Service, given: str | list[str], param: str) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not texts:
        raise refused(param, "there are no texts")
    most = service.limits.max_inputs
    if len(texts) > most:
        raise refused(param, f"{len(texts)} texts; this service takes {most}")
    return texts


def _usage(
    service: Service,
    texts: Sequence[str | tuple[str, str]],
    adapter: AdapterSpec | None,
    *,
    truncate: bool,
    own: int | None = None,
) -> TextUsage:
    """Count the tokens of texts or pairs, with the adapter's tokenizer.

    `own`: the maximum number of tokens in sentence-transformers' files.

    Raises:
        RequestError: 400, one is too long for the model and must not be truncated, or too long for
            the service and the model has no maximum.
    """
    side = service.session.texts.of(adapter)
    tokenizer = side.tokenizer
    longest = side.longest(own)
    count = 0
    for number, text in enumerate(texts, start=1):
        if isinstance(text, str):
            tokens = len(tokenizer.encode(text))
        else:
            tokens = len(pair_tokens(tokenizer, *text, max_length=None, typed=False).ids)
        if longest is None and tokens > MOST_TOKENS:
            raise refused(
                "input", f"text {number} has {tokens} tokens, the service takes {MOST_TOKENS}"
            )
        if longest is not None and tokens > longest:
            if not truncate:
                message = f"text {number} has {tokens} tokens, the model takes {longest}: give"
                raise refused("truncate", f"{message} truncate=true to shorten it")
            tokens = longest
        count += tokens
    return TextUsage(prompt_tokens=count, total_tokens=count)
