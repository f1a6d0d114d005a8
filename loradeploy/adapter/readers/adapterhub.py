"""LoRAs of AdapterHub's adapters library: `<module>.loras.<name>.lora_A|lora_B`, s = α/r.

A fused projection of query, key and value has factors for those in `attn_matrices`, stacked:
A [n · rank, in], B [n · out/3, rank]. As one pair: A, and a block-diagonal B [out, n · rank].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
from loradeploy.errors import AdapterError
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NAMED: Final = re.compile(r"(?P<module>.+)\.loras\.(?P<name>[^.]+)(?P<half>\.lora_[AB])")
_ENDINGS: Final = {".lora_A": "A", ".lora_B": "B"}
_ADVICE: Final = "merge it there (model.merge_adapter), save the model and export that"
# Settings that change the equation, and their values that do not.
_NEUTRAL: Final = {
    "composition_mode": "add",
    "use_gating": False,
    "use_dora": False,
    "vera_d": None,
    "vera_b": None,
}
_FUSED: Final = ("c_attn", "in_proj")
_HEAD: Final = "head_config.json"

logger = logger_of(__name__)


def read(source: Source) -> Adapter:
    """The adapter, with the module names of transformers."""
    outer = source.settings("its rank and alpha")
    inner = outer.get("config")
    config: Mapping[str, Any] = inner if isinstance(inner, Mapping) else outer
    for name, neutral in _NEUTRAL.items():
        if config.get(name, neutral) != neutral:
            raise AdapterError(f"its {name} is {config[name]!r}, which is not supported: {_ADVICE}")
    alpha, rank = number(config, "alpha"), number(config, "r")
    found = {key: _NAMED.fullmatch(key) for key in source.shapes}
    other = sorted(key for key, match in found.items() if match is None)
    if other:
        raise AdapterError(f"{other[0]} is not part of a LoRA: {_ADVICE}")
    chosen = source.choose(match["name"] for match in found.values() if match)
    keys = {
        match["module"] + match["half"]: key
        for key, match in found.items()
        if match and match["name"] == chosen
    }
    modules, _ = halves(keys, _ENDINGS)
    check_complete(modules, ())
    fused = [m for m in ("q", "k", "v") if m in config.get("attn_matrices", ("q", "v"))]
    factors = {}
    for module, names in modules.items():
        A, B = (source.array(keys[names[half]]) for half in "AB")
        check_rank(module, B, rank)
        if module.rpartition(".")[2] in _FUSED:
            B = _block_diagonal(B, fused, module)
        if not A.shape[:1] == B.shape[1:]:
            raise AdapterError(f"{module}: lora_A is {list(A.shape)} and lora_B {list(B.shape)}")
        factors[module] = Factors(A, B)
    scalings = dict.fromkeys(factors, alpha / rank)
    if (source.file.parent / _HEAD).is_file():
        logger.warning(
            "%s: only the LoRA is converted, not the prediction head that %s describes",
            source.file.parent,
            _HEAD,
        )
    return adapter_of(factors, scalings, base_name=outer.get("model_name"))


def _block_diagonal(B: NDArray[Any], parts: list[str], module: str) -> NDArray[Any]:
    """B [n · out/3, rank] as [out, n · rank]: the rows of each part use that part's rows of A."""
    if B.ndim != 2 or not parts or len(B) % len(parts):
        raise AdapterError(f"{module}: lora_B is {list(B.shape)}, with {len(parts)} attn_matrices")
    size, rank = len(B) // len(parts), B.shape[1]
    whole = np.zeros((3 * size, len(parts) * rank), B.dtype)
    for index, part in enumerate(parts):
        row = size * "qkv".index(part)
        columns = slice(index * rank, (index + 1) * rank)
        whole[row : row + size, columns] = B[index * size : (index + 1) * size]
    return whole
