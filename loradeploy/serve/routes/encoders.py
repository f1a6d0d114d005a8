"""Embeddings, labels and the order of documents, by encoders."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from fastapi import APIRouter

from loradeploy.adapter.tasks import FEATURE_EXTRACTION, SEQUENCE_CLASSIFICATION
from loradeploy.bundle.text.pairs import pair_tokens
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.tasks.classification import TextClassifier
from loradeploy.runtime.tasks.embedding import TextEmbedder
from loradeploy.runtime.tasks.pairs import TextPairScorer
from loradeploy.serve.answers import new_id
from loradeploy.serve.keys import ApiKey
from loradeploy.serve.problems import refused
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

router = APIRouter(tags=["encoders"])
_Result = TypeVar("_Result")


@router.post("/v1/embeddings")
async def embed(body: EmbeddingRequest, service: ServiceOf, key: KeyOf) -> EmbeddingList:
    """The vector of each text."""
    service.check_task(FEATURE_EXTRACTION, "embeddings")
    texts = _texts(service, body.input, "input")
    adapter = await service.catalog.resolve(body.model, body.adapters, key)

    def work() -> tuple[np.ndarray, TextUsage]:
        embedder = TextEmbedder(service.session)
        recipe = service.session.texts.of(adapter).recipe
        name = recipe.default_prompt if body.prompt_name is None else body.prompt_name
        prompt = recipe.prompts.get(name or "", "")  # an unknown one is refused below
        usage = _usage(service, [prompt + text for text in texts], adapter, truncate=body.truncate)
        return embedder(texts, adapter, prompt_name=body.prompt_name), usage

    vectors, usage = await _run(service, key, work, len(texts))
    if body.dimensions is not None and body.dimensions != vectors.shape[1]:
        raise refused("dimensions", f"the model's vectors have {vectors.shape[1]} numbers")
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
    return EmbeddingList(data=data, model=body.model, usage=usage)


@router.post("/v1/classify")
async def classify(body: ClassifyRequest, service: ServiceOf, key: KeyOf) -> LabelList:
    """The labels of each text."""
    service.check_task(SEQUENCE_CLASSIFICATION, "labels of texts")
    texts = _texts(service, body.input, "input")
    adapter = await service.catalog.resolve(body.model, body.adapters, key)

    def work() -> tuple[list[TextLabel], TextUsage]:
        usage = _usage(service, texts, adapter, truncate=body.truncate)
        found = TextClassifier(service.session)(texts, adapter, threshold=body.threshold)
        labels = [
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
        return labels, usage

    data, usage = await _run(service, key, work, len(texts))
    return LabelList(
        id=new_id("classify"), created=service.now(), model=body.model, data=data, usage=usage
    )


@router.post("/v1/rerank")
async def rerank(body: RerankRequest, service: ServiceOf, key: KeyOf) -> Ranking:
    """The documents in the order in which they answer a query."""
    service.check_task(SEQUENCE_CLASSIFICATION, "scores of documents")
    documents = _texts(service, body.documents, "documents")
    adapter = await service.catalog.resolve(body.model, body.adapters, key)

    def work() -> tuple[list[Ranked], TextUsage]:
        pairs = [(body.query, document) for document in documents]
        usage = _usage(service, pairs, adapter, truncate=body.truncate)
        scorer = TextPairScorer(service.session)
        results = [
            Ranked(
                index=one.index,
                relevance_score=one.score,
                document=RankedText(text=documents[one.index]) if body.return_documents else None,
            )
            for one in scorer.rerank(body.query, documents, adapter, top_k=body.top_n)
        ]
        return results, usage

    results, usage = await _run(service, key, work, len(documents))
    return Ranking(id=new_id("rerank"), model=body.model, results=results, usage=usage)


async def _run(service: Service, key: ApiKey, work: Callable[[], _Result], texts: int) -> _Result:
    begin = time.perf_counter()
    result = await service.encoder.run(work, key)
    service.metrics.encoded(texts, time.perf_counter() - begin)
    return result


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
) -> TextUsage:
    """The tokens of texts or pairs, as the adapter reads them.

    Raises:
        RequestError: 400, one is longer than the model takes, unless it may be truncated.
    """
    side = service.session.texts.of(adapter)
    tokenizer = side.tokenizer
    own = side.recipe.max_length
    limits = (tokenizer.max_length if own is None else own, tokenizer.positions)
    longest = min((limit for limit in limits if limit is not None), default=None)
    count = 0
    for number, text in enumerate(texts, start=1):
        if isinstance(text, str):
            tokens = len(tokenizer.encode(text))
        else:
            tokens = len(pair_tokens(tokenizer, *text, max_length=None, typed=False).ids)
        if longest is not None and tokens > longest:
            if not truncate:
                message = f"text {number} has {tokens} tokens, the model takes {longest}: give"
                raise refused("truncate", f"{message} truncate to cut it")
            tokens = longest
        count += tokens
    return TextUsage(prompt_tokens=count, total_tokens=count)
