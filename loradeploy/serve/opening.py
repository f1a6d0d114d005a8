"""A service by what says how it is opened, which can be sent to another process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import onnxruntime

from loradeploy.errors import UsageError
from loradeploy.runtime.devices.cgroups import cores
from loradeploy.runtime.session import AdapterSession
from loradeploy.serve.adapters.roots import AdapterRoot, DirectoryRoot, StoreRoot
from loradeploy.serve.keys import KeyRing
from loradeploy.serve.service import Service
from loradeploy.serve.settings import ServeLimits

_URL: Final = "://"


@dataclass(frozen=True)
class ServiceSpec:
    """What a service is opened by.

    `adapters`: directories of adapters by name, beside those of the bundle. `adapter_root`: a
    directory or URL, `adapter_cache` where what is fetched from a URL is kept. `adapter_memory`:
    bytes of adapters in memory, None for all. `api_keys`: a file of them. `host`: the address that
    the service is reached by. `threads`: that compute a run; None for as many as the container
    allows, where it allows fewer processors than there are, else for onnxruntime's default.

    Raises:
        UsageError: fields that do not go together.
    """

    bundle: str
    limits: ServeLimits = field(default_factory=ServeLimits)
    adapters: Mapping[str, str] = field(default_factory=dict)
    adapter_root: str | None = None
    adapter_cache: str | None = None
    adapter_memory: int | None = None
    api_keys: str | None = None
    updates: bool = False
    provider: str = "CPUExecutionProvider"
    capture_graphs: bool = False
    require_certificate: bool = False
    host: str = "127.0.0.1"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"`threads` is {self.threads}: give 1 or more")
        if self.updates and self.adapter_root is None:
            raise UsageError(
                "`allow_adapter_updates`: give `adapter_root`, where adapters are found"
            )
        if self.adapter_cache is not None and not self.stored:
            raise UsageError("`adapter_cache`: give `adapter_root` the URL of an object store")

    @property
    def stored(self) -> bool:
        """Whether the adapter root is an object store."""
        return self.adapter_root is not None and _URL in self.adapter_root


def open_root(spec: ServiceSpec) -> AdapterRoot | None:
    """The adapter root of a service.

    Raises:
        UsageError: it is no directory, and no URL that can be opened.
    """
    if spec.adapter_root is None:
        return None
    if not spec.stored:
        return DirectoryRoot(Path(spec.adapter_root))
    cache = None if spec.adapter_cache is None else Path(spec.adapter_cache)
    return StoreRoot(spec.adapter_root, cache=cache, max_bytes=spec.limits.max_cache_bytes)


def open_service(spec: ServiceSpec, keys: KeyRing | None) -> Service:
    """The service, with its bundle open and `adapters` loaded. `keys`: None where anybody may ask.

    Raises:
        LoraDeployError: something of it is refused.
    """
    root = open_root(spec)
    session = AdapterSession(
        spec.bundle,
        [spec.provider],
        session_options=_session_options(spec.threads),
        host_budget=spec.adapter_memory,
        require_certificate=spec.require_certificate,
        capture_graphs=spec.capture_graphs,
    )
    for name, path in spec.adapters.items():
        session.load(name, path)
    return Service(
        session, limits=spec.limits, keys=keys, root=root, updates=spec.updates, host=spec.host
    )


def _session_options(threads: int | None) -> onnxruntime.SessionOptions | None:
    """Options for so many threads; None where onnxruntime may choose."""
    if threads is None:
        allowed = cores(Path("/"))  # which onnxruntime does not know of
        if allowed is None or allowed >= (os.cpu_count() or 1):
            return None
        threads = max(1, int(allowed))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return options
