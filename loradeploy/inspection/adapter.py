"""Describe adapters in the formats of PEFT and ONNX Runtime, and files of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loradeploy.errors import ModelError, UsageError
from loradeploy.inspection.facts import IF_KNOWN, TensorFacts, tensor_facts

if TYPE_CHECKING:
    from loradeploy.adapter import Adapter


@dataclass(frozen=True, kw_only=True)
class FactorFacts:
    """The factors of one module."""

    module: str
    rank: int
    scaling: float
    lora_A: list[int]
    lora_B: list[int]


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """An adapter in PEFT's format.

    `layers`: the kinds of layers that have factors. `saved`: fully trained parameters. `tokens`:
    the numbers of trained rows, by weight. `beside`: a base model in the same directory. `part_of`:
    the digest of the complete adapter, if this is its part for one bundle.
    """

    kind: str = "LoRA adapter"
    method: str
    layers: list[str]
    digest: str
    base_model: str | None
    base_digest: str | None
    task_type: str | None
    rank: int
    alpha: float
    use_rslora: bool
    target_modules: list[str] | str | None
    modules_to_save: list[str] | None
    bias: str
    labels: list[str] | None
    problem_type: str | None = field(default=None, metadata=IF_KNOWN)
    parameters: int
    dtype: list[str]
    bytes: int
    targets: list[FactorFacts]
    saved: list[TensorFacts]
    tokens: list[str] | None = field(default=None, metadata=IF_KNOWN)
    beside: str | None = field(default=None, metadata=IF_KNOWN)
    part_of: str | None = field(default=None, metadata=IF_KNOWN)


@dataclass(frozen=True, kw_only=True)
class NativeAdapterFacts:
    """An adapter for ONNX Runtime's LoraAdapter."""

    kind: str = "ONNX Runtime adapter"
    bytes: int
    ranks: list[int]
    parameters: int
    tensors: list[TensorFacts]


@dataclass(frozen=True, kw_only=True)
class TensorFileFacts:
    """A safetensors file that is not an adapter. `note`: what it is instead, if known."""

    kind: str = "safetensors file"
    bytes: int
    note: str | None = field(default=None, metadata=IF_KNOWN)
    metadata: list[str] | None = field(default=None, metadata=IF_KNOWN)
    tensors: list[TensorFacts]


def inspect_adapter(path: Path) -> AdapterFacts:
    """Describe an adapter's directory, or its safetensors file.

    Raises:
        AdapterError: it is not an adapter, or is refused.
    """
    from loradeploy.adapter import load_adapter
    from loradeploy.adapter.files.peft import WEIGHTS_NAME

    adapter = load_adapter(path)
    config = adapter.config
    weights = path / WEIGHTS_NAME if path.is_dir() else path
    targets = config.target_modules
    return AdapterFacts(
        method=_method(adapter),
        layers=sorted({pair.kind for pair in adapter.factors.values()}),
        digest=adapter.digest,
        base_model=config.base_model_name_or_path,
        base_digest=adapter.base_digest,
        task_type=config.task_type,
        rank=config.r,
        alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        target_modules=targets if targets is None or isinstance(targets, str) else list(targets),
        modules_to_save=list(config.modules_to_save) or None,
        bias=config.bias,
        labels=list(adapter.labels) if adapter.labels else None,
        problem_type=adapter.problem_type,
        parameters=adapter.parameter_count,
        dtype=sorted({str(pair.A.dtype) for pair in adapter.factors.values()}),
        bytes=weights.stat().st_size,
        targets=[
            FactorFacts(
                module=module,
                rank=pair.rank,
                scaling=adapter.scaling(module),
                lora_A=list(pair.A.shape),
                lora_B=list(pair.B.shape),
            )
            for module, pair in adapter.factors.items()
        ],
        saved=[tensor_facts(name, values) for name, values in adapter.saved.items()],
        tokens=[f"{name}: {len(rows.indices)}" for name, rows in adapter.rows.items()] or None,
        beside=_base_in_same_directory(path) if path.is_dir() else None,
        part_of=adapter.part_of,
    )


def _method(adapter: Adapter) -> str:
    """The adapter's method, and the initialization if it changed the base."""
    method = adapter.config.method
    if adapter.changes_base:
        return f"{method}, on a base that {adapter.config.init_lora_weights} changed"
    return method


def _base_in_same_directory(path: Path) -> str | None:
    from loradeploy.adapter.files.base_files import weight_files

    try:
        files = weight_files(path)
    except ModelError:
        return None
    return f"a base model ({files[0].name}), which is loaded without the adapter"


def inspect_native(path: Path) -> NativeAdapterFacts:
    """Describe an `.onnx_adapter` file.

    Raises:
        AdapterError: it is not an .onnx_adapter file.
    """
    from loradeploy.bundle.adapter_inputs.native import read_onnx_adapter

    arrays = read_onnx_adapter(path)
    return NativeAdapterFacts(
        bytes=path.stat().st_size,
        ranks=sorted({a.shape[-1] for name, a in arrays.items() if name.endswith(".lora_A")}),
        parameters=sum(values.size for values in arrays.values()),
        tensors=[tensor_facts(name, values) for name, values in sorted(arrays.items())],
    )


def inspect_tensors(path: Path) -> AdapterFacts | TensorFileFacts:
    """Describe a safetensors file; it is an adapter if its config is in the same directory.

    Raises:
        UsageError: it is not a safetensors file. AdapterError: the adapter is refused.
    """
    from loradeploy.adapter.files.formats import other_file
    from loradeploy.adapter.files.tensors import map_tensors
    from loradeploy.names import ADAPTER_CONFIG_NAME

    if (path.parent / ADAPTER_CONFIG_NAME).is_file():
        return inspect_adapter(path)
    tensors, metadata = map_tensors(path, error=UsageError)
    other = other_file(path)
    return TensorFileFacts(
        bytes=path.stat().st_size,
        note=f"it {other}" if other else None,
        metadata=[f"{name}={text}" for name, text in metadata.items()] or None,
        tensors=[tensor_facts(name, tensor) for name, tensor in sorted(tensors.items())],
    )
