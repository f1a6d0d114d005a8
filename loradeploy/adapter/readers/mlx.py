"""Adapters of mlx-lm and mlx-vlm: y = W x + scale · (x a) b, a [in, rank] and b [rank, out].

<module>.lora_a|lora_b, scale in lora_parameters     mlx-lm
<module>.A|B, and alpha, which is the scale          mlx-vlm

Modules have the names of mlx's model, which are those of transformers for most architectures.
"""

from __future__ import annotations

from typing import Final

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.readers.source import Source, adapter_of, check_complete, halves, number
from loradeploy.errors import AdapterError, listed_names

_ENDINGS: Final = {".lora_a": "A", ".lora_b": "B", ".m": "magnitude"}
_VISION_ENDINGS: Final = {".A": "A", ".B": "B"}
# LoRA on an embedding in mlx also changes the tied output head; in PEFT it does not.
_EMBEDDINGS: Final = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in")


def read_vision(source: Source) -> Adapter:
    """The adapter of mlx-vlm in PEFT's convention: A = aᵀ, B = bᵀ, s = alpha."""
    config = source.settings("its rank and alpha")
    alpha, rank = number(config, "alpha"), number(config, "rank")
    modules, others = halves(source.shapes, _VISION_ENDINGS)
    check_complete(modules, others)
    factors = {}
    for module, keys in modules.items():
        a, b = source.array(keys["A"]), source.array(keys["B"])  # [in, rank], [rank, out]
        _check_rank(module, a.shape, rank)
        factors[module] = Factors(a.T, b.T)
    return adapter_of(factors, dict.fromkeys(factors, alpha), task_type="CAUSAL_LM")


def _check_rank(module: str, shape: tuple[int, ...], rank: object) -> None:
    if shape[1:] != (rank,):
        raise AdapterError(
            f"{module}: lora_a is {list(shape)}, [in, rank] with the config's rank {rank} is needed"
        )


def read(source: Source) -> Adapter:
    """The adapter of mlx-lm in PEFT's convention: A = aᵀ, B = bᵀ, s = scale."""
    config = source.settings("its scale")
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterError(f"its fine_tune_type is {kind!r}: only lora and dora are adapters")
    settings = config.get("lora_parameters")
    if not isinstance(settings, dict):
        raise AdapterError("its adapter_config.json has no lora_parameters, which have the scale")
    if "alpha" in settings:
        raise AdapterError(
            "lora_parameters has alpha and scale, which versions of mlx-lm use differently: remove"
            " alpha, and let scale be the factor that your version multiplied by"
        )
    scale = number(settings, "scale")
    modules, others = halves(source.shapes, _ENDINGS)
    check_complete(modules, others)
    embeddings = [m for m in modules if m.rpartition(".")[2] in _EMBEDDINGS]
    if embeddings:
        raise AdapterError(
            f"{embeddings[0]} is an embedding, whose LoRA in mlx-lm changes a tied output head too:"
            " fuse it into its base with mlx_lm.fuse --dequantize, and export the result"
        )
    deep = [m for m, keys in modules.items() if len(source.shapes[keys["A"]]) != 2]
    if deep:
        raise AdapterError(
            f"factors for each expert ({listed_names(deep, 2)}) are not supported: fuse it into its"
            " base with mlx_lm.fuse --dequantize, and export the result"
        )
    dora = kind == "dora"
    factors = {}
    for module, keys in modules.items():
        magnitude = source.array(keys["magnitude"]) if "magnitude" in keys else None
        a, b = source.array(keys["A"]), source.array(keys["B"])  # [in, rank], [rank, out]
        if "rank" in settings:
            _check_rank(module, a.shape, settings["rank"])
        factors[module] = Factors(a.T, b.T, magnitude)
    return adapter_of(factors, dict.fromkeys(factors, scale), dora=dora, task_type="CAUSAL_LM")
