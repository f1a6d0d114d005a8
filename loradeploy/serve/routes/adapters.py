"""Routes for loading and unloading adapters, with the interface of vLLM's API."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from loradeploy.errors import AdapterError
from loradeploy.serve.keys import ApiKey
from loradeploy.serve.problems import RequestError
from loradeploy.serve.routes.bodies import JsonRoute
from loradeploy.serve.routes.dependencies import KeyOf, ServiceOf
from loradeploy.serve.schemas.common import AdapterName, AdapterRequest
from loradeploy.serve.service import Service

router = APIRouter(route_class=JsonRoute, tags=["adapters"])


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_adapter(body: AdapterRequest, service: ServiceOf, key: KeyOf) -> str:
    """Load an adapter of the adapter root."""
    _check(service, key)
    entry = body.lora_name if body.lora_path is None else body.lora_path
    try:
        await service.catalog.load(body.lora_name, entry, key, replace=body.load_inplace)
    except AdapterError as error:
        root = service.catalog.root
        message = str(error) if root is None else root.without_paths(str(error))
        raise RequestError(400, message, param="lora_path", code="adapter_load_failed") from None
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_adapter(body: AdapterName, service: ServiceOf, key: KeyOf) -> str:
    """Unload an adapter, once the requests that use it have ended."""
    _check(service, key)
    await service.catalog.unload(body.lora_name, key)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def _check(service: Service, key: ApiKey) -> None:
    if not service.updates:
        raise RequestError(
            404,
            "requests may not load or unload adapters: the service needs --allow-adapter-updates",
        )
    if not key.admin:
        raise RequestError(403, "this API key may not load or unload adapters")
