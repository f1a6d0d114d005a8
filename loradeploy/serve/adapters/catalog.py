"""The models of a service: the base, named like the bundle or the link to it, and the adapters.

Adapters come with the bundle, or from the adapter root (serve/adapters/roots.py). An adapter of the
root is read when a request first names it, and again when its files have changed, without a
restart. Clients can only give names.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from loradeploy.adapter.files.peft import load_adapter
from loradeploy.bundle.names import NATIVE_SUFFIX
from loradeploy.errors import (
    AdapterError,
    AdapterStoreError,
    LoraDeployError,
    UnknownAdapterError,
    UsageError,
    shown,
)
from loradeploy.printable import logger_of
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.session import AdapterSession
from loradeploy.serve.adapters.roots import ENTRY_NAME, MOST_FILES, AdapterRoot, Found
from loradeploy.serve.keys import ApiKey
from loradeploy.serve.problems import RequestError, refused
from loradeploy.snapshot import ATTEMPTS

logger = logger_of(__name__)

# A digest as a name must be the adapter's: that of its PEFT files, or of its side inputs.
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Model:
    """A model in the response of /v1/models. `digest`: None if the adapter was not read yet."""

    name: str
    digest: str | None
    parent: str | None


class Catalog:
    """The models of one service.

    `root`: the adapter root, or None. `others`: names of adapters without a part in the session, of
    a vision-language model. `max_bytes`: of one adapter's files. `on_load`: called with
    the seconds that it took to read an adapter.

    Raises:
        UsageError: an adapter of the bundle has the bundle's name.
    """

    def __init__(
        self,
        session: AdapterSession,
        *,
        root: AdapterRoot | None,
        max_bytes: int,
        on_load: Callable[[float], None],
        others: Collection[str],
    ) -> None:
        self.session = session
        # A link keeps its name when it is switched to a new version of the bundle.
        self.base = os.path.basename(os.path.abspath(session.path))
        self._bundled = {*session.adapters, *others}
        if self.base in self._bundled:
            raise UsageError(
                f"{session.path} and an adapter have the same name, {self.base!r}, which would"
                " name two models: rename the bundle's directory"
            )
        self.root = root
        self._max_bytes = max_bytes
        self._on_load = on_load
        # From names given to the load route to entries of the root.
        self._entries: dict[str, str] = {}
        self._unloaded: set[str] = set()
        self._loaded: dict[str, Found] = {}
        self._failed: dict[str, tuple[Found, LoraDeployError]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    # -- requests ------------------------------------------------------------------------------

    async def resolve(
        self, model: str, blend: Mapping[str, float] | None, key: ApiKey
    ) -> AdapterSpec | None:
        """Load the adapter that a request names, and return its name or blend; None is the base.

        Raises:
            RequestError: 404, there is no such model for this key; 400, a blend together with an
                adapter.
            AdapterError: the adapter's files are refused.
        """
        if blend is None:
            return await self._named(model, "model", key)
        if model != self.base:
            raise refused("adapters", f"give the base, {self.base!r}, as model of a blend")
        await self._named(model, "model", key)
        if not blend:
            raise refused("adapters", "a blend needs one adapter or more")
        for name in blend:
            if name == self.base:
                raise refused("adapters", f"{shown(name)} is the base, not an adapter")
            await self._named(name, "adapters", key)
        return dict(blend)

    async def _named(self, name: str, param: str, key: ApiKey) -> str | None:
        if key.may_use(name):
            if name == self.base:
                return None
            if name in self._bundled or await self._from_root(name):
                return name
        raise RequestError(
            404,
            f"the model {shown(name)} does not exist, or this API key may not use it",
            param=param,
            code="model_not_found",
        )

    async def models(self, key: ApiKey) -> list[Model]:
        """The base and the adapters that `key` may use, including the current ones of the root."""
        digests = self.session.adapters
        names = self._bundled | self._entries.keys() | set(await asyncio.to_thread(self._listed))
        base = Model(self.base, self.session.manifest.base.digest, None)
        adapters = [
            Model(name, digests.get(name), self.base) for name in sorted(names - self._unloaded)
        ]
        return [model for model in (base, *adapters) if key.may_use(model.name)]

    # -- the load and unload routes ------------------------------------------------------------

    async def load(self, name: str, entry: str, key: ApiKey, *, replace: bool) -> None:
        """Load the adapter `entry` of the root as `name`.

        Raises:
            RequestError: 400, a name that is taken or invalid; 404, there is no such entry for this
                key.
            AdapterError: the adapter's files are refused.
        """
        for param, value in (("lora_name", name), ("lora_path", entry)):
            if not ENTRY_NAME.fullmatch(value):
                raise refused(param, "give a name below the adapter root, not a path")
        if name == self.base or name in self._bundled:
            raise refused("lora_name", f"{name!r} is a model of the bundle")
        missing = RequestError(
            404,
            f"there is no adapter {entry!r} below the adapter root that this API key may use",
            param="lora_path",
            code="adapter_not_found",
        )
        # Otherwise a key could use any adapter under a name that it may use.
        if not (key.may_use(entry) and key.may_use(name)):
            raise missing
        if await asyncio.to_thread(self._find, entry, fresh=True) is None:
            raise missing
        async with self._lock(name):
            if name in self._loaded and not replace:
                raise refused("lora_name", f"{name!r} is loaded: give load_inplace to replace it")
            before, hidden = self._entries.get(name), name in self._unloaded
            self._entries[name] = entry
            self._unloaded.discard(name)
            try:
                self._failed.pop(name, None)
                if not await self._refreshed(name):
                    raise missing  # its files were removed meanwhile
            except BaseException:
                if before is None:
                    del self._entries[name]
                else:
                    self._entries[name] = before
                if hidden:
                    self._unloaded.add(name)
                raise

    async def unload(self, name: str, key: ApiKey) -> None:
        """Unload the adapter `name` until it is loaded again; wait for requests that use it.

        Raises:
            RequestError: 404, no adapter that the key may use has this name.
        """
        # An adapter that is being read has a lock.
        if key.may_use(name) and (self._knows(name) or name in self._locks):
            async with self._lock(name):
                if self._knows(name):
                    self._unloaded.add(name)
                    self._bundled.discard(name)
                    self._entries.pop(name, None)
                    await self._forget(name)
                    return
        raise RequestError(
            404,
            f"there is no adapter {shown(name)} that is loaded",
            param="lora_name",
            code="adapter_not_found",
        )

    def _knows(self, name: str) -> bool:
        known = name in self.session.adapters or name in self._entries
        return known and name not in self._unloaded

    # -- the adapter root ----------------------------------------------------------------------

    async def _from_root(self, name: str) -> bool:
        """Whether the root has the adapter `name`; load it, if its current files are not loaded.

        Raises:
            AdapterError: it is refused; the same files are not read again.
            LoraDeployError: another failure, which may be temporary.
        """
        if self.root is None or name in self._unloaded or not ENTRY_NAME.fullmatch(name):
            return False
        entry = self._entries.get(name, name)
        found = await asyncio.to_thread(self._find, entry)
        if found is None and name not in self.session.adapters:
            return False
        if found is not None and await self._is_loaded(name, found):
            return True
        async with self._lock(name):
            return await self._refreshed(name)

    def _lock(self, name: str) -> asyncio.Lock:
        """The lock for reading, loading and unloading the adapter `name`."""
        return self._locks.setdefault(name, asyncio.Lock())

    async def _refreshed(self, name: str) -> bool:
        """Like `_from_root`; the caller holds the lock of `name`, and all state is read again."""
        entry = self._entries.get(name, name)
        for _ in range(ATTEMPTS):
            if name in self._unloaded:
                return False
            found = await asyncio.to_thread(self._find, entry)
            if found is None:
                await self._forget(name)
                return False
            if await self._is_loaded(name, found):
                return True
            files, known = self._failed.get(name, (None, None))
            if known is not None and found == files:
                raise known
            self._loaded.pop(name, None)  # unknown until these files are read
            begin = time.perf_counter()
            problem: LoraDeployError | None = None
            try:
                await self._read_uninterrupted(name, found)
            except LoraDeployError as error:
                problem = error
            if found != await asyncio.to_thread(self._find, entry, fresh=True):
                continue  # the files may be of two versions
            if problem is not None:
                if _is_permanent(problem):
                    self._failed[name] = found, problem
                raise problem
            self._failed.pop(name, None)
            self._loaded[name] = found
            self._on_load(time.perf_counter() - begin)
            logger.info("loaded the adapter %s", name)
            return True
        raise RequestError(
            503,
            "the adapter's files are being written: try again when they are complete",
            param="model",
            code="adapter_load_failed",
            retry_after=1,
        )

    async def _forget(self, name: str) -> None:
        self._loaded.pop(name, None)
        self._failed.pop(name, None)
        try:
            await asyncio.to_thread(self.session.unload, name)
        except UnknownAdapterError:
            pass  # it was never read
        else:
            logger.info("unloaded the adapter %s", name)

    async def _is_loaded(self, name: str, found: Found) -> bool:
        """Whether the adapter was loaded from these files, and can be read again."""
        assert self.root is not None
        return found == self._loaded.get(name) and await asyncio.to_thread(self.root.has, found)

    async def _read_uninterrupted(self, name: str, found: Found) -> None:
        """Like `_read`, but completes even if the request is cancelled: reads must not overlap."""
        reading = asyncio.ensure_future(asyncio.to_thread(self._read, name, found))
        try:
            await asyncio.shield(reading)
        except asyncio.CancelledError:
            await asyncio.wait([reading])
            raise

    def _read(self, name: str, found: Found) -> None:
        assert self.root is not None
        if found.size > self._max_bytes or found.files > MOST_FILES:
            raise AdapterError(
                f"{found.entry} has {found.size:,} bytes in {found.files} files; the service"
                f" takes {self._max_bytes:,} in {MOST_FILES} (`max_adapter_bytes`)"
            )
        with self.root.local(found) as place:
            digests = {self.session.load(name, place, replace=True)}
            named = _DIGEST.fullmatch(found.entry) is not None
            if named and place.suffix != NATIVE_SUFFIX:
                try:
                    digests.add(load_adapter(place).digest)
                except AdapterError:
                    self.session.unload(name)
                    raise
        if named and f"sha256:{found.entry}" not in digests:
            self.session.unload(name)
            raise AdapterError(
                f"the name {found.entry} is a digest, but the digest of its adapter is"
                f" {' or '.join(sorted(digests))}"
            )

    def _find(self, entry: str, *, fresh: bool = False) -> Found | None:
        """The current state of an entry of the root."""
        assert self.root is not None
        return self.root.find(entry, fresh=fresh)

    def _listed(self) -> list[str]:
        """The names of the root's adapters."""
        names = [] if self.root is None else self.root.listed()
        return [name for name in names if name != self.base]


def _is_permanent(problem: BaseException) -> bool:
    """Whether the same files would be refused again: not after an error of the system or store."""
    if not isinstance(problem, AdapterError) or isinstance(problem, AdapterStoreError):
        return False
    cause: BaseException | None = problem
    while cause is not None:
        if isinstance(cause, OSError):
            return False
        cause = cause.__cause__ or cause.__context__
    return True
