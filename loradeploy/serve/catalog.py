"""The models of a service: the base by the bundle's name, and adapters by theirs.

Adapters come with the bundle, or from the adapter root, a directory that has one adapter in each
subdirectory (or .onnx_adapter file). One of the root is read when a request first names it, and
read again when its files have changed; nothing has to be restarted. A client gives names alone.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loradeploy.bundle.names import NATIVE_SUFFIX
from loradeploy.errors import (
    AdapterError,
    LoraDeployError,
    UnknownAdapterError,
    UsageError,
    shown,
)
from loradeploy.printable import logger_of
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.session import AdapterSession
from loradeploy.serve.keys import ApiKey
from loradeploy.serve.problems import RequestError, refused
from loradeploy.snapshot import ATTEMPTS, Snapshot

logger = logger_of(__name__)

# One component of a path that leads nowhere else.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Files of one adapter; more are not read.
_MOST_FILES: Final = 256


@dataclass(frozen=True)
class _Found:
    """An adapter below the root, as its files are now."""

    path: Path
    files: Snapshot

    def same(self, other: _Found | None) -> bool:
        return other is not None and self == other


@dataclass(frozen=True)
class Model:
    """A model as /v1/models has it. `digest`: None of an adapter that was not read yet."""

    name: str
    digest: str | None
    parent: str | None


class Catalog:
    """The models of one service.

    `root`: the adapter root, None without one. `max_bytes`: of one adapter's files there.
    `on_load`: called with the seconds that it took to read an adapter.

    Raises:
        UsageError: an adapter of the bundle has the bundle's name, or the root is no directory.
    """

    def __init__(
        self,
        session: AdapterSession,
        *,
        root: Path | None,
        max_bytes: int,
        on_load: Callable[[float], None],
    ) -> None:
        self.session = session
        self.base = session.path.resolve().name
        self._bundled = set(session.adapters)
        if self.base in self._bundled:
            raise UsageError(
                f"{session.path} and an adapter have the same name, {self.base!r}, which would"
                " name two models: rename the bundle's directory"
            )
        if root is not None and not root.is_dir():
            raise UsageError(f"{root} is not a directory: give `adapter_root` one of adapters")
        self.root = None if root is None else root.resolve()
        self._max_bytes = max_bytes
        self._on_load = on_load
        self._entries: dict[str, str] = {}  # names of the load route, to entries of the root
        self._unloaded: set[str] = set()
        self._loaded: dict[str, _Found] = {}
        self._failed: dict[str, tuple[_Found, LoraDeployError]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    # -- requests ------------------------------------------------------------------------------

    async def resolve(
        self, model: str, blend: Mapping[str, float] | None, key: ApiKey
    ) -> AdapterSpec | None:
        """The adapter that a request names: None is the base. It is loaded when this returns.

        Raises:
            RequestError: 404, there is no such model for this key; 400, a blend beside an adapter.
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
        """The base and the adapters that `key` may use, those of the root by their files now."""
        digests = self.session.adapters
        names = self._bundled | self._entries.keys() | set(await asyncio.to_thread(self._listed))
        base = Model(self.base, self.session.manifest.base.digest, None)
        adapters = [
            Model(name, digests.get(name), self.base) for name in sorted(names - self._unloaded)
        ]
        return [model for model in (base, *adapters) if key.may_use(model.name)]

    # -- the load and unload routes ------------------------------------------------------------

    async def load(self, name: str, entry: str, key: ApiKey, *, replace: bool) -> None:
        """Let `name` stand for the adapter `entry` below the root, which is read now.

        Raises:
            RequestError: 400, a name that is taken, or that is no name; 404, there is no such entry
                for this key.
            AdapterError: the adapter's files are refused.
        """
        for param, value in (("lora_name", name), ("lora_path", entry)):
            if not _NAME.fullmatch(value):
                raise refused(param, "give a name below the adapter root, not a path")
        if name == self.base or name in self._bundled:
            raise refused("lora_name", f"{name!r} is a model of the bundle")
        missing = RequestError(
            404,
            f"there is no adapter {entry!r} below the adapter root that this API key may use",
            param="lora_path",
            code="adapter_not_found",
        )
        # Under a name of its own a key would use whatever there is.
        if not (key.may_use(entry) and key.may_use(name)):
            raise missing
        if await asyncio.to_thread(self._find, entry) is None:
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
                    raise missing  # its files went meanwhile
            except BaseException:
                if before is None:
                    del self._entries[name]
                else:
                    self._entries[name] = before
                if hidden:
                    self._unloaded.add(name)
                raise

    async def unload(self, name: str, key: ApiKey) -> None:
        """Forget the adapter `name` until it is loaded again; waits for requests that use it.

        Raises:
            RequestError: 404, no adapter has this name, or none that the key may use.
        """
        # One that is being read has a lock.
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
        known = name in self._bundled or name in self._loaded or name in self._entries
        return known and name not in self._unloaded

    # -- the adapter root ----------------------------------------------------------------------

    async def _from_root(self, name: str) -> bool:
        """Whether the adapter `name` of the root is there, loaded as its files are now.

        Raises:
            AdapterError: it is refused; the same files are not read a second time.
            LoraDeployError: another failure, which another time may not have.
        """
        if self.root is None or name in self._unloaded or not _NAME.fullmatch(name):
            return False
        entry = self._entries.get(name, name)
        found = await asyncio.to_thread(self._find, entry)
        if found is None and name not in self._loaded:
            return False
        if found is not None and found.same(self._loaded.get(name)):
            return True
        async with self._lock(name):
            return await self._refreshed(name)

    def _lock(self, name: str) -> asyncio.Lock:
        """What is held while the adapter `name` is read, loaded or unloaded."""
        return self._locks.setdefault(name, asyncio.Lock())

    async def _refreshed(self, name: str) -> bool:
        """As `_from_root`, with the lock of `name`: nothing is decided by what was before it."""
        entry = self._entries.get(name, name)
        for _ in range(ATTEMPTS):
            if name in self._unloaded:
                return False
            found = await asyncio.to_thread(self._find, entry)
            if found is None:
                if name in self._loaded:
                    await self._forget(name)
                return False
            if found.same(self._loaded.get(name)):
                return True
            files, known = self._failed.get(name, (None, None))
            if known is not None and found.same(files):
                raise known
            begin = time.perf_counter()
            problem: LoraDeployError | None = None
            try:
                await asyncio.to_thread(self._read, name, found)
            except LoraDeployError as error:
                problem = error
            if not found.same(await asyncio.to_thread(self._find, entry)):
                continue  # what was read may be of two versions
            if problem is not None:
                if _lasting(problem):
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

    def _read(self, name: str, found: _Found) -> None:
        size = sum(state.size for state in found.files.files.values() if state is not None)
        if size > self._max_bytes or len(found.files.files) > _MOST_FILES:
            raise AdapterError(
                f"{found.path} has {size:,} bytes in {len(found.files.files)} files; the service"
                f" takes {self._max_bytes:,} in {_MOST_FILES} (`max_adapter_bytes`)"
            )
        self.session.load(name, found.path, replace=True)

    def _find(self, entry: str) -> _Found | None:
        """The adapter `entry` below the root, with the states of its files."""
        assert self.root is not None
        for path in (self.root / entry, self.root / f"{entry}{NATIVE_SUFFIX}"):
            place = path.resolve()
            if not place.is_relative_to(self.root):
                continue  # a link that leads elsewhere
            if place.is_dir():
                return _Found(place, Snapshot.take(place))
            if place.is_file() and place.suffix == NATIVE_SUFFIX:
                return _Found(place, Snapshot.of(place.parent, [place.name]))
        return None

    def _listed(self) -> list[str]:
        """The names of the adapters below the root."""
        if self.root is None:
            return []
        names = []
        for path in self.root.iterdir():
            name = path.stem if path.suffix == NATIVE_SUFFIX and path.is_file() else path.name
            if _NAME.fullmatch(name) and name != self.base and self._find(name) is not None:
                names.append(name)
        return names


def _lasting(problem: BaseException) -> bool:
    """Whether the same files fail again: they are refused, and not for an error of the system."""
    if not isinstance(problem, AdapterError):
        return False
    cause: BaseException | None = problem
    while cause is not None:
        if isinstance(cause, OSError):
            return False
        cause = cause.__cause__ or cause.__context__
    return True
