"""Open a bundle's graph on the execution providers that are asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import onnxruntime

from loradeploy.bundle.manifest import read_manifest
from loradeploy.bundle.names import (
    GRAPH_DATA_NAME,
    GRAPH_NAME,
    MAT_MUL_N_BITS_OPERATOR,
)
from loradeploy.bundle.proof.provider import EXACT_INTEGERS
from loradeploy.errors import BundleError, UsageError, first_line
from loradeploy.files import MAX_GRAPH_BYTES, check_directory, check_file, read_bytes
from loradeploy.printable import logger_of
from loradeploy.runtime.devices.plugins import add_started, chosen_before, providers_in
from loradeploy.runtime.devices.providers import (
    Provider,
    Resolved,
    needs_cuda,
    preload_cuda,
    recording,
    resolve,
)
from loradeploy.runtime.devices.quiet import UNSET, severity, unlogged
from loradeploy.runtime.devices.table import CPU, known
from loradeploy.runtime.memory import keep_freed_memory, return_freed_memory
from loradeploy.runtime.operator.library import check_runs, register
from loradeploy.runtime.reading.huge_pages import use_huge_pages
from loradeploy.runtime.reading.mapped import MappedSession
from loradeploy.runtime.reading.matching import optional_inputs
from loradeploy.runtime.reading.placement import operators_in
from loradeploy.runtime.reading.weights import (
    SessionInPlace,
    Source,
    entry,
    graph_source,
)
from loradeploy.runtime.reading.wire import node_names

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest

logger = logger_of(__name__)

# ONNX Runtime's option to record which provider runs which node, for `placement_of`.
_RECORD: Final = "session.record_ep_graph_assignment_info"
_LARGE_WEIGHTS: Final = 32 << 20  # bytes
# Part of ONNX Runtime's message when a graph cannot be captured.
_NOT_CAPTURED: Final = "graph capture feature"


@dataclass(frozen=True, eq=False)
class Opening:
    """How the graphs of a bundle are opened: arguments of `AdapterSession`.

    `providers`: None is the CPU's, or those that `session_options` choose
    (`add_provider_for_devices`). `session_options`: may name another directory of the graph's
    weights (`WEIGHTS_AT`), or have the data file mapped (`MAPPED`). `capture_graphs`: whether the
    first provider records runs. `operator`: the operators' library. `map_weights`: map the data
    file if no process can write to it.
    """

    providers: Sequence[Provider] | None = None
    session_options: onnxruntime.SessionOptions | None = None
    capture_graphs: bool = False
    operator: Path | None = None
    map_weights: bool = False


def open_graph(
    bundle: Path, opening: Opening, manifest: Manifest | None = None, name: str = GRAPH_NAME
) -> onnxruntime.InferenceSession:
    """Open an inference session on the bundle's graph.

    A provider that is installed but does not start (no device, no driver) is skipped with a logged
    warning if the CPU's is listed too, and is an error otherwise. For a provider that does not
    support inputs with defaults, the graph is opened without the defaults, and every side input
    must be fed. Unless the data file is mapped, later changes of the files have no effect
    (weights.py); a session on a mapped file raises BundleError instead of returning results after a
    change (mapped.py).
    `manifest`: what the graph and its weights are checked against. `name`: the graph's file.

    Raises:
        UsageError: a provider that is not installed or does not start, providers in both arguments,
            or a provider or graph whose runs cannot be captured, or that the operator is not for;
            or `options` with the operators' library, and no `operator`.
        OperatorError: the operators' library cannot be used.
        BundleError: there is no graph, onnxruntime cannot read it, or it does not match the
            manifest.
    """
    graph = bundle / name
    if not graph.is_file():
        raise BundleError(f"{bundle} has no {name}: export again")
    check_directory(bundle, error=BundleError, deep=True)  # the graph may name files in any folder
    options, operator = opening.session_options, opening.operator
    asked = _asked(opening.providers, options)
    if opening.capture_graphs:
        asked = _recording(bundle, asked, manifest)
    names = _names(asked, options)
    called: tuple[str, ...] = ()
    if operator is not None:
        called = _called(bundle, manifest or read_manifest(bundle), names)
    kernels: frozenset[str] = frozenset()
    without = _all_fed(bundle, manifest, names)
    keep_freed_memory()
    unpacked = MAT_MUL_N_BITS_OPERATOR in called
    with graph_source(
        bundle, options, manifest, without, name, opening.map_weights, unpacked
    ) as source:
        if operator is not None:
            kernels = register(operator, source.options)
            if options is None and sys.platform == "linux":
                # onnxruntime's arena grows by doubling and keeps the memory of the longest prompt.
                # The C library takes less, and as much time (docs/performance.md).
                source.options.enable_cpu_mem_arena = False
        try:
            session = _open(graph, source, asked)
        except BundleError as problem:
            if opening.capture_graphs and _NOT_CAPTURED in str(problem):
                raise UsageError(
                    f"`capture_graphs`: {names[0]} leaves nodes of {graph} on the CPU, and then"
                    " captures no runs. The `placement` of a session without it shows them;"
                    " docs/devices.md lists the forms that can be captured"
                ) from None
            raise
    return_freed_memory()
    if session.get_providers()[0] == CPU and source.mapped is None and _is_large(bundle):
        use_huge_pages()
    if operator is not None:
        check_runs(called, kernels, operators_in(session))
    elif manifest is not None and manifest.operators:
        _check_has_no_library(session)
    if opening.capture_graphs and session.get_providers()[0] != names[0]:
        raise UsageError(
            f"`capture_graphs`: {names[0]} does not start here, and the CPU captures no runs"
        )
    return session


def _asked(
    providers: Sequence[Provider] | None, options: onnxruntime.SessionOptions | None
) -> list[Resolved] | None:
    """The providers to add to the options; None if these choose them.

    Raises:
        UsageError: a provider is not installed, or both arguments choose providers.
    """
    chosen = options is not None and _has_providers(options)
    if chosen and providers is not None and options is not None and chosen_before(options) is None:
        raise UsageError(
            "providers and session_options both choose execution providers: leave providers out,"
            " or add none to the options"
        )
    return None if chosen and providers is None else resolve(providers)


def _names(
    asked: Sequence[Resolved] | None, options: onnxruntime.SessionOptions | None
) -> list[str]:
    """The providers in order of preference; None `asked` means those in the options."""
    if asked is not None:
        return [name for name, _ in asked]
    assert options is not None
    names = providers_in(options)
    for row in filter(lambda row: row.cpu_operators, map(known, names)):
        logger.warning(
            "%s is chosen in session_options, where %s are not kept on the CPU: name it in"
            " providers",
            row.full,
            ", ".join(row.cpu_operators),
        )
    return names


def _check_has_no_library(session: onnxruntime.InferenceSession) -> None:
    """Raise UsageError if kernels of the operators' library run: certificates tell them apart."""
    if operators_in(session):
        raise UsageError(
            "`session_options` have the operators' library, as those of an earlier session with"
            " `operator` do: give `operator` too, or other options"
        )


