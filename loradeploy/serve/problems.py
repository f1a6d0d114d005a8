"""Errors in the form of OpenAI's API: a status, and message, type, param and code."""

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

# Error types by status, as in OpenAI's API.
_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


class RequestError(Exception):
    """An error response to a request.

    `param`: the invalid field of the request. `retry_after`: seconds after which the same request
    may succeed.
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
        """The response's JSON for a request to `path`, in the format of its protocol."""
        return {"error": self.message} if speaks_v2(path) else self.body

    @property
    def body(self) -> dict[str, Any]:
        """The response's JSON in the format of OpenAI's API."""
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
    """Whether a path belongs to the Open Inference Protocol, whose errors are a text."""
    return path == "/v2" or path.startswith("/v2/")


def refused(param: str, message: str, code: str | None = None) -> RequestError:
    """The error for an invalid field of a request."""
    return RequestError(400, f"{param}: {message}", param=param, code=code)


def problem_of(error: BaseException) -> RequestError:
    """The response to an error of the library.

    Messages about the request are sent to the client. Messages about the server, which may contain
    file names, are only logged. For unexpected errors, the log has the class and the lines of code,
    but no message, which may quote a prompt.
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
            503,
            "the adapter could not be loaded; the server's log has the reason",
            param="model",
            code="adapter_load_failed",
        )
    if isinstance(error, LoraDeployError):
        logger.error("a request failed: %s", error)
        return RequestError(500, "the model could not be run; the server's log has the reason")
    logger.error("a defect of loradeploy: %s", described(error))
    return RequestError(500, "internal error")


def described(error: BaseException) -> str:
    """The class of an error and the lines of code that raised it, without its message."""
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames[-6:]))
    return f"{type(error).__name__} at {places}"
