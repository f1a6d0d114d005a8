"""Base models whose weights are packed: which quantizer packed them, and the way out.

A packed base is neither traced nor merged into: its weights are not those that an adapter's update
is added to here. config.json tells the quantizer; where it does not, the tensors' names do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from loradeploy.adapter.base_files import base_tensors
from loradeploy.errors import LoraDeployError, ModelError, shortened
from loradeploy.files import open_file, read_json

BITSANDBYTES: Final = "bitsandbytes"

# What people call each quantizer, by transformers' quant_method.
_TITLES: Final = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "hqq": "HQQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FBGEMM FP8",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "bitnet": "BitNet",
    "quanto": "Quanto",
    "mlx": "MLX",
}
# Read from a GGUF file, the weights are plain numbers again.
_PLAIN: Final = ("gguf",)
# Of which transformers makes plain weights: once loaded, or while it loads them.
_DEQUANTIZED_AFTER: Final = (BITSANDBYTES, "higgs")
_DEQUANTIZED_WHILE: Final = ("compressed-tensors", "fp8", "mxfp4", "mxfp8")

# Endings of tensors that no plain checkpoint has.
_PACKED_ENDINGS: Final = {
    ".weight.absmax": BITSANDBYTES,
    ".weight.quant_map": BITSANDBYTES,
    ".SCB": BITSANDBYTES,
    ".qweight": "gptq",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "fp8",
    ".W_q": "hqq",
    "_proj_blocks": "mxfp4",
}
_FLOAT8: Final = ("F8_E4M3", "F8_E5M2")

_UNSLOTH: Final = "unsloth"
# What is added to a model's name once it is quantized, as in Llama-3.1-8B-Instruct-bnb-4bit.
_SUFFIX: Final = re.compile(
    r"(-unsloth)?-(bnb-[48]bit|[48]-?bit|int[48]|gptq(-int[48])?(-.+)?|awq(-int4)?|fp8(-.+)?|hqq.*"
    r"|w[48]a(8|16)(-.+)?|mxfp4|nvfp4|gguf|mlx.*|quantized\..+)$",
    re.IGNORECASE,
)


def check_unquantized(
    place: Path, *, names: Iterable[str | None] = (), allowed: Collection[str] = ()
) -> None:
    """Raise ModelError where the checkpoint in the directory `place` is packed by a quantizer.

    `names`: what the base is called elsewhere, such as in an adapter's config, by which the name of
    its original may be known. `allowed`: quantizers by transformers' quant_method.
    """
    config = _config(place)
    method = _method(config) or _method_of_tensors(place)
    if method is None or method in allowed or method in _PLAIN:
        return
    original = _original([place.resolve().name, str(config.get("_name_or_path") or ""), *names])
    raise ModelError(
        f"{place} is quantized by {_TITLES.get(method, shortened(method, 40))}, and its packed"
        f" weights can be neither exported nor compared: {_way_out(method, original)}"
    )


def gguf_advice(place: Path) -> str | None:
    """What to do with the GGUF file, or directory of such, at `place`; None for anything else."""
    if place.is_file():
        with open_file(place, error=ModelError) as file:
            found = place if file.read(4) == b"GGUF" else None
    else:
        found = next(iter(sorted(place.glob("*.gguf"))), None)
    if found is None:
        return None
    return (
        f"{place} is a GGUF model of llama.cpp: give the original it was made from, or load it with"
        f" transformers (from_pretrained(DIR, gguf_file={shortened(found.name, 60)!r})), which"
        " dequantizes it, and give what save_pretrained writes"
    )


def original_name(name: str) -> str | None:
    """The name of a quantized model without what says that it is; None where nothing does.

    The owner of the repository stays where it has the originals too: others quantize what is not
    theirs.
    """
    owner, _, last = name.rstrip("/").rpartition("/")
    plain = _SUFFIX.sub("", last)
    if plain in (last, ""):
        return None
    return f"{owner}/{plain}" if owner == _UNSLOTH else plain


def _way_out(method: str, original: str | None) -> str:
    if original is None:
        way = "give the original that it was made from"
    else:
        way = f"give the original, {shortened(original, 80)}"
    if method in _DEQUANTIZED_AFTER:
        return f"{way}, or dequantize it with transformers (model.dequantize(), save_pretrained)"
    if method in _DEQUANTIZED_WHILE:
        return f"{way}, or load it with dequantize=True in its quantization config and save it"
    if method == "mlx":
        return f"{way}, or dequantize it (mlx_lm.convert --dequantize)"
    return way


def _config(place: Path) -> Mapping[str, Any]:
    try:
        return read_json(place / "config.json", error=ModelError, finite=False)
    except ModelError:
        return {}  # whoever needs it will say so


def _method(config: Mapping[str, Any]) -> str | None:
    """transformers' name of the quantizer that config.json tells of."""
    inner = config.get("text_config")
    for values in (config, inner if isinstance(inner, Mapping) else {}):
        for field in ("quantization_config", "compression_config"):
            told = values.get(field)
            if not isinstance(told, Mapping) or not told:
                continue
            if isinstance(method := told.get("quant_method"), str):
                return BITSANDBYTES if method.startswith(BITSANDBYTES) else method.lower()
            if told.get("load_in_4bit") or told.get("load_in_8bit"):
                return BITSANDBYTES
            return "compressed-tensors" if field == "compression_config" else "unknown"
        if isinstance(told := values.get("quantization"), Mapping) and "group_size" in told:
            return "mlx"
    return None


def _method_of_tensors(place: Path) -> str | None:
    try:
        tensors = base_tensors(place)
    except LoraDeployError:
        return None  # whoever reads it will say so
    for name, tensor in tensors.items():
        for ending, method in _PACKED_ENDINGS.items():
            if name.endswith(ending):
                return method
        if tensor.dtype in _FLOAT8:
            return "fp8"
    return None


def _original(names: Iterable[str | None]) -> str | None:
    """The first original that any of `names` tells of; one with its owner before others."""
    found = [plain for name in names if name and (plain := original_name(name)) is not None]
    return next((name for name in found if "/" in name), found[0] if found else None)