def _is_large(bundle: Path) -> bool:
    """Whether the weights do not fit into the processor's caches, nor into a few huge pages."""
    file = bundle / GRAPH_DATA_NAME
    return file.is_file() and file.stat().st_size >= _LARGE_WEIGHTS


def _recording(
    bundle: Path, asked: Sequence[Resolved] | None, manifest: Manifest | None
) -> list[Resolved]:
    """The providers `asked`, with the first one set to record runs of the bundle's graph."""
    if asked is None:
        raise UsageError(
            "`capture_graphs` sets options of a provider: name it in providers, not in"
            " session_options"
        )
    manifest = manifest or read_manifest(bundle)
    if manifest.branches:
        raise UsageError(
            f"`capture_graphs`: {bundle} has branches, and onnxruntime captures no `If`: export it"
            " again with --no-branches"
        )
    if manifest.encoder is not None:
        raise UsageError(
            f"`capture_graphs`: {bundle} is an encoder-decoder, whose runs cannot be captured"
        )
    return recording(asked)


def _called(bundle: Path, manifest: Manifest, names: Sequence[str]) -> tuple[str, ...]:
    """The operators that the bundle calls.

    Raises:
        UsageError: the operators' library is not for this bundle or these providers.
    """
    if not manifest.operators:
        raise UsageError(
            f"`operator`: {bundle} has no calls of operators: export it again with"
            " `loradeploy export --operator`"
        )
    if names[0] != CPU:
        raise UsageError(
            f"`operator`: its library computes on the CPU, and {names[0]} is the provider: open the"
            " bundle without it"
        )
    return manifest.operators


