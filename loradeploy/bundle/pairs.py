"""Pairs of low-rank side inputs: one for each layer, or for several whose weights are fused.

Layers that take the same input are one product in a bundle's graph, their outputs side by side.
They share one pair of side inputs: the members' ranks stand side by side in A, and B is block
diagonal, so that each member's ranks reach its own outputs only:

    A = [A_q A_k A_v]   [in, Σ rank]        B = diag(B_q, B_k, B_v)   [Σ rank, Σ out]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loradeploy.adapter.adapter import Factors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import LoraTarget

_SUFFIX = ".lora_A"


@dataclass(frozen=True)
class FactorPair:
    """Two side inputs, [adapters, in, rank] and [adapters, rank, out], and the targets they serve.

    `members`: several, each with a slice, or a single one, which needs none.
    `out_features`: of the whole product, the members' and whatever else its weight holds.
    """

    lora_A: str
    lora_B: str
    in_features: int
    out_features: int
    members: tuple[LoraTarget, ...]

    @property
    def label(self) -> str:
        """What the pair is called in the graph and in messages."""
        return self.lora_A.removesuffix(_SUFFIX)

    def join(
        self, factors: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """A [in, Σ rank] and B [Σ rank, out] of the members' own, [in, rank] and [rank, out].

        None where `factors`, by module, has none of the members.
        """
        touched = [member for member in self.members if member.module in factors]
        if not touched:
            return None
        if touched[0].slice is None:
            return factors[touched[0].module]
        A = np.concatenate([factors[member.module][0] for member in touched], axis=1)
        B = np.zeros((A.shape[1], self.out_features), np.float32)
        row = 0
        for member in touched:
            own = factors[member.module][1]
            begin, end = outputs_of(member)
            B[row : row + len(own), begin:end] = own
            row += len(own)
        return A, B

    def split(self, A: NDArray[np.floating], B: NDArray[np.floating]) -> dict[str, Factors]:
        """The members' own factors, [rank, in] and [out, rank], of A [in, rank] and B [rank, out].

        A rank belongs to the members whose outputs it reaches; a member that none reaches is left
        out.
        """
        only = self.members[0]
        if only.slice is None:
            pair = Factors(np.ascontiguousarray(A.T), np.ascontiguousarray(B.T), kind=only.kind)
            return {only.module: pair}
        found = {}
        for member in self.members:
            begin, end = outputs_of(member)
            own = B[:, begin:end]
            ranks = own.any(axis=1)
            if ranks.any():
                found[member.module] = Factors(
                    np.ascontiguousarray(A[:, ranks].T), np.ascontiguousarray(own[ranks].T)
                )
        return found


def factor_pairs(targets: Iterable[LoraTarget]) -> tuple[FactorPair, ...]:
    """The pairs of side inputs of `targets`, in their order; members in that of their outputs."""
    grouped: dict[tuple[str, str], list[LoraTarget]] = {}
    for target in targets:
        grouped.setdefault((target.lora_A, target.lora_B), []).append(target)
    return tuple(
        FactorPair(
            lora_A=lora_A,
            lora_B=lora_B,
            in_features=members[0].in_features,
            out_features=max(outputs_of(member)[1] for member in members),
            members=tuple(sorted(members, key=outputs_of)),
        )
        for (lora_A, lora_B), members in grouped.items()
    )


def outputs_of(target: LoraTarget) -> tuple[int, int]:
    """The range of the product's outputs that are the target's."""
    return target.slice or (0, target.out_features)


def pair_problem(pair: FactorPair) -> str | None:
    """Why the pair's members cannot share its side inputs; None where they can."""
    first = pair.members[0]
    if any(member.slice is None for member in pair.members) and len(pair.members) > 1:
        return "two targets share the name of a side input"
    reached = 0
    for member in pair.members:
        begin, end = outputs_of(member)
        if begin < reached or end - begin != member.out_features:
            return f"the slice of {member.module} is not one of its size, or another's too"
        same = (member.weight, member.in_features, member.transposed, member.kind)
        if same != (first.weight, first.in_features, first.transposed, first.kind):
            return f"{first.module} and {member.module} are not parts of one weight"
        reached = end
    return None
