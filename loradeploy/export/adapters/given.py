"""Find and read the adapters of an export, and check that they fit before the model is traced."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loradeploy.adapter.adapter import Adapter
from loradeploy.adapter.files.formats import other_directory
from loradeploy.adapter.files.named import named_directory
from loradeploy.adapter.files.peft import WEIGHTS_NAME, load_adapter
from loradeploy.adapter.fitting.fit import AdaptableBase, Layer, check_fit, missing_parameters
from loradeploy.adapter.fitting.settle import without_idle
from loradeploy.adapter.heads import check_declared, label_parameters
from loradeploy.adapter.modules.targets import is_saved
from loradeploy.adapter.tasks import HEADED
from loradeploy.bundle.fitting.labels import with_all_labels
from loradeploy.bundle.manifest import BaseIdentity, Manifest, read_manifest
from loradeploy.bundle.names import MANIFEST_NAME
from loradeploy.errors import (
    AdapterError,
    AdapterMismatchError,
    BundleError,
    UsageError,
    listed,
    listed_names,
    prefixing_errors,
    shown,
)
from loradeploy.export.match.linears import is_head
from loradeploy.files import inside
from loradeploy.names import ADAPTER_CONFIG_NAME
from loradeploy.paths import expanded, resolved
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import torch

logger = logger_of(__name__)

_NO_CONVOLUTION: Final = "is a convolution, which takes no side inputs: merge it instead"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def read_adapters(
    adapters: Mapping[str, str | os.PathLike[str]] | Iterable[str | os.PathLike[str]] | None,
) -> dict[str, Adapter]:
    """Load the adapters that `adapter_directories` finds, by name.

    Raises:
        UsageError: as `adapter_directories`.
        AdapterError: an adapter cannot be read or is refused.
    """
    return {
        name: load_adapter(directory) for name, directory in adapter_directories(adapters).items()
    }


def adapter_directories(
    adapters: Mapping[str, str | os.PathLike[str]] | Iterable[str | os.PathLike[str]] | None,
) -> dict[str, Path]:
    """Return the adapters' directories by name, from a mapping or a list of `[NAME=]DIR`.

    Without NAME, the name is that of the directory.

    Raises:
        UsageError: a name is used twice or cannot be the name of a file.
    """
    found: dict[str, Path] = {}
    for name, directory in _named(adapters):
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"the adapter name {shown(name)} cannot be the name of a file: give letters,"
                " digits, '.', '_' or '-', as in `adapters=['NAME=DIR']`"
            )
        if name in found:
            raise UsageError(
                f"two adapters are named {shown(name)}: name them, `adapters=['NAME=DIR']`"
            )
        found[name] = directory
    return found


def resolve_bundle_adapters(
    directories: Mapping[str, Path], model: str | os.PathLike[str]
) -> dict[str, Path]:
    """`directories`, with names of adapters of the bundle `model` replaced by their directories.

    A path is taken as a name if it does not exist, or is a directory without an adapter, such as
    the bundle of an earlier export.

    Raises:
        BundleError: the manifest is invalid, or an adapter's digest is not the manifest's.
        AdapterError: a path is neither of the two, or an adapter of the bundle cannot be read.
    """
    bundle = expanded(model)
    missing = {name: path for name, path in directories.items() if not _may_be_adapter(path)}
    if not missing or not (bundle / MANIFEST_NAME).is_file():
        return dict(directories)
    entries = read_manifest(bundle).adapters
    found = dict(directories)
    for name, path in missing.items():
        entry = entries.get(os.fspath(path))
        if entry is None and not path.exists():
            raise AdapterError(
                f"{path} is neither an adapter of {bundle}, which has {listed_names(entries)},"
                " nor a directory"
            )
        if entry is None or entry.path is None:
            continue
        found[name] = inside(bundle, entry.path)
        if load_adapter(found[name]).digest != entry.digest:
            raise BundleError(
                f"{found[name]} is not the adapter that came with the bundle, its digest has"
                " changed: give the adapter's own directory"
            )
    return found


def warn_of_omitted(
    directories: Mapping[str, Path], bundle: Path, manifest: Manifest, output: Path
) -> None:
    """Warn of the bundle's adapters that are not among `directories`, those of the new bundle."""
    given = {resolved(path) for path in directories.values()}
    omitted = sorted(
        name
        for name, entry in manifest.adapters.items()
        if name not in directories
        and (entry.path is None or resolved(inside(bundle, entry.path)) not in given)
    )
    if omitted:
        logger.warning(
            "adapters of %s that are not in %s: %s; to keep one, give its name as an adapter too"
            " (--adapter NAME)",
            bundle,
            output,
            listed_names(omitted),
        )


