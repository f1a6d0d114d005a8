"""`loradeploy inspect`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from loradeploy.bundle.names import (
    CERTIFICATE_NAME,
    GRAPH_DATA_NAME,
    GRAPH_NAME,
    MANIFEST_NAME,
    NATIVE_SUFFIX,
    SIGNATURE_NAME,
)
from loradeploy.cli.console import json_option, print_json, print_pairs, print_rows, size
from loradeploy.errors import AdapterError, BundleError, ModelError, UsageError, first_line
from loradeploy.files import MAX_GRAPH_BYTES, check_file

if TYPE_CHECKING:
    from loradeploy.adapter import Adapter
    from loradeploy.bundle.manifest import Manifest

Facts = dict[str, Any]

_ERRORS_ONLY: Final = 3
_ADAPTER_FILES: Final = "adapter_*"
_TENSORS: Final = ".safetensors"


@click.command(
    name="inspect",
    short_help="Tell what an adapter, a bundle or an ONNX file is.",
    epilog="Example: loradeploy inspect adapters/sport",
)
@click.argument("path", type=click.Path())
@json_option
def command(path: str, as_json: bool) -> None:
    """Tell what PATH is: an adapter, a bundle, an ONNX file, an .onnx_adapter or a .safetensors.

    The tables have one row for what is alike in every layer, with its count; --json has them all.
    """
    facts = _look(Path(path))
    if as_json:
        print_json(facts)
        return
    tables = {name: value for name, value in facts.items() if _is_table(value)}
    pairs = {
        name: size(value) if name.endswith("bytes") else value
        for name, value in facts.items()
        if name != "kind" and name not in tables
    }
    print_pairs(f"{path}: {facts['kind']}", pairs)
    for name, rows in tables.items():
        shown = _alike(rows)
        print_rows(name, shown[0] if shown else (), [row.values() for row in shown])


def _look(place: Path) -> Facts:
    if not place.exists():
        raise UsageError(f"{place} does not exist: give an adapter, a bundle or an ONNX file")
    if place.is_dir():
        if (place / MANIFEST_NAME).is_file():
            return _bundle(place)
        if any(place.glob(_ADAPTER_FILES)):
            return {**_adapter(place), **_beside(place)}
        from loradeploy.export.read.repository import find_graph

        if (graph := find_graph(place)) is not None:
            return _graph(graph)
        return _adapter(place)
    return _FILES.get(place.suffix, _adapter)(place)


def _beside(place: Path) -> Facts:
    """What an adapter lies beside: a base, which is loaded without it."""
    from loradeploy.adapter.base_files import weight_files

    try:
        files = weight_files(place)
    except ModelError:
        return {}
    return {"beside": f"a base model ({files[0].name}), which is loaded without the adapter"}


# -- an adapter ------------------------------------------------------------------------------------


def _adapter(place: Path) -> Facts:
    from loradeploy.adapter import load_adapter
    from loradeploy.adapter.peft import WEIGHTS_NAME

    adapter = load_adapter(place)
    config = adapter.config
    weights = place / WEIGHTS_NAME if place.is_dir() else place
    targets = config.target_modules
    return {
        "kind": "LoRA adapter",
        "method": _method(adapter),
        "layers": sorted({pair.kind for pair in adapter.factors.values()}),
        "digest": adapter.digest,
        "base_model": config.base_model_name_or_path,
        "base_digest": adapter.base_digest,
        "task_type": config.task_type,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "target_modules": targets if targets is None or isinstance(targets, str) else list(targets),
        "modules_to_save": list(config.modules_to_save) or None,
        "bias": config.bias,
        "labels": list(adapter.labels) if adapter.labels else None,
        "parameters": adapter.parameter_count,
        "dtype": sorted({str(pair.A.dtype) for pair in adapter.factors.values()}),
        "bytes": weights.stat().st_size,
        "targets": [
            {
                "module": module,
                "rank": pair.rank,
                "scaling": adapter.scaling(module),
                "lora_A": list(pair.A.shape),
                "lora_B": list(pair.B.shape),
            }
            for module, pair in adapter.factors.items()
        ],
        "saved": [_tensor(name, values) for name, values in adapter.saved.items()],
    }


def _method(adapter: Adapter) -> str:
    """The adapter's method, and what it is for where that is no plain base."""
    told = adapter.config.method
    if adapter.changes_base:
        told += f", on a base that {adapter.config.init_lora_weights} changed"
    return told


def _native(place: Path) -> Facts:
    from loradeploy.bundle.adapter_inputs.native import read_onnx_adapter

    arrays = read_onnx_adapter(place)
    return {
        "kind": "ONNX Runtime adapter",
        "bytes": place.stat().st_size,
        "ranks": sorted({a.shape[-1] for name, a in arrays.items() if name.endswith(".lora_A")}),
        "parameters": sum(values.size for values in arrays.values()),
        "tensors": [_tensor(name, values) for name, values in sorted(arrays.items())],
    }


