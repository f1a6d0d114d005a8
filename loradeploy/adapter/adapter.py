"""An adapter as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.digest import tensors_digest
from loradeploy.adapter.scaling import scaling
from loradeploy.errors import AdapterError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Factors:
    """The two low-rank matrices of one target module: ΔW = s · B A.

    `A` is [rank, in], `B` is [out, rank], both floating point of any width.
    """

    A: NDArray[Any]
    B: NDArray[Any]

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])


@dataclass(frozen=True, eq=False)
class Adapter:
    """A trained adapter.

    `factors`: the low-rank factors by target module, as named in the base model.
    `saved`: whole parameters by name (`classifier.weight` [out, in], …), of modules_to_save.
    `base_digest`: the base model it was trained on, where known (`digest.base_digest`).
    `labels`: a classifier's label names in the order of its outputs, where known.

    Raises:
        AdapterError: it holds nothing, or a factor's shape is not that of its rank.
    """

    config: AdapterConfig
    factors: Mapping[str, Factors]
    saved: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    base_digest: str | None = None
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.factors and not self.saved:
            raise AdapterError("the adapter holds no tensors: nothing was trained")
        problems = []
        for module, pair in self.factors.items():
            rank = self.config.rank_of(module)
            if pair.A.ndim != 2 or pair.B.ndim != 2:
                problems.append(
                    f"{module}: only linear layers' two-dimensional factors are supported"
                )
            elif pair.A.shape[0] != rank or pair.B.shape[1] != rank:
                problems.append(
                    f"{module}: lora_A is {list(pair.A.shape)} and lora_B {list(pair.B.shape)},"
                    f" the config says rank {rank}"
                )
        if problems:
            raise AdapterError("adapter tensors do not fit the config: " + "; ".join(problems))

    @property
    def modules(self) -> tuple[str, ...]:
        """The target modules, in name order."""
        return tuple(sorted(self.factors))

    @property
    def parameter_count(self) -> int:
        """How many numbers the adapter holds."""
        low_rank = sum(pair.A.size + pair.B.size for pair in self.factors.values())
        return low_rank + sum(values.size for values in self.saved.values())

    def scaling(self, module: str) -> float:
        """s for `module`, as in `loradeploy.adapter.scaling`."""
        return scaling(self.config, module)

    @cached_property
    def digest(self) -> str:
        """The adapter's identity: its tensors and what its config makes of them.

        Two adapters that compute the same by the same factors share it, whatever the width their
        numbers are stored in and however their configs spell the scaling.
        """
        tensors = {f"saved:{name}": values for name, values in self.saved.items()}
        for module, pair in self.factors.items():
            tensors[f"{module}.lora_A"] = pair.A
            tensors[f"{module}.lora_B"] = pair.B
        return tensors_digest(tensors, {module: self.scaling(module) for module in self.factors})
