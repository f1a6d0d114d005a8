"""Join the factors of experts that are separate linear layers to those of one parameter.

Before version 5, transformers had a list of experts, each with separate linear layers:

    M.experts.E.gate_proj (w1)      M.experts.E.up_proj (w3)      M.experts.E.down_proj (w2)

Since then one parameter has the weights of all experts. `gate_up_proj` has those of two layers, one
above the other, so the ranks of their factors add up:

    [W_gate]     [W_gate]         [B_gate    0 ] [A_gate]
    [ W_up ]  ←  [ W_up ]  +  s · [  0    B_up ] [ A_up ]

PEFT (`transformers_weight_conversion`) converts adapters for some of these models.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.algebra.experts import with_targets
from loradeploy.adapter.scaling import with_ranks
from loradeploy.errors import AdapterMismatchError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_EXPERT: Final = re.compile(r"(.+\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)")
# The parameter of each layer, and which of its layers it is.
_PLACES: Final[Mapping[str, tuple[str, int]]] = {
    "w1": ("gate_up_proj", 0),
    "gate_proj": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "up_proj": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
    "down_proj": ("down_proj", 0),
}
_LAYERS: Final = {"gate_up_proj": 2, "down_proj": 1}

# The names of a parameter's layers, by expert and by place.
_Names = dict[tuple[int, int], str]


def with_joined_experts(
    adapter: Adapter, known: Collection[str], rename: Callable[[str], str]
) -> Adapter:
    """`adapter` with the factors of separate experts joined, if the base has one parameter of them.

    `known`: the names of the base's modules, and of its parameters of experts. `rename`: from the
    name of a module in the adapter to that in the base.

    Raises:
        AdapterMismatchError: factors of only some of the experts, or with DoRA.
    """
    found: dict[str, _Names] = {}
    for name in adapter.factors:
        parts = _EXPERT.fullmatch(rename(name))
        if parts is None:
            continue
        parameter, place = _PLACES[parts[3]]
        found.setdefault(f"{parts[1]}.{parameter}", {})[int(parts[2]), place] = name
    found = {parameter: names for parameter, names in found.items() if parameter in known}
    if not found:
        return adapter
    taken = {name for names in found.values() for name in names.values()}
    factors = {name: pair for name, pair in adapter.factors.items() if name not in taken}
    scalings = {name: adapter.scaling(name) for name in factors}
    for parameter, names in found.items():
        factors[parameter], scalings[parameter] = _joined(adapter, parameter, names)
    ranks = {name: pair.rank for name, pair in factors.items()}
    config = with_targets(with_ranks(adapter.config, ranks, scalings), factors)
    return dataclasses.replace(adapter, config=config, factors=factors)


def _joined(adapter: Adapter, parameter: str, names: _Names) -> tuple[Factors, float]:
    """The factors of all experts of `parameter`, and their scaling s."""
    pairs = {key: adapter.factors[name] for key, name in names.items()}
    places = sorted({place for _, place in pairs})
    count = 1 + max(expert for expert, _ in pairs)
    if len(pairs) != count * len(places):
        raise AdapterMismatchError(
            f"{parameter} is of all experts, and the adapter has factors of some of them only:"
            " merge it with the version of transformers that it was trained with"
        )
    if any(pair.magnitude is not None or pair.kind != "linear" for pair in pairs.values()):
        raise AdapterMismatchError(f"{parameter} is of experts, which have no DoRA: merge it")
    if any(pair.bias is not None for pair in pairs.values()):
        raise AdapterMismatchError(
            f"{parameter} is of experts, whose factors have no bias (lora_bias): merge it with the"
            " version of transformers that it was trained with"
        )
    scaling = adapter.scaling(names[0, places[0]])
    ranks = {place: max(pairs[e, place].rank for e in range(count)) for place in places}
    inputs = {pair.A.shape[1] for pair in pairs.values()}
    outputs = {pair.B.shape[0] for pair in pairs.values()}
    if len(inputs) != 1 or len(outputs) != 1:
        raise AdapterMismatchError(f"{parameter} is of layers of one size, the adapter's differ")
    (size,), (height,), layers = inputs, outputs, _LAYERS[parameter.rpartition(".")[2]]
    dtype = next(iter(pairs.values())).A.dtype
    A = np.zeros((sum(ranks.values()), count, size), dtype)  # [rank, expert, in]
    B = np.zeros((layers * height, sum(ranks.values()), count), dtype)  # [out, rank, expert]
    start = 0
    for place in places:
        for expert in range(count):
            pair, name = pairs[expert, place], names[expert, place]
            own = slice(start, start + pair.rank)
            A[own, expert] = pair.A
            rows = slice(place * height, (place + 1) * height)
            B[rows, own, expert] = _scaled(pair.B, adapter.scaling(name) / scaling)
        start += ranks[place]
    flat = Factors(
        A=A.reshape(-1, size), B=B.reshape(layers * height, -1), kind="experts", experts=count
    )
    return flat, scaling


def _scaled(B: NDArray[Any], by: float) -> NDArray[Any]:
    return B if by == 1 else (B * by).astype(B.dtype)