def open_file(
    graph: Path,
    providers: Sequence[Provider] | None,
    options: onnxruntime.SessionOptions | None,
) -> onnxruntime.InferenceSession:
    """Open any ONNX file, whose weights onnxruntime may map; see `open_graph`."""
    asked = resolve(providers)
    source = Source(os.fspath(graph), options or onnxruntime.SessionOptions())
    return _open(graph, source, asked)


def _has_providers(options: onnxruntime.SessionOptions) -> bool:
    """Whether the options choose execution providers themselves."""
    has = getattr(options, "has_providers", None)  # onnxruntime 1.24 or later
    return has is not None and bool(has())


def _all_fed(bundle: Path, manifest: Manifest | None, names: Sequence[str]) -> tuple[str, ...]:
    """The optional inputs if a provider in `names` does not support defaults, otherwise none."""
    if all(known(name).takes_defaults for name in names):
        return ()
    return tuple(spec.name for spec in optional_inputs(manifest or read_manifest(bundle)))


def _open(
    graph: Path, source: Source, asked: Sequence[Resolved] | None
) -> onnxruntime.InferenceSession:
    """Open a session on the providers `asked`; None means those in the options."""
    options, mapped = source.options, source.mapped
    check_file(graph, error=BundleError, limit=MAX_GRAPH_BYTES)
    if options.log_severity_level == UNSET:
        options.log_severity_level = severity()
    if entry(options, _RECORD) != "1":
        options.add_session_config_entry(_RECORD, "1")
    if not entry(options, EXACT_INTEGERS):
        options.add_session_config_entry(EXACT_INTEGERS, "1")
    names = [name for name, _ in asked or ()]
    if needs_cuda(names):
        preload_cuda()
    if asked is not None:
        content = source.graph if isinstance(source.graph, bytes) else None
        asked = [_with_cpu_nodes(provider, content, graph) for provider in asked]
    by_name = None if asked is None else add_started(options, asked)
    new = onnxruntime.InferenceSession
    if mapped is not None:
        new = partial(MappedSession, mapped)
    elif source.content is not None:
        new = partial(SessionInPlace, source.content)
    try:
        with nullcontext() if names == [CPU] else unlogged():
            session = new(source.graph, options, providers=by_name, enable_fallback=0)
    except Exception as problem:  # onnxruntime's exceptions have no other common base
        raise BundleError(f"onnxruntime cannot open {graph}: {first_line(problem)}") from None
    if mapped is not None:
        mapped.check()
    _check_started(session, [name for name, _ in by_name or ()], fallback=CPU in names)
    return session


def _with_cpu_nodes(provider: Resolved, content: bytes | None, graph: Path) -> Resolved:
    """The provider with an option that keeps the operators it computes incorrectly on the CPU.

    `content`: that of `graph`, if it was read already.
    """
    name, options = provider
    row = known(name)
    if not row.cpu_operators:
        return provider
    if content is None:
        content = read_bytes(graph, error=BundleError, limit=MAX_GRAPH_BYTES)
    given = str(options.get(row.cpu_nodes_option, "")).split("\n")
    nodes = [node for node in (*given, *node_names(content, row.cpu_operators)) if node]
    return (name, {**options, row.cpu_nodes_option: "\n".join(nodes)}) if nodes else provider


def _check_started(
    session: onnxruntime.InferenceSession, names: Sequence[str], *, fallback: bool
) -> None:
    """Raise UsageError, or warn if there is a `fallback`, if one of `names` did not start."""
    started = session.get_providers()
    if missing := [name for name in names if name not in started]:
        message = f"{missing[0]} is installed but does not start here: no device, driver or library"
        if not fallback:
            raise UsageError(f"{message}. Fix that, or name {CPU} as well to run on the CPU.")
        logger.warning("%s; running on %s", message, started[0])
