"""Opening a bundle's graph, and holding it to its manifest."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import onnxruntime

from loradeploy.bundle.adapter_inputs.changes import change_inputs
from loradeploy.bundle.manifest import TensorSpec
from loradeploy.bundle.names import ADAPTER_IDS, ADAPTER_MODE, GRAPH_NAME, ROWS
from loradeploy.errors import BundleError, UsageError, first_line, listed
from loradeploy.files import MAX_GRAPH_BYTES, check_directory, check_file
from loradeploy.printable import logger_of
from loradeploy.runtime.reading.weights import MAPPED as MAPPED
from loradeploy.runtime.reading.weights import WEIGHTS_AT as WEIGHTS_AT
from loradeploy.runtime.reading.weights import graph_source

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest

logger = logger_of(__name__)

# onnxruntime's name of a provider, alone or with options for it.
Provider = str | tuple[str, Mapping[str, Any]]

CPU: Final = "CPUExecutionProvider"
# Where factors and caches live for a provider; for those not listed, in host memory.
_DEVICES: Final = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
_PACKAGES: Final = {
    "CUDAExecutionProvider": "onnxruntime-gpu",
    "TensorrtExecutionProvider": "onnxruntime-gpu",
    "DmlExecutionProvider": "onnxruntime-directml",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "QNNExecutionProvider": "onnxruntime-qnn",
}
DTYPES: Final = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(double)": "float64",
    **{f"tensor({kind})": kind for kind in ("int64", "int32", "int16", "int8", "bool")},
    **{f"tensor({kind})": kind for kind in ("uint64", "uint32", "uint16", "uint8")},
}
# onnxruntime's log severities. Its errors are raised too, and are told in a line of ours.
_WARNINGS, _ERRORS, _FATAL = 2, 3, 4
# Which provider runs which node is kept for `placement_of`.
_RECORD: Final = "session.record_ep_graph_assignment_info"
_UNSET: Final = -1
_LISTED: Final = 3


def open_graph(
    bundle: Path,
    providers: Sequence[Provider] | None,
    options: onnxruntime.SessionOptions | None,
    manifest: Manifest | None = None,
) -> onnxruntime.InferenceSession:
    """An inference session on the bundle's graph; on the CPU where `providers` is None.

    A provider that is installed and does not start (no device, no driver) is passed over with a
    logged warning where the CPU's stands in `providers` too, and is an error otherwise. `options`
    may tell of another directory for the graph's weights, as `WEIGHTS_AT`, or have the data file
    mapped, as `MAPPED`; else what happens to the files afterwards changes nothing (weights.py).
    `manifest`: what the graph and its weights must be of.

    Raises:
        UsageError: a provider that is not installed or does not start.
        BundleError: there is no graph, onnxruntime cannot read it, or it is not the manifest's.
    """
    graph = bundle / GRAPH_NAME
    if not graph.is_file():
        raise BundleError(f"{bundle} holds no {GRAPH_NAME}: export again")
    check_directory(bundle, error=BundleError, deep=True)  # the graph may name files in any folder
    names = _asked(providers)
    with graph_source(bundle, options, manifest) as source:
        session = _open(graph, source.graph, providers, source.options)
    _check_started(session, names)
    return session


def open_file(
    graph: Path,
    providers: Sequence[Provider] | None,
    options: onnxruntime.SessionOptions | None,
) -> onnxruntime.InferenceSession:
    """As `open_graph`, of any ONNX file, whose weights onnxruntime may map."""
    names = _asked(providers)
    session = _open(graph, os.fspath(graph), providers, options or onnxruntime.SessionOptions())
    _check_started(session, names)
    return session


def _asked(providers: Sequence[Provider] | None) -> list[str]:
    """The names of the providers that are asked for, which are installed."""
    asked = list(providers) if providers is not None else [CPU]
    names = [provider if isinstance(provider, str) else provider[0] for provider in asked]
    check_installed(names)
    if any(name in _DEVICES for name in names):
        preload_cuda()
    return names


def _open(
    graph: Path,
    source: str | bytes,
    providers: Sequence[Provider] | None,
    options: onnxruntime.SessionOptions,
) -> onnxruntime.InferenceSession:
    asked = list(providers) if providers is not None else [CPU]
    check_file(graph, error=BundleError, limit=MAX_GRAPH_BYTES)
    if options.log_severity_level == _UNSET:
        # Else a warning for every side input, and every error twice.
        options.log_severity_level = _ERRORS if logger.isEnabledFor(logging.DEBUG) else _FATAL
    options.add_session_config_entry(_RECORD, "1")
    try:
        with _unlogged([name if isinstance(name, str) else name[0] for name in asked]):
            return onnxruntime.InferenceSession(source, options, providers=asked, enable_fallback=0)
    except Exception as problem:  # onnxruntime's own exceptions share no base but this
        raise BundleError(f"onnxruntime cannot open {graph}: {first_line(problem)}") from None


def _check_started(session: onnxruntime.InferenceSession, names: Sequence[str]) -> None:
    started = session.get_providers()
    if missing := [name for name in names if name not in started]:
        told = f"{missing[0]} is installed but does not start here: no device, driver or library"
        if CPU not in names:
            raise UsageError(f"{told}. Mend that, or name {CPU} as well to run on the CPU.")
        logger.warning("%s; running on %s", told, started[0])


@contextlib.contextmanager
def _unlogged(providers: Sequence[str]) -> Iterator[None]:
    """Without what onnxruntime's own logger says of a provider's library that does not load."""
    if set(providers) == {CPU} or logger.isEnabledFor(logging.DEBUG):
        yield
        return
    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNINGS)


def placement_of(session: onnxruntime.InferenceSession) -> dict[str, dict[str, int]]:
    """How many nodes of each operator every provider runs, after the graph's optimization.

    Empty where onnxruntime does not tell (before 1.24).
    """
    told = getattr(session, "get_provider_graph_assignment_info", None)
    if told is None:
        return {}
    placed: dict[str, Counter[str]] = {}
    for part in told():
        counts = placed.setdefault(part.ep_name, Counter())
        counts.update(node.op_type for node in part.get_nodes())
    return {provider: dict(counts.most_common()) for provider, counts in placed.items()}


def preload_cuda() -> None:
    """Load the CUDA libraries that pip installed, which onnxruntime (1.31) does not find itself."""
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()) as said:  # it prints what is missing
            preload()
        for line in said.getvalue().splitlines():
            logger.debug("%s", line)


def device_of(session: onnxruntime.InferenceSession) -> tuple[str, int]:
    """Where the session's first provider keeps tensors, in onnxruntime's words: device and id."""
    provider = session.get_providers()[0]
    device = _DEVICES.get(provider, "cpu")
    options = session.get_provider_options().get(provider, {})
    return device, int(options.get("device_id", 0)) if device != "cpu" else 0


def check_installed(names: Sequence[str]) -> None:
    """Raise UsageError unless this onnxruntime has every provider of `names`."""
    available = onnxruntime.get_available_providers()
    for name in names:
        if name not in available:
            package = _PACKAGES.get(name)
            raise UsageError(
                f"this onnxruntime has no {name!r}, it has {', '.join(available)}: "
                + (
                    f"pip install {package} in place of the onnxruntime there is"
                    if package
                    else "see https://onnxruntime.ai/docs/execution-providers for where it is"
                )
            )


def check_graph(bundle: Path, manifest: Manifest, session: onnxruntime.InferenceSession) -> None:
    """Raise BundleError unless the graph takes and gives what the manifest says."""
    required = {node.name: node for node in session.get_inputs()}
    overridable = {node.name: node for node in session.get_overridable_initializers()}
    outputs = {node.name: node for node in session.get_outputs()}
    problems = [
        *_misfits("input", manifest.inputs, required),
        *_unknown("input", manifest.inputs, required),
        *_misfits("output", manifest.outputs, outputs),
        *_unknown("output", manifest.outputs, outputs),
        *_misfits("side input", _side_inputs(manifest), overridable),
        *_unknown("side input", _side_inputs(manifest), overridable),
    ]
    if problems:
        raise BundleError(
            f"{bundle / GRAPH_NAME} does not fit the bundle's manifest:"
            f" {listed(problems, _LISTED)}. Export again."
        )


def _side_inputs(manifest: Manifest) -> list[TensorSpec]:
    specs: list[TensorSpec] = []
    for target in manifest.targets:
        into, out = target.in_features, target.out_features
        specs.append(TensorSpec(target.lora_A, manifest.factor_dtype, ("adapters", into, "rank")))
        specs.append(TensorSpec(target.lora_B, manifest.factor_dtype, ("adapters", "rank", out)))
    for saved in manifest.saved:
        shape: tuple[int | str, ...] = ("adapters", *saved.slot_shape)
        specs.append(TensorSpec(saved.input, manifest.factor_dtype, shape))
    for name, (size, _) in change_inputs(manifest).items():
        specs.append(TensorSpec(name, manifest.factor_dtype, ("adapters", size)))
    if specs and manifest.layout != ROWS:
        specs.append(TensorSpec(ADAPTER_IDS, "int64", ("rows",)))
    if manifest.branches:
        specs.append(TensorSpec(ADAPTER_MODE, "int64", (1,)))
    return specs


def _misfits(kind: str, specs: Sequence[TensorSpec], nodes: Mapping[str, Any]) -> list[str]:
    problems = []
    for spec in specs:
        node = nodes.get(spec.name)
        if node is None:
            problems.append(f"the graph has no {kind} {spec.name}")
        elif DTYPES.get(node.type) != spec.dtype or not _fits(node.shape, spec.shape):
            problems.append(
                f"the {kind} {spec.name} is {node.type} {_shown(node.shape)},"
                f" the manifest says {spec.dtype} {_shown(spec.shape)}"
            )
    return problems


def _unknown(kind: str, specs: Sequence[TensorSpec], nodes: Mapping[str, Any]) -> list[str]:
    known = {spec.name for spec in specs}
    return [
        f"the graph's {kind} {name} is not in the manifest" for name in nodes if name not in known
    ]


def _fits(actual: Sequence[int | str | None], told: Sequence[int | str]) -> bool:
    """Whether two shapes have one length and agree wherever both are numbers."""
    return len(actual) == len(told) and all(
        a == t
        for a, t in zip(actual, told, strict=True)
        if isinstance(a, int) and isinstance(t, int)
    )


def _shown(shape: Sequence[int | str | None]) -> str:
    return f"[{', '.join(str(dimension) for dimension in shape)}]"
