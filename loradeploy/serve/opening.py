"""Open a service from a specification that can be sent to another process."""

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
from loradeploy.serve.settings import HOST, ServeLimits
from loradeploy.serve.vision import Vision

_URL: Final = "://"


@dataclass(frozen=True)
class ServiceSpec:
    """The arguments of a service.

    `vision`: the bundle of the decoder's vision tower, or None. `adapters`: directories of adapters
    by name, in addition to those of the bundle. `adapter_root`: a directory or URL;
    `adapter_cache`: where adapters from a URL are cached. `adapter_memory`: bytes of adapters in
    memory, of each of the two bundles if there is `vision`; None for no limit. `api_keys`: a file
    with keys. `host`: the address that clients use. `operator`: the operators' library
    (`AdapterSession`). `threads`: number of threads of a run; by default as many as the container
    allows if it limits them, otherwise onnxruntime's default.

    Raises:
        UsageError: fields that cannot be combined.
    """

    bundle: str
    vision: str | None = None
    limits: ServeLimits = field(default_factory=ServeLimits)
    adapters: Mapping[str, str] = field(default_factory=dict)
    adapter_root: str | None = None
    adapter_cache: str | None = None
    adapter_memory: int | None = None
    api_keys: str | None = None
    updates: bool = False
    provider: str = "CPUExecutionProvider"
    capture_graphs: bool = False
    operator: str | None = None
    require_certificate: bool = False
    host: str = HOST
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"`threads` is {self.threads}: give 1 or more")
        if self.updates and self.adapter_root is None:
            raise UsageError(
                "`allow_adapter_updates`: give `adapter_root`, where adapters are found"
            )
        if self.vision is not None and self.adapter_root is not None:
            raise UsageError(
                "`adapter_root`: not supported with `vision`, whose adapters have two parts: give"
                " them as `adapter`, or export both bundles with them"
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
        UsageError: it is neither a directory nor a URL that can be opened.
    """
    if spec.adapter_root is None:
        return None
    if not spec.stored:
        return DirectoryRoot(Path(spec.adapter_root))
    cache = None if spec.adapter_cache is None else Path(spec.adapter_cache)
    return StoreRoot(spec.adapter_root, cache=cache, max_bytes=spec.limits.max_cache_bytes)


def open_service(spec: ServiceSpec, keys: KeyRing | None) -> Service:
    """Open the service: its bundle, and `adapters`. `keys`: None if no key is required.

    Raises:
        LoraDeployError: the bundle, an adapter or another argument is refused.
    """
    root = open_root(spec)
    session = _session(
        spec, spec.bundle, capture_graphs=spec.capture_graphs, operator=spec.operator
    )
    vision = None
    if spec.vision is not None:
        vision = Vision(session, _session(spec, spec.vision), spec.limits)
    load = session.load if vision is None else vision.generator.load
    for name, path in spec.adapters.items():
        load(name, path)
    return Service(
        session,
        limits=spec.limits,
        keys=keys,
        root=root,
        updates=spec.updates,
        host=spec.host,
        vision=vision,
    )


def _session(
    spec: ServiceSpec, bundle: str, *, capture_graphs: bool = False, operator: str | None = None
) -> AdapterSession:
    """Open one of the bundles of `spec`, with the settings that both have."""
    return AdapterSession(
        bundle,
        [spec.provider],
        session_options=_session_options(spec.threads),
        host_budget=spec.adapter_memory,
        require_certificate=spec.require_certificate,
        capture_graphs=capture_graphs,
        operator=operator,
    )


def _session_options(threads: int | None) -> onnxruntime.SessionOptions | None:
    """Session options with `threads` threads; None to use onnxruntime's default."""
    if threads is None:
        allowed = cores(Path("/"))  # a limit that onnxruntime ignores
        if allowed is None or allowed >= (os.cpu_count() or 1):
            return None
        threads = max(1, int(allowed))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return options
