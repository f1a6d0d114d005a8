"""`loradeploy inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from loradeploy.bundle.names import (
    CERTIFICATE_NAME,
    GRAPH_DATA_NAME,
    GRAPH_NAME,
    MANIFEST_NAME,
    NATIVE_SUFFIX,
)
from loradeploy.cli.console import json_option, print_json, print_pairs, print_rows, size
from loradeploy.errors import BundleError, UsageError

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest, TensorSpec

_ERRORS_ONLY: Final = 3


@click.command(
    name="inspect",
    short_help="Tell what an adapter, a bundle or an ONNX file is.",
    epilog="Example: loradeploy inspect adapters/sport",
)
@click.argument("path", type=click.Path())
@json_option
def command(path: str, as_json: bool) -> None:
    """Tell what PATH is: an adapter, a bundle, an .onnx_adapter or an ONNX file."""
    place = Path(path)
    facts = _look(place)
    if as_json:
        print_json(facts)
        return
    tables = {name: value for name, value in facts.items() if _is_table(value)}
    pairs = {n: v for n, v in facts.items() if n != "kind" and n not in tables}
    print_pairs(f"{path}: {facts['kind']}", pairs)
    for name, rows in tables.items():
        print_rows(name, rows[0] if rows else (), [row.values() for row in rows])


def _look(place: Path) -> dict[str, Any]:
    if not place.exists():
        raise UsageError(f"{place} does not exist: give an adapter, a bundle or an ONNX file")
    if (place / MANIFEST_NAME).is_file():
        return _bundle(place)
    if place.suffix == NATIVE_SUFFIX:
        return _native(place)
    if place.suffix == ".onnx":
        return _graph(place)
    if place.is_dir() and not any(place.glob("adapter_*")) and (place / GRAPH_NAME).is_file():
        return _graph(place / GRAPH_NAME)
    return _adapter(place)


def _adapter(place: Path) -> dict[str, Any]:
    from loradeploy.adapter import load_adapter
    from loradeploy.adapter.peft import WEIGHTS_NAME

    adapter = load_adapter(place)
    weights = place / WEIGHTS_NAME if place.is_dir() else place
    config = adapter.config
    kinds: dict[tuple[str, str, str, int, float], int] = Counter(
        (
            module.rpartition(".")[2],
            str(list(pair.A.shape)),
            str(list(pair.B.shape)),
            pair.rank,
            adapter.scaling(module),
        )
        for module, pair in adapter.factors.items()
    )
    return {
        "kind": "LoRA adapter",
        "digest": adapter.digest,
        "base model": config.base_model_name_or_path,
        "base digest": adapter.base_digest or "unknown",
        "task": config.task_type,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "rsLoRA": config.use_rslora,
        "target modules": config.target_modules,
        "modules to save": list(config.modules_to_save) or None,
        "labels": list(adapter.labels) if adapter.labels else None,
        "parameters": adapter.parameter_count,
        "dtype": sorted({str(pair.A.dtype) for pair in adapter.factors.values()}),
        "size": size(weights.stat().st_size),
        "targets": [
            {"module": name, "count": count, "lora_A": A, "lora_B": B, "rank": rank, "scaling": s}
            for (name, A, B, rank, s), count in kinds.items()
        ],
        "saved": [
            {"parameter": name, "shape": str(list(values.shape)), "dtype": str(values.dtype)}
            for name, values in adapter.saved.items()
        ],
    }


def _bundle(place: Path) -> dict[str, Any]:
    from loradeploy.bundle.manifest import read_manifest

    manifest = read_manifest(place)
    files = [file for file in place.rglob("*") if file.is_file()]
    merged = manifest.merged_adapter
    found: dict[tuple[str, int, int, str], int] = Counter(
        (t.module.rpartition(".")[2], t.in_features, t.out_features, t.found_by)
        for t in manifest.targets
    )
    return {
        "kind": "bundle",
        "task": manifest.task,
        "mode": manifest.mode,
        "base model": manifest.base.name,
        "base digest": f"{manifest.base.digest} ({manifest.base.kind})",
        "precision": manifest.precision,
        "opset": manifest.opset,
        "merged adapter": None if merged is None else merged.digest,
        "graph digest": manifest.graph_digest,
        "parity": _certificate(place, manifest),
        "size": size(sum(file.stat().st_size for file in files)),
        "inputs": _specs(manifest.inputs),
        "outputs": _specs(manifest.outputs),
        "targets": [
            {"module": name, "count": count, "in": into, "out": out, "found by": by}
            for (name, into, out, by), count in found.items()
        ],
        "saved": [
            {"parameter": saved.parameter, "shape": str(list(saved.shape))}
            for saved in manifest.saved
        ],
        "adapters": [
            {"name": name, "digest": entry.digest} for name, entry in manifest.adapters.items()
        ],
    }


def _certificate(place: Path, manifest: Manifest) -> str:
    """What the last parity check said, and whether it is about the files that are there now."""
    from loradeploy.adapter.digest import file_digest
    from loradeploy.files import read_json

    file = place / CERTIFICATE_NAME
    if not file.is_file():
        return "never checked: run loradeploy parity"
    certificate = read_json(file, error=BundleError)
    told = {name: certificate.get(name) for name in ("graph_digest", "data_digest")}
    now = {"graph_digest": place / GRAPH_NAME, "data_digest": place / GRAPH_DATA_NAME}
    for name, path in now.items():
        if told[name] != (file_digest(path) if path.is_file() else None):
            return f"out of date: {path.name} has changed since it was checked"
    checked = {facts.get("digest") for facts in certificate.get("adapters") or []}
    unchecked = [n for n, entry in manifest.adapters.items() if entry.digest not in checked]
    verdict = "passed" if certificate.get("passed") is True else "failed"
    note = f", but not for {', '.join(unchecked)}" if unchecked else ""
    return f"{verdict} on {certificate.get('created', 'an unknown day')}{note}"


def _specs(specs: tuple[TensorSpec, ...]) -> list[dict[str, str]]:
    """Graph inputs or outputs; the cache's, alike in every layer, as one row."""
    rows: dict[str, dict[str, str]] = {}
    for spec in specs:
        parts = [("N" if part.isdigit() else part) for part in spec.name.split(".")]
        name = ".".join(parts)
        shape = f"[{', '.join(map(str, spec.shape))}]"
        rows.setdefault(name, {"name": name, "dtype": spec.dtype, "shape": shape})
    return list(rows.values())


