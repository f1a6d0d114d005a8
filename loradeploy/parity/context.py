"""The subject of a parity check: the bundle, the base model, the adapters, the inputs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loradeploy.adapter.adapter import Adapter
from loradeploy.adapter.files.digest import base_digest, short
from loradeploy.adapter.files.peft import load_adapter
from loradeploy.adapter.heads import label_parameters
from loradeploy.bundle.fitting.added_tokens import tokens_of
from loradeploy.bundle.fitting.fit import fit_to, fitted
from loradeploy.bundle.fitting.labels import check_label_names, output_count, with_all_labels
from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import NATIVE_SUFFIX
from loradeploy.errors import BundleError, ModelError, UsageError, prefixing_errors
from loradeploy.export.adapters.given import adapter_directories
from loradeploy.export.read.files.source import resolve
from loradeploy.files import inside
from loradeploy.lora.base.checkpoint import warn_of_unused_files
from loradeploy.lora.base.formats import check_unquantized
from loradeploy.names import MODEL_CONFIG_NAME
from loradeploy.parity.phases.run import Feeding
from loradeploy.parity.report.results import Variant
from loradeploy.parity.variants import DEFAULT, DEFAULTS, ON_CPU, Variants
from loradeploy.paths import resolved

if TYPE_CHECKING:
    from loradeploy.parity.inputs.tokens import Cases
    from loradeploy.runtime.devices.providers import Resolved

AdapterPlaces = Mapping[str, str | os.PathLike[str]] | Iterable[str | os.PathLike[str]]


@dataclass(frozen=True, eq=False)
class AdapterUnderTest:
    """An adapter to check, extended to all labels of the bundle.

    `digest`: the digest of the adapter at `path`. `widened`: whether `adapter` has more labels than
    the one at `path`. `native`: its .onnx_adapter file, if the bundle has one.
    """

    name: str
    path: Path
    adapter: Adapter
    digest: str
    native: Path | None = None
    widened: bool = False


@dataclass(frozen=True, eq=False)
class CheckContext:
    """Everything that the backends need. `scratch` is a directory for temporary files.

    `variants`: all variants in which onnxruntime runs the graphs; `variant` is the current one, and
    `providers` are the providers to open its sessions with. `phases`: None means all.
    `crashed`: how a trial process ended, by provider; only those that crashed.
    `genai_python`: the interpreter that has onnxruntime-genai.
    `weights`: the directory of the graph's weights, if it is not the bundle.
    """

    bundle: Path
    manifest: Manifest
    model: Path
    adapters: tuple[AdapterUnderTest, ...]
    cases: Cases
    scratch: Path
    providers: Sequence[Resolved] = tuple(ON_CPU)
    variants: Variants = DEFAULTS
    variant: Variant = DEFAULT
    phases: tuple[str, ...] | None = None
    crashed: Mapping[str, str] = field(default_factory=dict)
    genai_python: Path | None = None
    weights: Path | None = None

    def at(self, variant: Variant) -> CheckContext:
        """Return a copy whose current variant is `variant`."""
        return dataclasses.replace(
            self, variant=variant, providers=self.variants.chains[variant.provider]
        )

    @property
    def captured(self) -> bool:
        """Whether the runs of the current variant are captured."""
        return self.variant.provider in self.variants.captured

    @property
    def operator(self) -> Path | None:
        """The operators' library, if the current variant uses it and the graph has calls."""
        used = self.variant.provider in self.variants.operated and self.manifest.operators
        return self.variants.operator if used else None

    @property
    def merged(self) -> bool:
        """Whether the manifest says that one adapter is merged into the graph."""
        return self.manifest.mode == "merged"

    @property
    def tokens(self) -> Mapping[str | None, int]:
        """Vocabulary sizes of the base (None) and of each adapter; empty if the graph adds none."""
        added = self.manifest.added_tokens
        if added is None:
            return {}
        known: dict[str | None, int] = {
            a.name: tokens_of(a.adapter, self.manifest) or added.base for a in self.adapters
        }
        return {None: added.base, **known}

    def feeding(self, *, batched: bool = True) -> Feeding:
        """Return how a backend is fed; `batched`: whether it takes more than one row."""
        cases = self.cases
        return Feeding(self.manifest.task, cases.pad, cases.left, cases.alike, batched)

    def outputs_of(self, adapter: str | None) -> int | None:
        """Return how many of the graph's outputs, the first ones, are the adapter's; None: all."""
        added = self.manifest.added_tokens
        if added is not None and added.output is not None:
            return self.tokens[adapter]
        for tested in self.adapters:
            if tested.name == adapter and tested.widened and tested.adapter.labels:
                return len(tested.adapter.labels)
        return None


