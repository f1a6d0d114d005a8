"""Adapters in a checkpoint of jina-embeddings-v3: one per task, stacked in one parameter.

<module>.parametrizations.weight.0.lora_A   [tasks, rank, in]; embedding [tasks, vocabulary, rank]
<module>.parametrizations.weight.0.lora_B   [tasks, out, rank]; embedding [tasks, rank, size]

Modules are renamed as in transformers' jina_embeddings_v3, which has separate modules for query,
key and value.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.readers.source import (
    Source,
    adapter_of,
    check_complete,
    check_rank,
    halves,
    number,
)
from loradeploy.errors import AdapterError, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HALF: Final = ".parametrizations.weight.0.lora_"
_ENDINGS: Final = {f"{_HALF}A": "A", f"{_HALF}B": "B"}
_LAYER: Final = re.compile(r"(?:roberta\.)?encoder\.layers\.(\d+)\.(.+)")
_NAMES: Final = {
    "mixer.out_proj": ("self_attn.o_proj",),
    "mixer.Wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
_OTHERS: Final = re.compile(
    r"(?:roberta\.)?(embeddings\.(?:word|token_type)_embeddings|pooler\.dense)"
)


def read(source: Source) -> Adapter:
    """The adapter of the chosen task, s = α/r."""
    config = source.settings("lora_adaptations, lora_rank and lora_alpha")
    tasks = config.get("lora_adaptations")
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise AdapterError(f"lora_adaptations is {shown(tasks)}, expected a list of tasks")
    task = tasks.index(source.choose(tasks))
    alpha, rank = number(config, "lora_alpha"), number(config, "lora_rank")
    modules, _ = halves((key for key in source.shapes if _HALF in key), _ENDINGS)
    check_complete(modules, ())
    factors: dict[str, Factors] = {}
    for module, keys in modules.items():
        stacks = {half: source.array(key) for half, key in keys.items()}
        for half, stack in stacks.items():
            if stack.ndim != 3 or len(stack) != len(tasks):
                raise AdapterError(
                    f"{module}: lora_{half} is {list(stack.shape)}, a matrix for each of the"
                    f" {len(tasks)} tasks is needed"
                )
        A, B = stacks["A"][task], stacks["B"][task]
        embedding = module.rpartition(".")[2].endswith("_embeddings")
        check_rank(module, B.T if embedding else B, rank)
        if embedding:
            factors[_only(module)] = Factors(A.T, B.T, kind="embedding")
            continue
        names = _named(module)
        for name, rows in zip(names, _split(B, len(names), module), strict=True):
            factors[name] = Factors(A, rows)
    return adapter_of(
        factors,
        dict.fromkeys(factors, alpha / rank),
        task_type="FEATURE_EXTRACTION",
    )


def _named(module: str) -> tuple[str, ...]:
    """The names in transformers of a linear module of the checkpoint."""
    layer = _LAYER.fullmatch(module)
    if layer is None:
        return (_only(module),)
    if layer[2] not in _NAMES:
        raise AdapterError(f"{module} is not a module of jina-embeddings-v3")
    return tuple(f"layers.{layer[1]}.{name}" for name in _NAMES[layer[2]])


def _only(module: str) -> str:
    found = _OTHERS.fullmatch(module)
    if found is None:
        raise AdapterError(f"{module} is not a module of jina-embeddings-v3")
    return found[1]


def _split(B: NDArray[Any], parts: int, module: str) -> list[NDArray[Any]]:
    if len(B) % parts:
        raise AdapterError(f"{module}: lora_B is {list(B.shape)}, not rows of {parts} projections")
    return list(np.split(B, parts))
