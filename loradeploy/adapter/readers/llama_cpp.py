"""Adapters of llama.cpp, as its convert_lora_to_gguf.py writes them from PEFT's: s = α / rank.

blk.N.<module>.weight.lora_a [rank, in], lora_b [out, rank]     a linear layer, output.weight too
token_embd.weight.lora_a [vocabulary, rank], lora_b [size, rank]

The rows of query and key are in the order of llama.cpp, which pairs neighboring rows of each head,
for the architectures in `_ROTARY` with True. The file has one alpha: rsLoRA and patterns of the
original adapter are lost in it, and in llama.cpp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.readers.source import (
    HEADS,
    Base,
    Source,
    adapter_of,
    check_complete,
    halves,
    halves_first,
    number,
)
from loradeploy.errors import AdapterError, ModelError, listed_names, shown

_ENDINGS: Final = {".weight.lora_a": "A", ".weight.lora_b": "B"}
_LAYER: Final = re.compile(r"blk\.(\d+)\.(\w+)")
_NAMES: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EMBEDDING: Final = ("token_embd", "model.embed_tokens")
_OUTPUT: Final = ("output", "lm_head")
# general.architecture → transformers' model types, and whether llama.cpp permutes query and key.
_ROTARY: Final = {
    "gemma": (("gemma",), False),
    "gemma2": (("gemma2",), False),
    "gemma3": (("gemma3_text",), False),
    "granite": (("granite",), True),
    "llama": (("llama", "mistral"), True),
    "qwen2": (("qwen2",), False),
    "qwen3": (("qwen3",), False),
}
_TYPE: Final = "adapter.type"
_ALPHA: Final = "adapter.lora.alpha"
_INVOCATION: Final = "adapter.alora.invocation_tokens"


def read(source: Source) -> Adapter:
    """The adapter with transformers' names and order of rows."""
    values = source.settings("its alpha")
    if values.get(_TYPE) != "lora":
        raise AdapterError(f"its {_TYPE} is {shown(values.get(_TYPE))}, expected 'lora'")
    if values.get(_INVOCATION):
        raise AdapterError(
            "it is an activated LoRA, which depends on the prompt and cannot be exported"
        )
    alpha = number(values, _ALPHA)
    if alpha == 0 or not math.isfinite(alpha):
        raise AdapterError(f"its {_ALPHA} is {alpha:g}, which llama.cpp and PEFT use differently")
    base = source.needs_base("its architecture determines the names and the order of rows")
    permuted = _is_permuted(values.get("general.architecture"), base)
    modules, others = halves(source.shapes, _ENDINGS)
    check_complete(modules, others)
    factors = {}
    for module, keys in modules.items():
        name = _renamed(module)
        A, B = source.array(keys["A"]), source.array(keys["B"])
        if name == _EMBEDDING[1]:
            _check_untied(base)
            factors[name] = Factors(A.T, B, kind="embedding")
        else:
            factors[name] = Factors(A, B)
    _check_fit(factors, base)
    if permuted:
        factors = {name: _unpermuted(name, pair, base) for name, pair in factors.items()}
    scalings = {name: alpha / pair.rank for name, pair in factors.items()}
    return adapter_of(factors, scalings, task_type="CAUSAL_LM")


def _check_fit(factors: Mapping[str, Factors], base: Base) -> None:
    """Raise AdapterError unless the factors are of weights of the base.

    The heads of another base would permute the rows in another order.
    """
    if unknown := sorted(factors.keys() - base.shapes.keys()):
        raise AdapterError(
            f"{base.directory} has no {listed_names(unknown, 2)}: give the base that the adapter"
            " was trained on"
        )
    for name, pair in factors.items():
        A, B = pair.A.shape, pair.B.shape
        if len(A) != 2 or len(B) != 2 or not A[0] == B[1] > 0:
            raise AdapterError(
                f"{name} has factors {list(A)} and {list(B)}, expected [rank, in] and [out, rank]"
            )
        theirs, ours = (B[0], A[1]), base.shapes[name]
        if theirs != (ours[::-1] if pair.kind == "embedding" else ours):
            raise AdapterError(
                f"{name} has factors of {list(theirs)}, {base.directory} has a weight of"
                f" {list(ours)}: give the base that the adapter was trained on"
            )


def _unpermuted(name: str, pair: Factors, base: Base) -> Factors:
    """`pair` with the rows of query and key in transformers' order."""
    heads = HEADS.get(name.rpartition(".")[2])
    return Factors(pair.A, halves_first(pair.B, base, heads, name)) if heads else pair


def _is_permuted(architecture: object, base: Base) -> bool:
    """Whether llama.cpp permutes the rows of query and key of this architecture."""
    known = _ROTARY.get(architecture) if isinstance(architecture, str) else None
    if known is None:
        raise AdapterError(
            f"its general.architecture is {shown(architecture)}: adapters of llama.cpp are"
            f" converted for {', '.join(_ROTARY)}"
        )
    kinds, permuted = known
    if base.config.get("model_type") not in kinds:
        raise ModelError(
            f"{base.directory} is a {shown(base.config.get('model_type'))}, the adapter is for a"
            f" {architecture} (model_type {' or '.join(kinds)})"
        )
    return permuted


def _renamed(module: str) -> str:
    for theirs, ours in (_EMBEDDING, _OUTPUT):
        if module == theirs:
            return ours
    found = _LAYER.fullmatch(module)
    if found is None or found[2] not in _NAMES:
        raise AdapterError(f"{module} is not a module that is converted")
    return f"model.layers.{found[1]}.{_NAMES[found[2]]}"


def _check_untied(base: Base) -> None:
    if base.config.get("tie_word_embeddings") or _OUTPUT[1] not in base.modules:
        raise AdapterError(
            "token_embd is tied to the output head of this base, which llama.cpp cannot run: give"
            " the PEFT directory that the adapter was converted from"
        )