def label_count(adapters: Mapping[str, Adapter]) -> int | None:
    """The largest number of labels of the adapters' heads; None if no adapter has a head.

    Raises:
        UsageError: a head has fewer labels and no bias to fill it up (bundle/fitting/labels.py).
        AdapterError: an adapter's files do not declare its labels or problem type.
    """
    counts: dict[str, int] = {}
    without_bias = []
    for name, adapter in adapters.items():
        with prefixing_errors(name):
            check_declared(adapter)
        for weight in label_parameters(adapter):
            counts[name] = adapter.saved[weight].shape[0]
            if weight.removesuffix("weight") + "bias" not in adapter.saved:
                without_bias.append(name)
    most = max(counts.values(), default=None)
    if any(counts[name] != most for name in without_bias):
        counted = listed_names(f"{name} {count}" for name, count in counts.items())
        raise UsageError(
            f"the adapters' heads differ in their number of labels ({counted}) and have no bias:"
            " export a bundle for each number"
        )
    return most


def label_names(adapters: Mapping[str, Adapter]) -> tuple[str, ...] | None:
    """The label names, if all adapters that have label names agree; else None."""
    known = {adapter.labels for adapter in adapters.values() if adapter.labels is not None}
    return known.pop() if len(known) == 1 else None


def check_adapters(
    skeleton: torch.nn.Module,
    adapters: Mapping[str, Adapter],
    *,
    task: str,
    base: BaseIdentity,
    merge: bool,
) -> None:
    """Check that every adapter fits `skeleton`, a model on the meta device.

    Raises:
        AdapterMismatchError: an adapter does not fit; the message has its name and all mismatches.
    """
    from loradeploy.lora.fit import adaptable

    model = dataclasses.replace(adaptable(skeleton), digest=base.digest, model=base.name)
    modules = {name for name, layer in model.layers.items() if merge or layer.kind != "conv2d"}
    for name, given in adapters.items():
        expected, adapter = model, without_idle(given, modules)
        if not merge:
            expected = _beside(model, adapter, task)
            adapter = with_all_labels(adapter, expected.parameters)
        with prefixing_errors(name):
            check_fit(adapter, expected)


def check_brought(name: str, adapter: Adapter, lacking: Iterable[str]) -> None:
    """Raise AdapterMismatchError unless `adapter` has the parameters `lacking` of its base."""
    if problems := missing_parameters(adapter, lacking):
        raise AdapterMismatchError(f"{name}: {listed(problems, 1)}")


def _may_be_adapter(path: Path) -> bool:
    """Whether `path` is a file, or a directory with an adapter of any format."""
    if path.is_dir():
        known = (path / ADAPTER_CONFIG_NAME).exists() or (path / WEIGHTS_NAME).exists()
        return known or (not (path / MANIFEST_NAME).exists() and other_directory(path) is not None)
    return path.exists()


def _beside(model: AdaptableBase, adapter: Adapter, task: str) -> AdaptableBase:
    """The layers and parameters of `model` that side inputs of its traced graph can adapt."""
    # Experts that the graph does not compute in one product are refused after tracing.
    no_convolution = Layer("conv2d", (), 0, refusal=lambda rank, whole: _NO_CONVOLUTION)
    replaceable = {
        f"{module}.{part}"
        for module, layer in model.layers.items()
        for part in ("weight", "bias")
        if layer.kind == "linear"
        and (is_saved(f"{module}.{part}", adapter.config) or (task in HEADED and is_head(module)))
    }
    shapes = model.parameters
    return dataclasses.replace(
        model,
        layers={
            module: no_convolution if layer.kind == "conv2d" else layer
            for module, layer in model.layers.items()
        },
        parameters={name: shapes[name] for name in shapes if name in replaceable},
        biases={name: shapes[name][0] for name in shapes if name.endswith(".bias")},
        side_inputs=True,
    )


def _named(
    adapters: Mapping[str, str | os.PathLike[str]] | Iterable[str | os.PathLike[str]] | None,
) -> Iterable[tuple[str, Path]]:
    if adapters is None:
        return []
    if isinstance(adapters, Mapping):
        return [(name, Path(directory)) for name, directory in adapters.items()]
    if isinstance(adapters, str | os.PathLike):
        adapters = [adapters]
    return [named_directory(os.fspath(entry)) for entry in adapters]
