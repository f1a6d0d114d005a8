"""API keys: the adapters and the request rate that each allows."""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
import time
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from loradeploy.errors import DataError, shown
from loradeploy.files import read_json
from loradeploy.serve.problems import RequestError

# Shorter keys can be guessed.
MIN_KEY_LENGTH: Final = 16
_CHALLENGE: Final = {"WWW-Authenticate": 'Basic realm="loradeploy", charset="UTF-8"'}


@dataclass(frozen=True)
class ApiKey:
    """A key of the service.

    Args:
        name: identifies the key in logs and in the prefix cache.
        key: the secret.
        adapters: the models that it may use, including the base by its name; None for all.
        requests_per_minute: its maximum request rate; None for no limit.
        admin: whether it may load and unload adapters.
    """

    name: str
    key: str
    adapters: frozenset[str] | None = None
    requests_per_minute: float | None = None
    admin: bool = False

    def may_use(self, model: str) -> bool:
        """Whether it may use the model `model`."""
        return self.adapters is None or model in self.adapters


# The key of all requests to a service without keys.
ANYONE: Final = ApiKey("", "", admin=True)


class KeyRing:
    """The keys of a service. Thread-safe.

    Raises:
        DataError: two keys have one name or one secret.
    """

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        for what in ("name", "key"):
            if len({getattr(key, what) for key in keys}) != len(keys):
                raise DataError(f"two API keys have the same {what}")
        self._digests = [(_digest(key.key), key) for key in keys]
        self._lock = threading.Lock()
        self._buckets: dict[
            str, tuple[float, float]
        ] = {}  # by name: remaining requests, and the time

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> KeyRing:
        """The keys in a JSON file: `{"keys": [{"name": …, "key": …, "adapters": […], …}]}`.

        Raises:
            DataError: the file is missing, or not JSON of this form.
        """
        values = read_json(file, error=DataError)
        listed = values.get("keys")
        if set(values) != {"keys"} or not isinstance(listed, list) or not listed:
            raise DataError(f'{file}: give {{"keys": [{{"name": "…", "key": "…"}}]}}')
        return cls([_key(value, f"{file}: key {n}") for n, value in enumerate(listed, start=1)])

    def without_rates(self) -> KeyRing:
        """The same keys without rates, for replicas whose router counts requests."""
        return KeyRing([replace(key, requests_per_minute=None) for _, key in self._digests])

    def check(self, authorization: str | None) -> ApiKey:
        """The key in a request's Authorization header.

        Raises:
            RequestError: 401, there is no key, or an unknown one.
        """
        given = _digest(_secret(authorization or ""))
        found = None
        for digest, key in self._digests:  # compare all, so that the time reveals nothing
            if hmac.compare_digest(given, digest):
                found = key
        if found is None:
            message = "give a valid API key: Authorization: Bearer KEY"
            raise RequestError(401, message, code="invalid_api_key", headers=_CHALLENGE)
        return found

    def count(self, key: ApiKey) -> None:
        """Count a request of `key`.

        Raises:
            RequestError: 429, it has exceeded its rate.
        """
        rate = key.requests_per_minute
        if rate is None:
            return
        now = time.monotonic()
        most = max(rate, 1.0)
        with self._lock:
            left, then = self._buckets.get(key.name, (most, now))
            left = min(most, left + (now - then) * rate / 60)
            enough = left >= 1
            self._buckets[key.name] = (left - enough, now)
        if not enough:
            raise RequestError(
                429,
                f"this API key may make {rate:g} requests a minute",
                code="rate_limit_exceeded",
                retry_after=(1 - left) * 60 / rate,
            )


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _secret(authorization: str) -> str:
    """The key in an Authorization header: Bearer, or the password of a browser's Basic."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return ""
    return ""


def _key(values: Any, where: str) -> ApiKey:
    """Parse a key of a file.

    Raises:
        DataError: a field is missing, unknown or of another type.
    """
    if not isinstance(values, Mapping):
        raise DataError(f'{where} is not an object, such as {{"name": "…", "key": "…"}}')
    known = [field.name for field in fields(ApiKey)]
    if unknown := [name for name in values if name not in known]:
        raise DataError(f"{where}: unknown field {shown(unknown[0])}; there are {', '.join(known)}")
    name, secret = values.get("name"), values.get("key")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: name is not a text of 1 character or more")
    # The secret itself is not shown.
    if not isinstance(secret, str) or len(secret) < MIN_KEY_LENGTH or not _sendable(secret):
        raise DataError(
            f"{where}: key is not a text of {MIN_KEY_LENGTH} or more ASCII characters, no spaces"
        )
    adapters = values.get("adapters")
    listed = isinstance(adapters, list) and all(isinstance(one, str) for one in adapters)
    if not (adapters is None or listed):
        raise DataError(f"{where}: adapters is not a list of names, or null for all")
    rate = values.get("requests_per_minute")
    number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if not (rate is None or (number and 0 < rate < float("inf"))):
        raise DataError(f"{where}: requests_per_minute is not a number above 0")
    admin = values.get("admin", False)
    if not isinstance(admin, bool):
        raise DataError(f"{where}: admin is not true or false")
    return ApiKey(name, secret, None if adapters is None else frozenset(adapters), rate, admin)


def _sendable(secret: str) -> bool:
    return secret.isascii() and secret.isprintable() and " " not in secret
