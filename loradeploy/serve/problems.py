"""Errors as OpenAI's API gives them: a status, and an object with message, type, param and code."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from typing import Any, Final

from loradeploy.errors import (
    AdapterError,
    BudgetError,
    DataError,
    DeadlineError,
    EngineClosedError,
    EngineFullError,
    LoraDeployError,
    UnknownAdapterError,
    UsageError,
)
from loradeploy.printable import logger_of

logger = logger_of(__name__)

# The type of an error by its status, as OpenAI's API has it.
_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


class RequestError(Exception):
    """A request that is answered with an error.

    `param`: the field of the request that is wrong. `retry_after`: seconds after which the same
    request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))

    def body_at(self, path: str) -> dict[str, Any]:
        """The JSON of the answer to a request for `path`, by its protocol."""
        return {"error": self.message} if speaks_v2(path) else self.body

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer, as OpenAI's API has it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


def speaks_v2(path: str) -> bool:
    """Whether a path is of the Open Inference Protocol, whose errors are a sentence."""
    return path == "/v2" or path.startswith("/v2/")


def refused(param: str, message: str, code: str | None = None) -> RequestError:
    """A field of a request that is refused, by its name."""
    return RequestError(400, f"{param}: {message}", param=param, code=code)


def problem_of(error: BaseException) -> RequestError:
    """How an error of the library is answered.

    Messages about the request go to the client; those about the server, which name its files, go to
    the log. Of an error that was not expected the log has the kind and the lines of code, but no
    message, which may quote a prompt.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineFullError):
        return RequestError(
            429, str(error), code="too_many_requests", retry_after=error.retry_after
        )
    if isinstance(error, EngineClosedError):
        return RequestError(
            503, "the service is shutting down", code="shutting_down", retry_after=5
        )
    if isinstance(error, DeadlineError):
        return RequestError(504, "the request took longer than the service allows", code="timeout")
    if isinstance(error, UnknownAdapterError):
        return RequestError(404, "the adapter was unloaded", param="model", code="model_not_found")
    if isinstance(error, UsageError | DataError | BudgetError):
        return RequestError(400, str(error))
    if isinstance(error, AdapterError):
        logger.warning("an adapter could not be loaded: %s", error)
        return RequestError(
            503, "the adapter could not be loaded", param="model", code="adapter_load_failed"
        )
    if isinstance(error, LoraDeployError):
        logger.error("a request failed: %s", error)
        return RequestError(500, "the model could not be run; the server's log has the reason")
    logger.error("a defect of loradeploy: %s", described(error))
    return RequestError(500, "internal error")


def described(error: BaseException) -> str:
    """The kind of an error and the lines of code it came through, without its message."""
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames[-6:]))
    return f"{type(error).__name__} at {places}"