def find_model(bundle: Path, manifest: Manifest, model: str | os.PathLike[str] | None) -> Path:
    """Return the directory of the base model; its weights are not read.

    By default, the model that the manifest names is searched for in the working directory and
    beside the bundle.

    Raises:
        UsageError: no model is given and none is found, or an ONNX file is given.
        ModelError: the model is missing or quantized.
    """
    if model is None:
        name = manifest.base.name
        candidates = [path / name for path in (Path(), resolved(bundle).parent)]
        found = [path for path in candidates if (path / MODEL_CONFIG_NAME).is_file()]
        if not found:
            raise UsageError(
                f"the reference is the PyTorch model: give it as `model`; {bundle} was made from"
                f" {name}, which is neither here nor beside the bundle"
            )
        model = found[0]
    source = resolve(model)
    if source.kind != "checkpoint":
        raise UsageError(
            f"{model} is an ONNX model: the reference is the PyTorch model, give its directory"
        )
    check_unquantized(source.directory, names=[source.name])
    warn_of_unused_files(source.directory, "the reference's base is without it")
    return source.directory


def digest_of_base(bundle: Path, manifest: Manifest, model: Path) -> str:
    """Return the digest of the weights of `model`, which is the bundle's base.

    Raises:
        ModelError: it is not the base that the bundle was made from.
    """
    digest = base_digest(model)
    base = manifest.base
    if base.kind == "checkpoint" and base.digest not in (None, digest):
        raise ModelError(
            f"{model} is not the base of {bundle}: its digest is {short(digest)}, the bundle was"
            f" made from {base.name} with {short(base.digest)}"
        )
    return digest


def find_adapters(
    bundle: Path, manifest: Manifest, adapters: AdapterPlaces | None
) -> tuple[AdapterUnderTest, ...]:
    """Return the adapters to check: those in the bundle, then those in `adapters`.

    Raises:
        UsageError: two adapters have the same name, or a merged bundle has not exactly one.
        BundleError: an adapter in the bundle is not the one that was exported.
        AdapterError: an adapter cannot be read, or (AdapterMismatchError) does not fit the bundle.
    """

    def under_test(
        name: str, path: Path, adapter: Adapter, native: Path | None
    ) -> AdapterUnderTest:
        own = adapter if manifest.added_tokens is None else fitted(adapter, manifest)
        wide = with_all_labels(own, _head_shapes(own, manifest))
        if wide is own:
            with prefixing_errors(name):
                check_label_names(own, manifest, {})
        return AdapterUnderTest(name, path, wide, adapter.digest, native, wide is not own)

    found: dict[str, AdapterUnderTest] = {}
    for name, entry in manifest.adapters.items():
        if entry.path is None:
            raise BundleError(f"{bundle}: its manifest gives no path for the adapter {name!r}")
        path = inside(bundle, entry.path)
        adapter = load_adapter(path)
        if adapter.digest != entry.digest:
            raise BundleError(
                f"{path} is not the adapter that came with the bundle: its digest has changed;"
                " export again"
            )
        native = path.with_name(f"{name}{NATIVE_SUFFIX}")
        found[name] = under_test(name, path, adapter, native if native.is_file() else None)
    for name, path in adapter_directories(adapters).items():
        adapter = fitted(load_adapter(path), manifest)
        if name in found and found[name].digest != adapter.digest:
            raise UsageError(
                f'two adapters are named {name!r}: give them other names, `adapters=["NAME=DIR"]`'
            )
        beside = found[name].native if name in found else None
        # The adapter may also be in the bundle; PEFT then reads the files given here.
        found[name] = under_test(name, path, adapter, beside)
    if manifest.mode == "merged" and len(found) != 1:
        raise UsageError(
            f"{bundle} is merged: give the one adapter that its graph is meant to hold,"
            f' `adapters=["DIR"]`; {len(found)} are given'
        )
    if manifest.mode == "side-inputs":
        for tested in found.values():
            with prefixing_errors(tested.name):
                fit_to(tested.adapter, manifest)
    return tuple(found.values())


def _head_shapes(adapter: Adapter, manifest: Manifest) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the graph's head; a merged graph's are known by its output size."""
    outputs = output_count(manifest, {})
    if manifest.mode != "merged" or not outputs:
        return manifest.saved_shapes()
    return {name: (outputs, *adapter.saved[name].shape[1:]) for name in label_parameters(adapter)}
