"""Adapters of litgpt: factors of a joint projection of query, key and value, with litgpt's names.

`attn.qkv.lora_A` [parts · rank, in] and `lora_B` [rows of the parts, rank] have, one after the
other, the factors of those of query, key and value that were adapted, which only
`hyperparameters.yaml` says. Before 0.5.5 the projection was named `attn.attn` and had the rows of
the heads in turns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.readers.source import (
    Base,
    Source,
    adapter_of,
    check_complete,
    check_rank,
    halves,
)
from loradeploy.errors import AdapterError, ModelError, shown
from loradeploy.files import MAX_TEXT_BYTES, read_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

SETTINGS_NAME: Final = "hyperparameters.yaml"
# The settings that the factors depend on are at the top level of the file, one on a line.
_SETTING: Final = re.compile(r"^lora_(\w+): *(\S+) *$", re.MULTILINE)

_ENDINGS: Final = {".lora_A": "A", ".lora_B": "B"}
_LAYER: Final = re.compile(r"transformer\.h\.(\d+)\.(attn\.\w+|mlp\.\w+)")
_JOINT: Final = "attn.qkv"
_INTERLEAVED: Final = "attn.attn"
_PARTS: Final = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_NAMES: Final = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
# transformers' model_type of the models whose modules have these names.
_MODELS: Final = ("llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3")


def read(source: Source) -> Adapter:
    """The adapter with transformers' names, s = α/r.

    Raises:
        AdapterError: the settings are missing or contradict the tensors, or a module is unknown.
        ModelError: the base is of another architecture.
        UsageError: the base is not given.
    """
    settings = _settings(source)
    rank, alpha = (_number(settings, name) for name in ("r", "alpha"))
    base = source.needs_base("the sizes of its query, key and value divide litgpt's joint factors")
    if base.config.get("model_type") not in _MODELS:
        raise ModelError(
            f"{base.directory} is a {shown(base.config.get('model_type'))}: litgpt's adapters are"
            f" converted for {', '.join(_MODELS)}"
        )
    modules, others = halves(source.shapes, _ENDINGS)
    check_complete(modules, others)
    factors: dict[str, Factors] = {}
    for module, keys in modules.items():
        A, B = source.array(keys["A"]), source.array(keys["B"])
        check_rank(module, B, rank)
        found = _LAYER.fullmatch(module)
        if module == "lm_head":
            factors[module] = Factors(A, B)
        elif found is not None and found[2] == _JOINT:
            attention = f"model.layers.{found[1]}.self_attn"
            factors |= _divided(module, A, B, attention, settings, base)
        elif found is not None and found[2] in _NAMES:
            factors[f"model.layers.{found[1]}.{_NAMES[found[2]]}"] = Factors(A, B)
        elif found is not None and found[2] == _INTERLEAVED:
            raise AdapterError(
                f"{module} is of litgpt before 0.5.5, whose rows are in another order: merge it"
                " with litgpt merge_lora, and convert the model with litgpt convert_from_litgpt"
            )
        else:
            raise AdapterError(f"{module} is not a module of the decoders that are converted")
    return adapter_of(factors, dict.fromkeys(factors, alpha / rank), task_type="CAUSAL_LM")


def _divided(
    module: str,
    A: NDArray[Any],
    B: NDArray[Any],
    attention: str,
    settings: Mapping[str, str],
    base: Base,
) -> dict[str, Factors]:
    """The factors of query, key and value, from those of the joint projection `module`."""
    names = [f"{attention}.{_PARTS[part]}" for part in _PARTS if _is_on(settings, part)]
    if absent := [name for name in names if name not in base.shapes]:
        raise ModelError(f"{base.directory} has no {absent[0]}.weight, which {module} adapts")
    sizes, rank = [base.shapes[name][0] for name in names], B.shape[1]
    if len(A) != rank * len(names) or len(B) != sum(sizes):
        raise AdapterError(
            f"{module} has lora_A {list(A.shape)} and lora_B {list(B.shape)}, {SETTINGS_NAME} and"
            f" the base need [{rank * len(names)}, …] and [{sum(sizes)}, {rank}]: give the base and"
            " the settings that it was trained with"
        )
    found, begin = {}, 0
    for place, (name, size) in enumerate(zip(names, sizes, strict=True)):
        own = A[place * rank : (place + 1) * rank]
        found[name] = Factors(own, B[begin : begin + size])
        begin += size
    return found


def _settings(source: Source) -> Mapping[str, str]:
    file = source.file.parent / SETTINGS_NAME
    if not file.is_file():
        raise AdapterError(
            f"there is no {SETTINGS_NAME} beside it, which has its alpha and says which of query,"
            " key and value are adapted: copy it from the directory of the training"
        )
    return dict(_SETTING.findall(read_text(file, error=AdapterError, limit=MAX_TEXT_BYTES)))


def _number(settings: Mapping[str, str], name: str) -> int:
    value = settings.get(name, "")
    if re.fullmatch(r"[1-9][0-9]{0,8}", value) is None:
        raise AdapterError(
            f"lora_{name} in {SETTINGS_NAME} is {value or 'missing'}, expected a positive integer"
        )
    return int(value)


def _is_on(settings: Mapping[str, str], part: str) -> bool:
    value = settings.get(part)
    if value not in ("true", "false"):
        raise AdapterError(
            f"lora_{part} in {SETTINGS_NAME} is {value or 'missing'}, expected true or false"
        )
    return value == "true"
