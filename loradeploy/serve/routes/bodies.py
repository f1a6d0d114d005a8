"""Request bodies: JSON of one meaning."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from loradeploy.parsing import distinct


class JsonRoute(APIRoute):
    """A route whose JSON bodies must not have two values of one name.

    Programs in front of a service, which check or count requests, may read the other value.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of FastAPI, with such bodies refused as JSON that is not valid."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return strict


class _Request(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            try:
                self._json = json.loads(await self.body(), object_pairs_hook=distinct)
            except json.JSONDecodeError:
                raise
            except ValueError as problem:
                raise json.JSONDecodeError(str(problem), "", 0) from None
        return self._json
