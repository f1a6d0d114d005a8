"""Adapters of torchtune, which has Meta's names and, for rotary positions, Meta's order of rows.

torchtune pairs neighboring rows of each head's query and key; transformers pairs both halves of the
head. So for the models in `_ROTARY`, rows of B (and of DoRA's magnitude) have to be permuted.
"""

from __future__ import annotations

import re
from typing import Final

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.readers.source import (
    HEADS,
    Source,
    adapter_of,
    check_complete,
    check_rank,
    halves,
    halves_first,
    number,
)
from loradeploy.errors import AdapterError, ModelError, shown

_ENDINGS: Final = {".lora_a.weight": "A", ".lora_b.weight": "B", ".magnitude": "magnitude"}
_LAYER: Final = re.compile(r"layers\.(\d+)\.(attn\.\w+|mlp\.\w+)")
_NAMES: Final = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
# Whether torchtune permutes query and key of the model, by transformers' model_type.
_ROTARY: Final = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False}


def read(source: Source) -> Adapter:
    """The adapter with transformers' names and order of rows, s = α/r."""
    config = source.settings("its rank and alpha")
    alpha, rank = number(config, "lora_alpha"), number(config, "r")
    base = source.needs_base("its number of heads determines the order of rows in query and key")
    permuted = _ROTARY.get(str(base.config.get("model_type")))
    if permuted is None:
        raise ModelError(
            f"{base.directory} is a {shown(base.config.get('model_type'))}: torchtune's adapters"
            f" are converted for {', '.join(_ROTARY)}"
        )
    modules, others = halves(source.shapes, _ENDINGS)
    check_complete(modules, others)
    factors = {}
    for module, keys in modules.items():
        name = _renamed(module)
        magnitude = source.array(keys["magnitude"]) if "magnitude" in keys else None
        A, B = source.array(keys["A"]), source.array(keys["B"])
        check_rank(name, B, rank)
        if permuted and (heads := HEADS.get(name.rpartition(".")[2])):
            B = halves_first(B, base, heads, name)
            magnitude = None if magnitude is None else halves_first(magnitude, base, heads, name)
        factors[name] = Factors(A, B, magnitude)
    dora = any(pair.magnitude is not None for pair in factors.values())
    scalings = dict.fromkeys(factors, alpha / rank)
    return adapter_of(factors, scalings, dora=dora, task_type="CAUSAL_LM")


def _renamed(module: str) -> str:
    if module == "output":
        return "lm_head"
    found = _LAYER.fullmatch(module)
    if found is None or found[2] not in _NAMES:
        raise AdapterError(f"{module} is not a module of torchtune's decoders")
    return f"model.layers.{found[1]}.{_NAMES[found[2]]}"
