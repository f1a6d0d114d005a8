"""Other methods of PEFT whose adapters are LoRA factors or trained rows in another form.

ADALORA            ΔW = α / (r₀ + 1e-5) · B (E ∘ A), E [rank, 1] the singular values. The rank is
                   the number of true values in the module's entry of rank_pattern, else r₀ = init_r
                   (Zhang et al., 2023, arXiv:2303.10512; the constant is that of PEFT 0.21)
TRAINABLE_TOKENS   <module>.trainable_tokens_delta [tokens, size]: rows of a weight
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.config import PARAMETERS, TOKENS, AdapterConfig, as_integer
from loradeploy.adapter.files.keys import DELTA, TRAINED_ROWS, Key, read_keys
from loradeploy.adapter.modules.targets import untargeted
from loradeploy.adapter.scaling import with_ranks
from loradeploy.errors import AdapterError, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

# The value of target_modules with which PEFT adapts no module by factors.
_NO_TARGETS: Final = "dummy-target-modules"
# Settings of AdaLoRA's training, which its finished factors do not depend on.
_SCHEDULE: Final = (
    *("beta1", "beta2", "deltaT", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"),
)
# Settings of LoRA that PEFT does not use with AdaLoRA.
_IGNORED: Final = ("alpha_pattern", "init_lora_weights", "lora_bias", "r", "use_rslora")
_SINGULAR_VALUES: Final = ".lora_E"
_EPSILON: Final = 1e-5  # PEFT adds it to the rank


def as_lora(values: Mapping[str, Any], arrays: Arrays) -> tuple[AdapterConfig, Arrays]:
    """The config `values`, of a peft_type in `METHODS`, and a file's tensors, in the form of LoRA.

    Raises:
        AdapterError: as `AdapterConfig.from_peft`; or the tensors contradict the config.
    """
    return METHODS[values["peft_type"]](values, arrays)


def _trained_tokens(values: Mapping[str, Any], arrays: Arrays) -> tuple[AdapterConfig, Arrays]:
    names = {
        key: key.replace(DELTA, TRAINED_ROWS) if TRAINED_ROWS not in key else key for key in arrays
    }
    rows = {w.name: arrays[key] for key, w in _roles(names).items() if w.part == "rows"}
    targets = AdapterConfig.from_peft({"target_modules": values.get("target_modules")})
    ignored = untargeted(sorted(rows), targets)
    used = [values for module, values in rows.items() if module not in ignored]
    for module in ignored:  # of an output head that is tied to the embedding
        if not any(np.array_equal(rows[module], values) for values in used):
            raise AdapterError(f"target_modules leaves {module} out, and the file has its rows")
    indices = values.get("token_indices")
    # "init_weights" initializes rows that the file replaces.
    left_out = ("peft_type", "target_modules", "token_indices", "init_weights")
    config = AdapterConfig.from_peft(
        {name: value for name, value in values.items() if name not in left_out}
        | {"target_modules": _NO_TARGETS, TOKENS: dict.fromkeys(sorted(rows), indices)}
    )
    return config, {names[key]: array for key, array in arrays.items()}


def _roles(names: Mapping[str, str]) -> dict[str, Key]:
    """The role of each tensor, by its key in the file, from the keys of LoRA in `names`."""
    known = read_keys(names.values())
    return {key: known[name] for key, name in names.items()}


def _adalora(values: Mapping[str, Any], arrays: Arrays) -> tuple[AdapterConfig, Arrays]:
    if values.get(PARAMETERS):
        raise AdapterError(f"adapter config: {PARAMETERS} is not supported with peft_type ADALORA")
    initial = _initial_rank(values)
    left_out = ("peft_type", "init_r", "rank_pattern", *_SCHEDULE, *_IGNORED)
    config = AdapterConfig.from_peft(
        {name: value for name, value in values.items() if name not in left_out} | {"r": initial}
    )
    expected = _ranks(values.get("rank_pattern") or {})
    roles = read_keys(arrays)
    found, ranks, scalings = dict(arrays), {}, {}
    for key in arrays:
        if not key.endswith(_SINGULAR_VALUES):
            continue
        module = roles[key].name.removesuffix(_SINGULAR_VALUES)
        start = key.removesuffix(_SINGULAR_VALUES)
        E = found.pop(key)  # [rank, 1]
        A, B = (found.pop(f"{start}.{half}", None) for half in ("lora_A", "lora_B"))
        rank = expected.pop(module, initial)
        if A is None or B is None:
            raise AdapterError(f"{module} has lora_E without lora_A and lora_B")
        if E.shape != (rank, 1) or A.shape[:1] != (rank,) or B.shape[1:] != (rank,):
            raise AdapterError(
                f"{module}: lora_A is {list(A.shape)}, lora_B {list(B.shape)} and lora_E"
                f" {list(E.shape)}, the config has rank {rank} (rank_pattern and init_r)"
            )
        if rank == 0:  # the module stays a target, with an update of zeros
            rank, A, E, B = 1, *(np.zeros(size, A.dtype) for size in (A.shape[1:], 1, (len(B), 1)))
        found[f"{start}.lora_A.weight"] = _product(A.reshape(rank, -1), E)
        found[f"{start}.lora_B.weight"] = B
        alpha = config.lora_alpha if config.lora_alpha > 0 else rank
        ranks[module] = rank
        scalings[module] = alpha / float(np.float32(initial) + np.float32(_EPSILON))
    alone = sorted({roles[key].name for key in found.keys() & roles if roles[key].half} - {*ranks})
    if alone:  # PEFT would keep E as it is initialized, zeros
        raise AdapterError(f"{alone[0]} has factors without lora_E")
    if expected:
        raise AdapterError(f"rank_pattern names {shown(min(expected))}, which has no lora_E")
    return with_ranks(config, ranks, scalings), found


def _initial_rank(values: Mapping[str, Any]) -> int:
    rank = as_integer(values.get("init_r"))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"adapter config: init_r is {shown(rank)}, expected a positive integer")
    return rank


def _ranks(pattern: object) -> dict[str, int]:
    """The ranks by module in AdaLoRA's rank_pattern, lists of true (kept) and false (removed)."""
    if not isinstance(pattern, Mapping):
        raise AdapterError(f"adapter config: rank_pattern is {shown(pattern)}, expected an object")
    found: dict[str, int] = {}
    for name, kept in pattern.items():
        module, end, _ = name.partition(_SINGULAR_VALUES)
        if not end or not isinstance(kept, list) or any(type(one) is not bool for one in kept):
            raise AdapterError(
                f"adapter config: rank_pattern has {shown(name)}: {shown(kept)}, expected lists of"
                " true and false by <module>.lora_E"
            )
        found[module] = sum(kept)
    return found


def _product(A: NDArray[Any], E: NDArray[Any]) -> NDArray[Any]:
    """E ∘ A, in float32 where both are narrower."""
    wide = np.result_type(A, E, np.float32)
    product: NDArray[Any] = A.astype(wide) * E.astype(wide)
    return product


METHODS: Final[
    Mapping[str, Callable[[Mapping[str, Any], Arrays], tuple[AdapterConfig, Arrays]]]
] = {
    "ADALORA": _adalora,
    "TRAINABLE_TOKENS": _trained_tokens,
}
