"""Routes for the models of the service."""

from __future__ import annotations

from fastapi import APIRouter

from loradeploy.serve.adapters.catalog import Model
from loradeploy.serve.problems import RequestError
from loradeploy.serve.routes.dependencies import KeyOf, ServiceOf
from loradeploy.serve.schemas.common import ModelCard, ModelList
from loradeploy.serve.service import Service

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(service: ServiceOf, key: KeyOf) -> ModelList:
    """List the base and the adapters."""
    return ModelList(data=[_card(service, model) for model in await service.catalog.models(key)])


@router.get("/v1/models/{model}")
async def show_model(model: str, service: ServiceOf, key: KeyOf) -> ModelCard:
    """Show one model."""
    for known in await service.catalog.models(key):
        if known.name == model:
            return _card(service, known)
    raise RequestError(404, "there is no such model", param="model", code="model_not_found")


def _card(service: Service, model: Model) -> ModelCard:
    return ModelCard(
        id=model.name,
        created=service.created,
        root=service.catalog.base,
        parent=model.parent,
        digest=model.digest,
    )