def _native(place: Path) -> dict[str, Any]:
    from loradeploy.bundle.native import read_onnx_adapter

    arrays = read_onnx_adapter(place)
    return {
        "kind": "ONNX Runtime adapter",
        "size": size(place.stat().st_size),
        "tensors": [
            {"name": name, "dtype": str(values.dtype), "shape": str(list(values.shape))}
            for name, values in sorted(arrays.items())
        ],
    }


def _graph(place: Path) -> dict[str, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            str(place), options, providers=["CPUExecutionProvider"]
        )
    except Exception as problem:  # onnxruntime's exceptions share no base but this
        first = str(problem).strip().splitlines()[0]
        raise BundleError(f"onnxruntime cannot open {place}: {first}") from None

    def rows(nodes: Any) -> list[dict[str, str]]:
        return [{"name": n.name, "type": n.type, "shape": str(n.shape)} for n in nodes]

    data = place.with_name(f"{place.name}.data")
    bytes_ = place.stat().st_size + (data.stat().st_size if data.is_file() else 0)
    return {
        "kind": "ONNX file",
        "size": size(bytes_),
        "producer": session.get_modelmeta().producer_name or None,
        "inputs": rows(session.get_inputs()),
        "outputs": rows(session.get_outputs()),
        "side inputs": rows(session.get_overridable_initializers()),
    }


def _is_table(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(row, Mapping) for row in value)
