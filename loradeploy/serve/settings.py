"""The default address of a service, and its limits with their defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from loradeploy.errors import UsageError, shown

# The address that a service listens on by default: requests of this machine only.
HOST: Final = "127.0.0.1"
# Seconds, about three years; waiting functions do not accept infinity.
_LONGEST: Final = 100_000_000
# Maximum tokens of a row, for models without a known number of positions.
MOST_TOKENS: Final = 8192


@dataclass(frozen=True)
class ServeLimits:
    """The limits of a service; requests beyond a limit are refused.

    Args:
        max_rows: texts that are generated or encoded together.
        max_waiting: waiting requests; further ones are refused with 429.
        max_tokens: tokens of one generated text.
        max_n: generated texts of one request, over all of its prompts.
        max_inputs: texts, documents or prompts of one request.
        max_images: images of one request.
        max_image_pixels: pixels of one image.
        max_request_bytes: bytes of one request's body.
        max_adapter_bytes: bytes of the files of one adapter in the adapter root.
        max_cache_bytes: bytes of cached adapters from an object store.
        request_timeout: seconds until a request must be answered.
        send_timeout: seconds in which a client must accept a part of a response.
        drain_timeout: seconds that running requests have when the service stops.
        batch_delay: seconds that an encoder waits for further requests to share a run.

    Raises:
        UsageError: a value is not a number above 0, or a time is too long.
    """

    max_rows: int = 8
    max_waiting: int = 64
    max_tokens: int = 2048
    max_n: int = 8
    max_inputs: int = 256
    max_images: int = 8
    max_image_pixels: int = 1 << 25
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
