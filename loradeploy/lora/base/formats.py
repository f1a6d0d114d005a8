"""Recognize quantized base models, and suggest how to get an unquantized one.

A quantized base can be neither traced nor merged into, because an adapter's update cannot be added
to its weights. The method is read from config.json, or else from the names of the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from loradeploy.adapter.files.base_files import base_tensors
from loradeploy.errors import LoraDeployError, ModelError, shortened
from loradeploy.files import open_file, read_json
from loradeploy.names import MODEL_CONFIG_NAME
from loradeploy.paths import resolved

BITSANDBYTES: Final = "bitsandbytes"

# Names of quantization methods, by transformers' quant_method.
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
    "integers": "a method that stores integers",
    "unknown": "a method that its config.json does not name",
}
# Weights that transformers read from a GGUF file are dequantized.
_UNQUANTIZED: Final = ("gguf",)
# Methods that transformers can dequantize after loading, or while it loads.
_DEQUANTIZED_AFTER: Final = (BITSANDBYTES, "higgs")
_DEQUANTIZED_WHILE: Final = ("compressed-tensors", "fp8", "mxfp4", "mxfp8")

# Endings of tensor names that only quantized checkpoints have.
_QUANTIZED_ENDINGS: Final = {
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
_INTEGERS: Final = ("I8", "U8", "I16", "I32")  # with scales elsewhere, or lost

_UNSLOTH: Final = "unsloth"
# Suffixes of the names of quantized models, as in Llama-3.1-8B-Instruct-bnb-4bit.
_SUFFIX: Final = re.compile(
    r"(-unsloth)?-(bnb-[48]bit|[48]-?bit|int[48]|gptq(-int[48])?(-.+)?|awq(-int4)?|fp8(-.+)?|hqq.*"
    r"|w[48]a(8|16)(-.+)?|mxfp4|nvfp4|gguf|mlx.*|quantized\..+)$",
    re.IGNORECASE,
)


def check_unquantized(
    path: Path, *, names: Iterable[str | None] = (), allowed: Collection[str] = ()
) -> None:
    """Raise ModelError if the checkpoint in the directory `path` is quantized.

    `names`: other names of the base, such as in an adapter's config, from which the name of the
    unquantized original may follow. `allowed`: accepted methods, by transformers' quant_method.
    """
    config = _config(path)
    method = _method(config) or _method_of_tensors(path)
    if method is None or method in allowed or method in _UNQUANTIZED:
        return
    original = _original([resolved(path).name, str(config.get("_name_or_path") or ""), *names])
    raise ModelError(
        f"{path} is quantized by {_TITLES.get(method, shortened(method, 40))}, and its quantized"
        f" weights can be neither exported nor compared: {_advice(method, original)}"
    )


def gguf_advice(path: Path) -> str | None:
    """Advice for a GGUF file, or a directory with one, at `path`; None for anything else."""
    if path.is_file():
        with open_file(path, error=ModelError) as file:
            found = path if file.read(4) == b"GGUF" else None
    else:
        found = next(iter(sorted(path.glob("*.gguf"))), None)
    if found is None:
        return None
    return (
        f"{path} is a GGUF model of llama.cpp: give the original it was made from, or load it with"
        f" transformers (from_pretrained(DIR, gguf_file={shortened(found.name, 60)!r})), which"
        " dequantizes it, and give the directory that save_pretrained writes"
    )


def original_name(name: str) -> str | None:
    """The name of a quantized model without the suffix of its quantization; None if it has none.

    The owner of the repository is kept only if it publishes the originals, too. Other owners only
    quantize.
    """
    owner, _, last = name.rstrip("/").rpartition("/")
    original = _SUFFIX.sub("", last)
    if original in (last, ""):
        return None
    return f"{owner}/{original}" if owner == _UNSLOTH else original


def _advice(method: str, original: str | None) -> str:
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


def _config(directory: Path) -> Mapping[str, Any]:
    try:
        return read_json(directory / MODEL_CONFIG_NAME, error=ModelError, finite=False)
    except ModelError:
        return {}  # reported by the code that needs it


def _method(config: Mapping[str, Any]) -> str | None:
    """transformers' name of the quantization method that config.json declares."""
    inner = config.get("text_config")
    for values in (config, inner if isinstance(inner, Mapping) else {}):
        for field in ("quantization_config", "compression_config"):
            settings = values.get(field)
            if not isinstance(settings, Mapping) or not settings:
                continue
            if isinstance(method := settings.get("quant_method"), str):
                return BITSANDBYTES if method.startswith(BITSANDBYTES) else method.lower()
            if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
                return BITSANDBYTES
            return "compressed-tensors" if field == "compression_config" else "unknown"
        if isinstance(settings := values.get("quantization"), Mapping) and "group_size" in settings:
            return "mlx"
    return None


def _method_of_tensors(directory: Path) -> str | None:
    try:
        tensors = base_tensors(directory)
    except LoraDeployError:
        return None  # reported by the code that reads it
    for name, tensor in tensors.items():
        for ending, method in _QUANTIZED_ENDINGS.items():
            if name.endswith(ending):
                return method
        if tensor.dtype in _FLOAT8:
            return "fp8"
        if tensor.dtype in _INTEGERS and name.endswith(".weight"):
            return "integers"
    return None


def _original(names: Iterable[str | None]) -> str | None:
    """The first original name that follows from `names`, preferably one with its owner."""
    found = [original for name in names if name and (original := original_name(name)) is not None]
    return next((name for name in found if "/" in name), found[0] if found else None)