def _safetensors(place: Path) -> Facts:
    from loradeploy.adapter.config import CONFIG_NAME
    from loradeploy.adapter.formats import other_file
    from loradeploy.adapter.tensors import map_tensors

    if (place.parent / CONFIG_NAME).is_file():
        return _adapter(place)
    tensors, metadata = map_tensors(place, error=UsageError)
    return {
        "kind": "safetensors file",
        "bytes": place.stat().st_size,
        **({"note": f"it {told}"} if (told := other_file(place)) else {}),
        **({"metadata": [f"{name}={text}" for name, text in metadata.items()]} if metadata else {}),
        "tensors": [
            {"name": name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
            for name, tensor in sorted(tensors.items())
        ],
    }


def _tensor(name: str, values: Any) -> Facts:
    return {"name": name, "dtype": str(values.dtype), "shape": list(values.shape)}


# -- a bundle --------------------------------------------------------------------------------------


def _bundle(place: Path) -> Facts:
    from loradeploy.bundle.graph_form import LORA, form_of
    from loradeploy.bundle.manifest import read_manifest
    from loradeploy.bundle.proof.certificate import covered, digests
    from loradeploy.files import plain

    manifest = read_manifest(place)
    form = form_of(manifest)
    merged = manifest.merged_adapter
    files = {name: place / name for name in (GRAPH_NAME, GRAPH_DATA_NAME)}
    found = digests(place, covered(place, manifest))
    told = {GRAPH_NAME: manifest.graph_digest, GRAPH_DATA_NAME: manifest.data_digest}
    changed = [name for name, digest in told.items() if digest not in (None, found.get(name))]
    return {
        "kind": "bundle",
        "task": manifest.task,
        "mode": manifest.mode,
        "base_model": manifest.base.name,
        "base_digest": manifest.base.digest,
        "base_kind": manifest.base.kind,
        "precision": form.precision,
        "opset": manifest.opset,
        "factor_dtype": None if merged else manifest.factor_dtype,
        "layout": form.layout,
        "branches": form.branches,
        "side_inputs": None if merged else [LORA, *sorted(form.side_inputs)],
        "attention": form.attention,
        "cache_in_place": manifest.cache_in_place,
        "padding": manifest.padding,
        "required_inputs": form.required_inputs,
        "static_shapes": [f"{name}={size}" for name, size in form.static_shapes.items()],
        "merged_adapter": None if merged is None else merged.digest,
        "merge_loss": plain(manifest.merge_loss),
        "graph_digest": manifest.graph_digest,
        "graph": f"changed since the export: {', '.join(changed)}" if changed else "as exported",
        **_certificate(place, manifest, found),
        "bytes": sum(file.stat().st_size for file in place.rglob("*") if file.is_file()),
        "graph_bytes": sum(file.stat().st_size for file in files.values() if file.is_file()),
        "inputs": [_spec(s.name, s.dtype, s.shape) for s in manifest.inputs],
        "outputs": [_spec(s.name, s.dtype, s.shape) for s in manifest.outputs],
        "targets": [
            {"module": t.module, "in": t.in_features, "out": t.out_features, "found_by": t.found_by}
            for t in manifest.targets
        ],
        "changed": [
            {"module": o.module, "size": o.size, "scale": bool(o.scale), "offset": bool(o.offset)}
            for o in manifest.changed
        ],
        "saved": [
            {"parameter": saved.parameter, "shape": list(saved.shape)} for saved in manifest.saved
        ],
        "adapters": [
            {"name": name, "digest": entry.digest, "files": _own(place, entry.path, entry.digest)}
            for name, entry in manifest.adapters.items()
        ],
    }


def _own(bundle: Path, path: str | None, digest: str) -> str:
    """Whether an adapter that came with the bundle is still the one that was exported."""
    from loradeploy.adapter import load_adapter
    from loradeploy.files import inside

    if path is None:
        return "none"
    try:
        found = load_adapter(inside(bundle, path)).digest
    except (AdapterError, BundleError) as problem:
        return str(problem)
    return "as exported" if found == digest else f"changed since the export: {found}"


def _certificate(place: Path, manifest: Manifest, found: Mapping[str, str]) -> Facts:
    """What the last parity check said, and whether it is about the files that are there now."""
    from loradeploy.bundle.proof.certificate import fault, parity_command, read_certificate

    if not (place / CERTIFICATE_NAME).is_file():
        return {"parity": "unchecked", "parity_note": f"run {parity_command(place)}"}
    try:
        told = read_certificate(place)
    except BundleError as problem:
        return {"parity": "unreadable", "parity_note": str(problem)}
    stale = fault(told, manifest, found, verdict=False)
    verdict = "passed" if told.passed else "failed"
    note = None if told.passed else told.failures[0]
    if stale is not None:
        verdict, note = "stale", f"{stale}: run {parity_command(place)} again"
    return {
        "parity": verdict,
        "parity_note": note,
        "parity_created": told.created,
        "parity_versions": [f"{name} {version}" for name, version in told.versions.items()],
        "parity_hardware": [
            *(f"{name} {value}" for name, value in told.platform.items()),
            *told.providers,
        ],
        "parity_checked": [
            f"{told.coverage.prompts} prompts",
            f"{told.coverage.prompt_tokens} tokens of them",
            f"{told.coverage.generated} tokens generated for each",
            *sorted(told.coverage.phases),
        ],
        "parity_signed": (place / SIGNATURE_NAME).is_file(),
        "parity_adapters": [
            {
                "name": own.name,
                "digest": own.digest,
                "effect": own.effect,
                "largest_error": own.error,
            }
            for own in told.adapters
        ],
    }


# -- a graph ---------------------------------------------------------------------------------------


def _graph(place: Path) -> Facts:
    """An ONNX file: with onnx_ir all that it says, without it what onnxruntime tells."""
    try:
        import onnx_ir
    except ImportError:
        return _graph_by_runtime(place)
    try:
        check_file(place, error=BundleError, limit=MAX_GRAPH_BYTES)
        model = onnx_ir.load(place)
    except Exception as problem:  # protobuf's and the library's errors share no base but this
        raise BundleError(f"{place} is no ONNX file: {first_line(problem)}") from None
    if not model.opset_imports:  # an empty file is a valid protobuf
        raise BundleError(f"{place} is no ONNX file: it names no opset")
    graph = model.graph
    weights = [value.const_value for value in graph.initializers.values()]
    files = {Path(weight.path) for weight in weights if isinstance(weight, onnx_ir.ExternalTensor)}
    ops = Counter(f"{n.domain}::{n.op_type}".removeprefix("::") for n in graph.all_nodes())

    def rows(values: Any) -> list[Facts]:
        return [
            _spec(v.name, v.dtype and v.dtype.name, "?" if v.shape is None else list(v.shape.dims))
            for v in values
        ]

    return {
        "kind": "ONNX file",
        "bytes": sum(file.stat().st_size for file in {place, *files} if file.is_file()),
        "missing_data": [str(file) for file in sorted(files) if not file.is_file()] or None,
        "producer": model.producer_name or None,
        "opsets": [f"{domain or 'ai.onnx'} {n}" for domain, n in model.opset_imports.items()],
        "initializers": len(weights),
        "inputs": rows(v for v in graph.inputs if v.name not in graph.initializers),
        "outputs": rows(graph.outputs),
        "side_inputs": rows(v for v in graph.inputs if v.name in graph.initializers),
        "operators": [{"operator": op, "nodes": count} for op, count in ops.most_common()],
    }


def _graph_by_runtime(place: Path) -> Facts:
    import onnxruntime

    check_file(place, error=BundleError, limit=MAX_GRAPH_BYTES)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            str(place), options, providers=["CPUExecutionProvider"]
        )
    except Exception as problem:  # onnxruntime's exceptions share no base but this
        raise BundleError(f"onnxruntime cannot open {place}: {first_line(problem)}") from None
    data = place.with_name(f"{place.name}.data")

    def rows(nodes: Any) -> list[Facts]:
        return [_spec(n.name, re.sub(r"^tensor\((.*)\)$", r"\1", n.type), n.shape) for n in nodes]

    return {
        "kind": "ONNX file",
        "bytes": place.stat().st_size + (data.stat().st_size if data.is_file() else 0),
        "producer": session.get_modelmeta().producer_name or None,
        "inputs": rows(session.get_inputs()),
        "outputs": rows(session.get_outputs()),
        "side_inputs": rows(session.get_overridable_initializers()),
    }


