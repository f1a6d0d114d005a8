"""The limits of a service, each with its default."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from loradeploy.errors import UsageError, shown

# Seconds, about three years; what waits takes no number without end.
_LONGEST: Final = 100_000_000
# Tokens of a row, for models that do not tell how many positions they have.
MOST_TOKENS: Final = 8192


@dataclass(frozen=True)
class ServeLimits:
    """What the service takes at most; a request beyond a limit is refused.

    Args:
        max_rows: texts that are generated, or encoded, together.
        max_waiting: requests that may wait; one more is answered with 429.
        max_tokens: tokens of one generated text.
        max_n: generated texts of one request, over all of its prompts.
        max_inputs: texts, documents or prompts of one request.
        max_request_bytes: bytes of one request's body.
        max_adapter_bytes: bytes of the files of one adapter below the adapter root.
        max_cache_bytes: bytes of adapters that are fetched from an object store and kept.
        request_timeout: seconds until a request has to be answered.
        send_timeout: seconds that a client may take to accept a part of an answer.
        drain_timeout: seconds in which requests may end once the service is to stop.
        batch_delay: seconds that an encoder waits for further requests to share a run.

    Raises:
        UsageError: one of them is no number above 0, or a time without end.
    """

    max_rows: int = 8
    max_waiting: int = 64
    max_tokens: int = 2048
    max_n: int = 8
    max_inputs: int = 256
    max_request_bytes: int = 4 << 20
    max_adapter_bytes: int = 4 << 30
    max_cache_bytes: int = 16 << 30
    request_timeout: float = 600.0
    send_timeout: float = 30.0
    drain_timeout: float = 30.0
    batch_delay: float = 0.002

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise UsageError(f"`{field.name}` is {shown(value)}: give a number above 0")
            if isinstance(field.default, float) and value > _LONGEST:
                raise UsageError(
                    f"`{field.name}` is {shown(value)}: give at most {_LONGEST:,} seconds"
                )
