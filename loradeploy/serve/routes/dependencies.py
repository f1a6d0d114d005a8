"""Dependencies of routes: the service, and the key of the request."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request

from loradeploy.serve.keys import ApiKey
from loradeploy.serve.service import Service


def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


def _key(request: Request) -> ApiKey:
    return cast(ApiKey, request.state.key)


ServiceOf = Annotated[Service, Depends(_service)]
KeyOf = Annotated[ApiKey, Depends(_key)]