_FILES: Final[Mapping[str, Callable[[Path], Facts]]] = {
    ".onnx": _graph,
    NATIVE_SUFFIX: _native,
    _TENSORS: _safetensors,
}


# -- tables ----------------------------------------------------------------------------------------


def _spec(name: str, dtype: str | None, shape: Any) -> Facts:
    """A graph's input or output; a dimension is a number, a symbol, or ? where it has no name."""
    known = "unknown" if dtype is None else dtype.lower()
    if isinstance(shape, str):
        return {"name": name, "dtype": known, "shape": shape}
    dims = [dim if isinstance(dim, int) else _symbol(dim) for dim in shape]
    return {"name": name, "dtype": _DTYPES.get(known, known), "shape": dims}


def _symbol(dim: Any) -> str:
    return str(getattr(dim, "value", dim) or "?")


_DTYPES: Final = {"float": "float32", "double": "float64"}  # numpy's names, as in a manifest


def _alike(rows: list[Facts]) -> list[Facts]:
    """`rows` with what differs in a layer's number alone joined, and counted."""
    groups: dict[tuple[Any, ...], list[Facts]] = {}
    for row in rows:
        groups.setdefault(tuple(_cell(value) for value in row.values()), []).append(row)
    if len(groups) == len(rows):
        return rows
    return [
        {
            **(dict(zip(group[0], cells, strict=True)) if len(group) > 1 else group[0]),
            "count": len(group),
        }
        for cells, group in groups.items()
    ]


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return f"[{', '.join(str(_cell(part)) for part in value)}]"
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", value) if isinstance(value, str) else value


def _is_table(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(row, Mapping) for row in value)
