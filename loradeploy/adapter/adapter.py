"""An adapter as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.files.digest import tensors_digest
from loradeploy.adapter.scaling import scaling
from loradeploy.errors import AdapterError, listed

if TYPE_CHECKING:
    from numpy.typing import NDArray


Kind = Literal["linear", "embedding", "conv2d", "experts"]

# Names of the factors of each kind in the digest.
_HALVES: Final[Mapping[str, tuple[str, str]]] = {
    "linear": ("lora_A", "lora_B"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
    "conv2d": ("lora_A", "lora_B"),
    "experts": ("lora_A", "lora_B"),
}


@dataclass(frozen=True, eq=False)
class Factors:
    """The two low-rank matrices of one target module: ΔW = s · B A, Δb = s · `bias`.

    linear      `A` [rank, in], `B` [out, rank]
    embedding   `A` [rank, vocabulary], `B` [size, rank]
    conv2d      `A` [rank, in, height, width], `B` [out, rank / groups, 1, 1]
    experts     `A` [rank · experts, in], `B` [out, rank · experts]; the axis of rank · experts is
                ordered by rank, then by expert, and ΔW of an expert uses its own entries

    `experts`: the number of experts of the parameter; 1 for other kinds. `magnitude`: DoRA's m
    [out] (of an embedding [size]), None without DoRA. `bias`: the bias [out] of B of a
    linear layer or a convolution, None without `lora_bias`. All arrays have a floating-point dtype.
    """

    A: NDArray[Any]
    B: NDArray[Any]
    magnitude: NDArray[Any] | None = None
    kind: Kind = "linear"
    experts: int = 1
    bias: NDArray[Any] | None = None

    @property
    def rank(self) -> int:
        return int(self.A.shape[0]) // self.experts

    @property
    def has_update(self) -> bool:
        """Whether neither factor is all zeros. Untrained factors have one that is."""
        return bool(self.A.any() and self.B.any())

    @property
    def has_effect(self) -> bool:
        """Whether they can change the base's outputs: by an update, a bias, DoRA's magnitude."""
        shifts = self.bias is not None and bool(self.bias.any())
        return self.magnitude is not None or shifts or self.has_update

    @property
    def groups(self) -> int:
        """The number of groups of a convolution; 1 for other kinds."""
        return int(self.A.shape[0]) // int(self.B.shape[1])

    @property
    def parameter_count(self) -> int:
        """The number of values in the factors."""
        vectors = (self.magnitude, self.bias)
        return self.A.size + self.B.size + sum(v.size for v in vectors if v is not None)


@dataclass(frozen=True, eq=False)
class Rows:
    """Individually trained rows of a weight (trainable tokens): W[`indices`] ← `values`.

    `values` [tokens, size]; `indices` are all different.
    """

    indices: tuple[int, ...]
    values: NDArray[Any]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A trained adapter.

    `factors`: the low-rank factors by target module, with the base model's module names.
    `saved`: fully trained parameters by the base's names (`classifier.weight` [out, in], …): those
    of modules_to_save and the trained biases. Other modules that are tied to one of these weights
    keep the base's.
    `carried`: weights of the base model that the adapter's file includes, by the base's names
    (embeddings that LoRA adapts, or with a resized vocabulary). If they differ from the base's,
    they replace them in every module that shares the weight, before the factors are applied.
    `rows`: individually trained rows of the base's weights, by parameter. They, too, replace the
    base's rows in every module that shares the weight.
    `base_digest`: digest of the base model it was trained on, if known
    (`adapter.files.digest.base_digest`).
    `labels`: label names of a classifier in the order of its outputs, if known.
    `problem_type`: the problem type of a sequence classifier (one of `heads.PROBLEM_TYPES`), if
    known; `heads.UNDECLARED` for any classifier whose files do not declare what its outputs mean.
    `base_class`: the class of the model that PEFT wrapped, if its config names it.
    `part_of`: digest of the complete adapter, if this is its part for one bundle of a model that is
    exported as several bundles, and the omitted tensors change another bundle (`fitting.parts`).

    Raises:
        AdapterError: the adapter is empty, or the shape of a factor contradicts its rank.
    """

    config: AdapterConfig
    factors: Mapping[str, Factors]
    saved: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    base_digest: str | None = None
    labels: tuple[str, ...] | None = None
    carried: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    problem_type: str | None = None
    base_class: str | None = None
    part_of: str | None = None

    def __post_init__(self) -> None:
        if not (self.factors or self.saved or self.carried or self.rows):
            raise AdapterError("the adapter has no tensors: nothing was trained")
        problems = [
            f"{module}: {problem}"
            for module, pair in self.factors.items()
            for problem in _mismatches(
                pair,
                self.config.rank_of(module) * pair.experts,
                self.config.use_dora and pair.kind != "experts",
                self.config.lora_bias,
            )
        ]
        if problems:
            raise AdapterError(f"adapter tensors do not fit the config: {listed(problems)}")

    @property
    def is_untrained(self) -> bool:
        """Whether it cannot change any output: it only has factors, and all updates are zero."""
        others = self.saved or self.carried or self.rows
        return not others and not any(pair.has_effect for pair in self.factors.values())

    @property
    def modules(self) -> tuple[str, ...]:
        """The target modules, in name order."""
        return tuple(sorted(self.factors))

    @property
    def parameter_count(self) -> int:
        """The number of trained values."""
        low_rank = sum(pair.parameter_count for pair in self.factors.values())
        rows = sum(rows.values.size for rows in self.rows.values())
        return low_rank + rows + sum(values.size for values in self.saved.values())

    @property
    def changes_base(self) -> bool:
        """Whether the factors apply to a base that the initialization changed (PiSSA, OLoRA)."""
        return self.config.changes_base and bool(self.factors)

    def check_plain(self) -> None:
        """Raise AdapterError if the factors apply to a base that the initialization changed."""
        if self.changes_base:
            raise AdapterError(
                f"the adapter was trained with init_lora_weights {self.config.init_lora_weights!r},"
                " which changes the base weights: convert it to standard LoRA first, with"
                " loradeploy convert ADAPTER --model BASE --output DIR"
            )

    def scaling(self, module: str) -> float:
        """s for `module`, as in `loradeploy.adapter.scaling`."""
        return scaling(self.config, module)

    @property
    def whole_digest(self) -> str:
        """The digest of the complete adapter: `part_of` if this is a part of one, else `digest`."""
        return self.part_of or self.digest

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the tensors (as float32) and the scalings.

        Adapters with equal factors and scalings have the same digest, regardless of the dtype they
        are stored in and of how their configs express the scaling.
        """
        tensors = {f"saved:{name}": values for name, values in self.saved.items()}
        tensors.update({f"carried:{name}": values for name, values in self.carried.items()})
        numbers = {module: self.scaling(module) for module in self.factors}
        for module, pair in self.factors.items():
            half_A, half_B = _HALVES[pair.kind]
            tensors[f"{module}.{half_A}"] = pair.A
            tensors[f"{module}.{half_B}"] = pair.B
            if pair.magnitude is not None:
                tensors[f"{module}.lora_magnitude_vector"] = pair.magnitude
            if pair.bias is not None:
                tensors[f"{module}.lora_B.bias"] = pair.bias
        for name, rows in self.rows.items():
            tensors[f"rows:{name}{list(rows.indices)}"] = rows.values
        if self.changes_base:
            numbers[f"init_lora_weights={self.config.init_lora_weights}"] = 1.0
        if self.problem_type is not None:
            numbers[f"problem_type={self.problem_type}"] = 1.0
        return tensors_digest(tensors, numbers)


def _mismatches(pair: Factors, rank: int, dora: bool, biased: bool) -> list[str]:
    """Messages for contradictions between `pair` and the config's rank (times experts) and method.

    `biased`: the config's `lora_bias`.
    """
    A, B = pair.A.shape, pair.B.shape
    if pair.kind == "conv2d":
        shaped = len(A) == 4 and len(B) == 4 and B[2:] == (1, 1)
        ranked = shaped and A[0] == rank and 0 < B[1] <= rank and rank % B[1] == 0
    else:
        shaped = len(A) == 2 and len(B) == 2
        ranked = shaped and A[0] == rank and B[1] == rank
    if 1 in (len(A), len(B)):
        problem = (
            f"lora_A {list(A)} and lora_B {list(B)} are not matrices: FSDP and DeepSpeed save parts"
            " of flattened tensors if they do not gather them; save the adapter again, gathered"
        )
        return [problem]
    if not shaped:
        problem = (
            f"lora_A {list(A)} and lora_B {list(B)} are not factors of a linear layer, of an"
            " embedding, or of a two-dimensional convolution"
        )
        return [problem]
    if not ranked:
        return [f"lora_A is {list(A)} and lora_B {list(B)}, the config has rank {rank}"]
    if dora != (pair.magnitude is not None):
        return [
            f"use_dora is {dora}, and the file has {'no' if dora else 'a'} lora_magnitude_vector"
        ]
    if pair.magnitude is not None and pair.magnitude.shape != B[:1]:
        return [f"lora_magnitude_vector has {pair.magnitude.size} values, lora_B is {list(B)}"]
    if biased and pair.kind not in ("linear", "conv2d"):
        return [f"lora_bias is true, which PEFT does not support for factors of {pair.kind}"]
    if biased != (pair.bias is not None):
        has = "no" if biased else "a"
        return [f"lora_bias is {str(biased).lower()}, and the file has {has} lora_B.bias"]
    if pair.bias is not None and pair.bias.shape != B[:1]:
        return [f"lora_B.bias is {list(pair.bias.shape)}, lora_B is {list(B)}"]
    return []
