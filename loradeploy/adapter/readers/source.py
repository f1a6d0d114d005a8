"""The input of a reader: the files of another library's adapter, and optionally its base model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.files.base_files import base_tensors
from loradeploy.adapter.files.tensors import read_arrays
from loradeploy.adapter.scaling import with_ranks
from loradeploy.errors import AdapterError, ModelError, UsageError, listed, listed_names, shown
from loradeploy.files import read_json
from loradeploy.names import MODEL_CONFIG_NAME

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Modules whose rows some libraries order for rotary positions: the config's name of their heads.
HEADS: Final = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


@dataclass(frozen=True)
class Base:
    """The base model's checkpoint in `directory`."""

    directory: Path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The contents of its config.json."""
        return read_json(self.directory / MODEL_CONFIG_NAME, error=ModelError, finite=False)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The modules that have a weight, by the names in the checkpoint."""
        return tuple(sorted(self.shapes))

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the weights in the checkpoint, by module."""
        tensors = base_tensors(self.directory).items()
        end = ".weight"
        return {name.removesuffix(end): t.shape for name, t in tensors if name.endswith(end)}


@dataclass(frozen=True, eq=False)
class Source:
    """An adapter of another library.

    `config`: the contents of the JSON file that describes it, or None. `chosen`: the name of the
    adapter to read if the file has several, or None. `base`: the base model, or None. `header`: the
    metadata in the header of the file. `asked`: the options that a reader has used, of `name`
    (`chosen`) and `model` (`base`).
    """

    file: Path
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any] | None
    chosen: str | None = None
    base: Base | None = None
    header: Mapping[str, str] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    _read: dict[str, NDArray[Any]] = field(default_factory=dict)

    def array(self, key: str) -> NDArray[Any]:
        """One tensor of the file, floating point and finite."""
        if not self._read:
            self._read.update(read_arrays(self.file, error=AdapterError)[0])
        values = self._read[key]
        if values.dtype.kind != "f":
            raise AdapterError(f"{key} is {values.dtype}, not floating point")
        return values

    def settings(self, what: str) -> Mapping[str, Any]:
        """The contents of the adapter's JSON file; the error says that it contains `what`."""
        if self.config is None:
            raise AdapterError(
                f"there is no adapter_config.json beside it, which has {what}: copy it from the"
                " directory of the original adapter"
            )
        return self.config

    def needs_base(self, why: str) -> Base:
        """The base model. Raises a UsageError with the reason `why` if it is not given."""
        self.asked.add("model")
        if self.base is None:
            raise UsageError(f"{self.file}: give its base as `model`: {why}")
        return self.base

    def choose(self, names: Iterable[str]) -> str:
        """The name of the adapter to read: the chosen one, or the only one in the file.

        Raises:
            UsageError: the file has several and none is chosen, or none with the chosen name.
        """
        self.asked.add("name")
        known = sorted(set(names))
        if self.chosen is None and len(known) == 1:
            return known[0]
        if self.chosen in known:
            return str(self.chosen)
        asked = f", and none is {self.chosen!r}" if self.chosen is not None else ""
        raise UsageError(
            f"{self.file} has {len(known)} adapters{asked}: give `name`, one of"
            f" {listed_names(known, 8)}"
        )


def number(values: Mapping[str, Any], name: str) -> float:
    """The number `name` of a config."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AdapterError(f"{name} in its config is {value!r}, expected a number")
    return value


def check_rank(module: str, B: NDArray[Any], stated: float) -> None:
    """Raise AdapterError if the rank of B [out, rank] is not the one `stated` in the config.

    s = α/r uses the stated rank; a config with a different rank is that of another adapter.
    """
    if B.shape[1:] != (stated,):
        raise AdapterError(
            f"{module}: its lora_B is {list(B.shape)}, [out, rank], its config states {stated:g}:"
            " give the config of this adapter"
        )


def halves(
    keys: Iterable[str], endings: Mapping[str, str]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The keys by module and half, and the other keys. `endings`: the half by ending of the key."""
    found: dict[str, dict[str, str]] = {}
    others = []
    for key in sorted(keys):
        ending = next((end for end in endings if key.endswith(end)), None)
        if ending is None:
            others.append(key)
        else:
            found.setdefault(key.removesuffix(ending), {})[endings[ending]] = key
    return found, others


def check_complete(modules: Mapping[str, Mapping[str, str]], others: Iterable[str]) -> None:
    """Raise AdapterError for a factor without its counterpart, and for `others`."""
    problems = [
        f"{module} only has {', '.join(halves)}"
        for module, halves in modules.items()
        if not {"A", "B"} <= set(halves)
    ]
    problems += [f"{key} is not part of a LoRA" for key in others]
    if problems:
        raise AdapterError(f"tensors are refused: {listed(problems)}")
    if not modules:
        raise AdapterError("the file has no LoRA factors")


def halves_first(values: NDArray[Any], base: Base, heads: str, name: str) -> NDArray[Any]:
    """`values` [out, …] with the rows 0 2 4 … 1 3 5 … of each head.

    `heads`: the name of their number in the config of `base`, as in `HEADS`.
    """
    count = base.config.get(heads, base.config.get("num_attention_heads"))
    if type(count) is not int or count < 1 or len(values) % (2 * count):
        raise ModelError(
            f"{base.directory}: {heads} is {shown(count)}, which does not divide the"
            f" {len(values)} rows of {name}"
        )
    pairs = values.reshape(count, -1, 2, *values.shape[1:])  # [heads, size / 2, 2, …]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def adapter_of(
    factors: Mapping[str, Factors],
    scalings: Mapping[str, float],
    *,
    dora: bool = False,
    task_type: str | None = None,
    base_name: object = None,
) -> Adapter:
    """The adapter with these factors and scalings s, by module name of the base."""
    ranks = {module: pair.rank for module, pair in factors.items()}
    plain = AdapterConfig(
        target_modules=tuple(sorted(factors)),
        use_dora=dora,
        task_type=task_type,
        base_model_name_or_path=base_name if isinstance(base_name, str) else None,
    )
    return Adapter(with_ranks(plain, ranks, scalings), dict(factors))
