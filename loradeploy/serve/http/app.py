"""The ASGI application of a service."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from loradeploy.errors import LoraDeployError
from loradeploy.serve.http.gate import Gate
from loradeploy.serve.problems import RequestError, problem_of
from loradeploy.serve.routes import adapters, encoders, inference, models, operations, page, text
from loradeploy.serve.schemas.common import ErrorAnswer
from loradeploy.serve.service import Service

_DESCRIPTION = (
    "A bundle of loradeploy as a service. A request's model names the base, or an adapter."
)


def create_app(service: Service) -> ASGIApp:
    """Create the application of `service`; its OpenAPI description is at /openapi.json."""
    app = FastAPI(
        title="loradeploy",
        version="1",
        description=_DESCRIPTION,
        docs_url=None,  # these pages load scripts from other hosts
        redoc_url=None,
        responses={"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}},
    )
    app.state.service = service
    for routes in (models, text, encoders, inference, adapters, operations, page):
        app.include_router(routes.router)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _response(request, _of_validation(error))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return _response(request, RequestError(error.status_code, message, headers=error.headers))

    @app.exception_handler(RequestError)
    @app.exception_handler(LoraDeployError)
    @app.exception_handler(Exception)  # also raised to the gate, after the response
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _response(request, problem_of(error))

    return Gate(app, service)


def _response(request: Request, problem: RequestError) -> JSONResponse:
    return JSONResponse(problem.body_at(request.url.path), problem.status, headers=problem.headers)


def _of_validation(error: RequestValidationError) -> RequestError:
    """The first error of a body, with the name of its field."""
    first: dict[str, Any] = error.errors()[0]
    # For a field of several types, the location contains type names.
    parts = [str(part) for part in first["loc"][1:]]
    param = ".".join(part for part in parts if part != "str" and "[" not in part)
    if first["type"] == "extra_forbidden":
        return RequestError(
            400, f"{param} is not supported", param=param, code="unsupported_parameter"
        )
    if first["type"] == "json_invalid":
        reason = str(first.get("ctx", {}).get("error", ""))
        return RequestError(
            400, f"the body is not JSON: {reason}" if reason else "the body is not JSON"
        )
    return RequestError(400, f"{param or 'the body'}: {first['msg']}", param=param or None)
