"""Describe a bundle: the form of its graph, its adapters, and the state of its certificate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loradeploy.bundle.names import CERTIFICATE_NAME, GRAPH_DATA_NAME, GRAPH_NAME, SIGNATURE_NAME
from loradeploy.errors import AdapterError, BundleError
from loradeploy.inspection.facts import IF_KNOWN, INLINE, KEY, TensorFacts, spec_facts

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import AdapterEntry, Manifest
    from loradeploy.bundle.targets import LoraTarget, OutputTarget


@dataclass(frozen=True, kw_only=True)
class CertifiedAdapterFacts:
    """The result of the last parity check for one adapter."""

    name: str
    digest: str
    effect: float | None
    largest_error: float | None


@dataclass(frozen=True, kw_only=True)
class CertificateFacts:
    """The verdict of the certificate: passed, failed, stale, unreadable or unchecked, and why.

    The other fields are None without a readable certificate.
    """

    parity: str
    parity_note: str | None
    parity_created: str | None = field(default=None, metadata=IF_KNOWN)
    parity_versions: list[str] | None = field(default=None, metadata=IF_KNOWN)
    parity_hardware: list[str] | None = field(default=None, metadata=IF_KNOWN)
    parity_checked: list[str] | None = field(default=None, metadata=IF_KNOWN)
    parity_signed: bool | None = field(default=None, metadata=IF_KNOWN)
    parity_adapters: list[CertifiedAdapterFacts] | None = field(default=None, metadata=IF_KNOWN)


@dataclass(frozen=True, kw_only=True)
class TargetFacts:
    """A module that takes factors. `found_by`: the evidence that identified it."""

    module: str
    in_features: int = field(metadata={KEY: "in"})
    out_features: int = field(metadata={KEY: "out"})
    found_by: str


@dataclass(frozen=True, kw_only=True)
class ChangedOutputFacts:
    """A module whose output takes a scale (DoRA) or an offset (a trained bias)."""

    module: str
    size: int
    scale: bool
    offset: bool


@dataclass(frozen=True, kw_only=True)
class SavedFacts:
    """A parameter that adapters can replace."""

    parameter: str
    shape: list[int]


@dataclass(frozen=True, kw_only=True)
class BundledAdapterFacts:
    """An adapter of the bundle. `files`: whether its files changed since the export.

    `part_of`: the digest of the complete adapter, if it also changes another bundle of the model.
    """

    name: str
    digest: str
    files: str
    part_of: str | None = field(default=None, metadata=IF_KNOWN)
    problem_type: str | None = field(default=None, metadata=IF_KNOWN)


@dataclass(frozen=True, kw_only=True)
class BundleFacts:
    """A bundle. `graph`: whether its files changed since the export.

    `merged_part_of`: as `BundledAdapterFacts.part_of`, for the merged adapter. `image_inputs`: the
    optional inputs with which a decoder reads images.
    """

    kind: str = "bundle"
    task: str
    problem_type: str | None = field(default=None, metadata=IF_KNOWN)
    mode: str
    base_model: str | None
    base_digest: str | None
    base_kind: str
    precision: str
    opset: int
    factor_dtype: str | None
    layout: str | None
    branches: bool | None
    operators: list[str]
    side_inputs: list[str] | None
    attention: str | None
    cache_in_place: bool
    logits_to_keep: bool
    padding: str | None
    quantized_embedding: str | None = field(default=None, metadata=IF_KNOWN)
    added_tokens: str | None = field(default=None, metadata=IF_KNOWN)
    image_inputs: list[str] | None = field(default=None, metadata=IF_KNOWN)
    required_inputs: bool
    static_shapes: list[str]
    target: str | None
    merged_adapter: str | None
    merged_part_of: str | None = field(default=None, metadata=IF_KNOWN)
    merge_error: Any
    graph_digest: str | None
    graph: str
    certificate: CertificateFacts = field(metadata=INLINE)
    bytes: int
    graph_bytes: int
    inputs: list[TensorFacts]
    outputs: list[TensorFacts]
    targets: list[TargetFacts]
    changed: list[ChangedOutputFacts]
    saved: list[SavedFacts]
    adapters: list[BundledAdapterFacts]


def inspect_bundle(path: Path) -> BundleFacts:
    """Describe a bundle; reads every file that its certificate covers.

    Raises:
        BundleError: its manifest cannot be read.
    """
    from loradeploy.bundle.graph_form import LORA, form_of
    from loradeploy.bundle.manifest import read_manifest
    from loradeploy.bundle.proof.certificate import covered, digests
    from loradeploy.files import json_values

    manifest = read_manifest(path)
    form = form_of(manifest)
    merged, added = manifest.merged_adapter, manifest.added_tokens
    files = {name: path / name for name in (GRAPH_NAME, GRAPH_DATA_NAME)}
    actual = digests(path, covered(path, manifest))
    exported = {GRAPH_NAME: manifest.graph_digest, GRAPH_DATA_NAME: manifest.data_digest}
    changed = [n for n, digest in exported.items() if digest not in (None, actual.get(n))]
    return BundleFacts(
        task=manifest.task,
        problem_type=manifest.problem_type,
        mode=manifest.mode,
        base_model=manifest.base.name,
        base_digest=manifest.base.digest,
        base_kind=manifest.base.kind,
        precision=form.precision,
        opset=manifest.opset,
        factor_dtype=None if merged else manifest.factor_dtype,
        layout=form.layout,
        branches=form.branches,
        operators=list(manifest.operators),
        side_inputs=None if merged else [LORA, *sorted(form.side_inputs)],
        attention=form.attention,
        cache_in_place=manifest.cache_in_place,
        logits_to_keep=form.logits_to_keep,
        padding=manifest.padding,
        quantized_embedding=manifest.quantized_embedding,
        added_tokens=None if added is None else f"{added.count} after the base's {added.base}",
        image_inputs=[spec.name for spec in manifest.embeds] or None,
        required_inputs=form.required_inputs,
        static_shapes=[f"{name}={size}" for name, size in form.static_shapes.items()],
        target=form.target,
        merged_adapter=None if merged is None else merged.digest,
        merged_part_of=None if merged is None else _part_of(merged),
        merge_error=json_values(manifest.merge_error),
        graph_digest=manifest.graph_digest,
        graph=f"changed since the export: {', '.join(changed)}" if changed else "as exported",
        certificate=_certificate(path, manifest, actual),
        bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        graph_bytes=sum(file.stat().st_size for file in files.values() if file.is_file()),
        inputs=[spec_facts(s.name, s.dtype, s.shape) for s in manifest.inputs],
        outputs=[spec_facts(s.name, s.dtype, s.shape) for s in manifest.outputs],
        targets=[_target(target) for target in manifest.targets],
        changed=[_changed_output(output) for output in manifest.changed],
        saved=[SavedFacts(parameter=s.parameter, shape=list(s.shape)) for s in manifest.saved],
        adapters=[_adapter(path, name, entry) for name, entry in manifest.adapters.items()],
    )


def _target(target: LoraTarget) -> TargetFacts:
    return TargetFacts(
        module=target.module,
        in_features=target.in_features,
        out_features=target.out_features,
        found_by=target.found_by,
    )


def _changed_output(output: OutputTarget) -> ChangedOutputFacts:
    return ChangedOutputFacts(
        module=output.module,
        size=output.size,
        scale=bool(output.scale),
        offset=bool(output.offset),
    )


def _adapter(bundle: Path, name: str, entry: AdapterEntry) -> BundledAdapterFacts:
    return BundledAdapterFacts(
        name=name,
        digest=entry.digest,
        files=_files(bundle, entry.path, entry.digest),
        part_of=_part_of(entry),
        problem_type=entry.problem_type,
    )


def _part_of(entry: AdapterEntry) -> str | None:
    """The digest of the complete adapter, if another bundle has a part of it."""
    return entry.whole_digest if entry.split else None


def _files(bundle: Path, path: str | None, digest: str) -> str:
    """Whether an adapter of the bundle changed since the export."""
    from loradeploy.adapter import load_adapter
    from loradeploy.files import inside

    if path is None:
        return "none"
    try:
        actual = load_adapter(inside(bundle, path)).digest
    except (AdapterError, BundleError) as problem:
        return str(problem)
    return "as exported" if actual == digest else f"changed since the export: {actual}"


def _certificate(path: Path, manifest: Manifest, actual: Mapping[str, str]) -> CertificateFacts:
    """The verdict of the last check, and whether files changed since."""
    from loradeploy.bundle.proof.certificate import fault, parity_command, read_certificate

    if not (path / CERTIFICATE_NAME).is_file():
        return CertificateFacts(parity="unchecked", parity_note=f"run {parity_command(path)}")
    try:
        certificate = read_certificate(path)
    except BundleError as problem:
        return CertificateFacts(parity="unreadable", parity_note=str(problem))
    stale = fault(certificate, manifest, actual, verdict=False)
    verdict = "passed" if certificate.passed else "failed"
    note = None if certificate.passed else certificate.failures[0]
    if stale is not None:
        verdict, note = "stale", f"{stale}: run {parity_command(path)} again"
    coverage = certificate.coverage
    return CertificateFacts(
        parity=verdict,
        parity_note=note,
        parity_created=certificate.created,
        parity_versions=[f"{name} {version}" for name, version in certificate.versions.items()],
        parity_hardware=[
            *(f"{name} {value}" for name, value in certificate.platform.items()),
            *(f"{checked.provider}: {checked}" for checked in certificate.providers),
        ],
        parity_checked=[
            f"{coverage.prompts} prompts",
            f"{coverage.prompt_tokens} prompt tokens",
            f"{coverage.generated} tokens generated per prompt",
            *sorted(coverage.phases),
        ],
        parity_signed=(path / SIGNATURE_NAME).is_file(),
        parity_adapters=[
            CertifiedAdapterFacts(
                name=adapter.name,
                digest=adapter.digest,
                effect=adapter.effect,
                largest_error=adapter.error,
            )
            for adapter in certificate.adapters
        ],
    )
