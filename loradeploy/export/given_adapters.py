"""The adapters that come with an export: read, named, and held against the model before tracing."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loradeploy.adapter.adapter import Adapter, Kind
from loradeploy.adapter.peft import load_adapter
from loradeploy.adapter.settle import shape_problems
from loradeploy.adapter.targets import is_saved
from loradeploy.bundle.factors import check_fit, not_brought
from loradeploy.bundle.labels import label_parameters
from loradeploy.bundle.manifest import (
    BaseIdentity,
    LoraTarget,
    Manifest,
    OutputTarget,
    SavedTarget,
)
from loradeploy.bundle.names import (
    CLASSIFICATIONS,
    lora_a_name,
    lora_b_name,
    offset_name,
    scale_name,
)
from loradeploy.errors import (
    AdapterError,
    AdapterMismatchError,
    UsageError,
    listed,
    listed_names,
    shown,
)
from loradeploy.export.match.linears import is_head

if TYPE_CHECKING:
    import torch

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def read_adapters(
    adapters: Mapping[str, str | os.PathLike[str]] | Iterable[str | os.PathLike[str]] | None,
) -> dict[str, Adapter]:
    """Adapters by name, as `named_places` finds them.

    Raises:
        UsageError: as `named_places`.
        AdapterError: an adapter cannot be read or is refused.
    """
    return {name: load_adapter(place) for name, place in named_places(adapters).items()}


def named_places(
    adapters: Mapping[str, str | os.PathLike[str]] | Iterable[str | os.PathLike[str]] | None,
) -> dict[str, Path]:
    """Where adapters are, by name, of a mapping or of `[NAME=]DIR`; a directory names itself.

    Raises:
        UsageError: a name is used twice or cannot be the name of a file.
    """
    found: dict[str, Path] = {}
    for name, place in _named(adapters):
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"the adapter name {shown(name)} cannot be the name of a file: give letters,"
                " digits, '.', '_' or '-', as in --adapter NAME=DIR"
            )
        if name in found:
            raise UsageError(f"two adapters are named {shown(name)}: name them, --adapter NAME=DIR")
        found[name] = place
    return found


def label_count(adapters: Mapping[str, Adapter]) -> int | None:
    """The most labels that an adapter's head has; None where no adapter brings a head.

    Raises:
        UsageError: they differ, and a head with fewer has no bias (see bundle/labels.py).
    """
    counts: dict[str, int] = {}
    without_bias = []
    for name, adapter in adapters.items():
        for weight in label_parameters(adapter):
            counts[name] = adapter.saved[weight].shape[0]
            if weight.removesuffix("weight") + "bias" not in adapter.saved:
                without_bias.append(name)
    most = max(counts.values(), default=None)
    if any(counts[name] != most for name in without_bias):
        told = listed_names(f"{name} {count}" for name, count in counts.items())
        raise UsageError(
            f"the adapters' heads differ in their number of labels ({told}) and have no bias:"
            " export a bundle for each number"
        )
    return most


def label_names(adapters: Mapping[str, Adapter]) -> tuple[str, ...] | None:
    """The label names that all adapters that know theirs agree on."""
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
    """Hold every adapter against the shapes of `skeleton`, a model without values.

    Raises:
        AdapterMismatchError: an adapter does not fit; its name and every misfit are in the message.
    """
    shapes = {
        name: tuple(value.shape)
        for name, value in skeleton.named_parameters(remove_duplicate=False)
    }
    for name, adapter in adapters.items():
        if problems := shape_problems(adapter, shapes):
            raise AdapterMismatchError(
                f"{name}: the adapter does not fit this base: {listed(problems)}"
            )
        expected = _expected(skeleton, adapter, task=task, base=base, merge=merge)
        # What the base's own weights are is known once they are loaded.
        rows = {} if merge else adapter.rows
        check_named(name, dataclasses.replace(adapter, carried={}, rows=rows), expected)


def check_named(name: str, adapter: Adapter, manifest: Manifest) -> None:
    """`check_fit` with the adapter's name in the message: of a model that is no bundle yet."""
    try:
        check_fit(adapter, manifest, "this model")
    except AdapterError as problem:  # which a mismatch is too
        raise type(problem)(f"{name}: {problem}") from None


def check_brought(name: str, adapter: Adapter, lacking: Iterable[str]) -> None:
    """Raise AdapterMismatchError where `adapter` does not bring what its base lacks."""
    if problems := not_brought(adapter, lacking):
        raise AdapterMismatchError(f"{name}: {listed(problems, 1)}")


@dataclass(frozen=True)
class _Layer:
    kind: Kind
    into: int
    out: int


def _expected(
    skeleton: torch.nn.Module, adapter: Adapter, *, task: str, base: BaseIdentity, merge: bool
) -> Manifest:
    """A manifest with all that `adapter` could be fitted to, once the model is traced."""
    layers = adapted_layers(skeleton)
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    replaceable = {
        f"{module}.{part}"
        for module, layer in layers.items()
        for part in ("weight", "bias")
        if layer.kind == "linear"
        and (
            is_saved(f"{module}.{part}", adapter.config)
            or (task in CLASSIFICATIONS and is_head(module))
        )
    }
    biases = {
        name.removesuffix(".bias"): len(value)
        for name, value in parameters.items()
        if name.endswith(".bias")
    }
    sizes = {**{module: layer.out for module, layer in layers.items()}, **biases}
    return Manifest(
        task=task,
        mode="side-inputs",
        base=base,
        precision="fp32",
        opset=0,
        inputs=(),
        outputs=(),
        targets=tuple(
            LoraTarget(
                module=module,
                in_features=layer.into,
                out_features=layer.out,
                lora_A=lora_a_name(module),
                lora_B=lora_b_name(module),
                weight=f"{module}.weight",
                transposed=True,
                found_by="checkpoint",
                kind=layer.kind,
            )
            for module, layer in layers.items()
            if merge or layer.kind != "conv2d"
        ),
        saved=tuple(
            SavedTarget(name, name, tuple(value.shape), transposed=False)
            for name, value in parameters.items()
            if merge or name in replaceable
        ),
        changed=tuple(
            OutputTarget(
                module,
                size,
                scale=scale_name(module) if module in layers else None,
                offset=offset_name(module) if module in biases else None,
            )
            for module, size in sizes.items()
        ),
    )


def adapted_layers(model: torch.nn.Module) -> dict[str, _Layer]:
    """The kinds and sizes of the layers of `model` that take factors, by module."""
    from loradeploy.lora.kinds import kind_of

    layers = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None:
            (_, *into), (out, *_) = kind.shapes(module, rank=1)
            layers[name] = _Layer(kind.kind, math.prod(into), out)
    return layers


def _named(
    adapters: Mapping[str, str | os.PathLike[str]] | Iterable[str | os.PathLike[str]] | None,
) -> Iterable[tuple[str, Path]]:
    if adapters is None:
        return []
    if isinstance(adapters, Mapping):
        return [(name, Path(place)) for name, place in adapters.items()]
    if isinstance(adapters, str | os.PathLike):
        adapters = [adapters]
    named = []
    for entry in adapters:
        text = os.fspath(entry)
        name, equals, rest = text.partition("=")
        # A directory may hold '=' in its name; one that exists is taken as it is.
        if equals and not Path(text).exists():
            named.append((name, Path(rest)))
        else:
            named.append((Path(text).resolve().name, Path(text)))
    return named
