"""Routes for operators: health, readiness and metrics."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from loradeploy.serve.routes.dependencies import ServiceOf
from loradeploy.serve.schemas.common import Status

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health(service: ServiceOf) -> Status:
    """Check that the process responds and its engine runs; needs no key."""
    service.check_alive()
    return Status(status="ok")


@router.get("/ready")
async def ready(service: ServiceOf) -> Status:
    """Check that requests are accepted: not during shutdown, or after the engine has failed.

    Needs no key, because clients such as Kubernetes have none.
    """
    service.check_ready()
    return Status(status="ready")


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: ServiceOf) -> Response:
    """Metrics for Prometheus."""
    kind = "text/plain; version=0.0.4; charset=utf-8"
    return Response(service.metrics.text(), headers={"Content-Type": kind})
