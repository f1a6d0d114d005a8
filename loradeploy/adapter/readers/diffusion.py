"""Text encoders' LoRAs as kohya's sd-scripts and diffusers write them.

lora_te_<module, dots as underscores>.lora_down.weight|lora_up.weight|alpha     kohya; te1, te2
text_encoder.<module>.lora_linear_layer.down.weight|up.weight                   diffusers, older
text_encoder.<module>.lora_A.weight|lora_B.weight, and alpha                    diffusers; _2, _3

s = alpha / rank, or 1 without alpha. diffusers stores PEFT's config in the header (`header`).
Without that, it replaces a missing alpha by the rank of the first module, or by the alpha of
another one: files in which that is not the module's own rank are refused. Names with underscores
are resolved with the module names of the base.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.readers.header import CONFIG, alpha_in, config_in
from loradeploy.adapter.readers.source import Source, adapter_of, check_complete, halves
from loradeploy.adapter.scaling import scaling
from loradeploy.errors import AdapterError, listed_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.adapter.config import AdapterConfig

_KOHYA: Final = re.compile(r"lora_(te\d?|unet)_(.+)")
_DIFFUSERS: Final = re.compile(r"(text_encoder(?:_\d)?|unet|transformer)\.(.+)")
_ENDINGS: Final = {
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_magnitude_vector": "magnitude",
    ".dora_scale": "magnitude",
    ".alpha": "alpha",
}
_IMAGES: Final = ("unet", "transformer")


def read(source: Source) -> Adapter:
    """The adapter of the chosen text encoder."""
    found = {key: _KOHYA.fullmatch(key) or _DIFFUSERS.fullmatch(key) for key in source.shapes}
    if unknown := sorted(key for key, match in found.items() if match is None):
        raise AdapterError(f"{unknown[0]} is not part of a LoRA of a text encoder")
    chosen = source.choose(match[1] for match in found.values() if match)
    if chosen in _IMAGES:
        raise AdapterError(
            f"{chosen} is a diffusion model, which is not exported here: fuse it with diffusers"
            " (load_lora_weights, fuse_lora) and export that"
        )
    keys = {match[2]: key for key, match in found.items() if match and match[1] == chosen}
    modules, others = halves(keys, _ENDINGS)
    check_complete(modules, others)
    underscored = any(key.startswith("lora_te") for key in keys.values())
    named = underscored or source.base is not None
    names = _in_base(source, list(modules)) if named else {m: m for m in modules}
    config = config_in(source.header, _component(chosen))
    if underscored and config is not None and (config.rank_pattern or config.alpha_pattern):
        raise AdapterError(
            "the config in its header has patterns for names with dots, and the file has"
            " underscores: save it in diffusers' form"
        )
    factors, scalings, without_alpha = {}, {}, []
    for module, parts in modules.items():
        if "magnitude" in parts:
            raise AdapterError(
                f"{module} has DoRA's magnitude, which is not supported in this form"
            )
        A, B = (_matrix(source.array(keys[parts[half]]), module) for half in "AB")
        alpha = None
        if "alpha" in parts:
            alpha = float(source.array(keys[parts["alpha"]]).reshape(()))
        else:
            without_alpha.append(module)
        factors[names[module]] = Factors(A, B)
        scalings[names[module]] = _scaling(source, config, module, len(A), alpha)
    if not underscored and config is None and without_alpha:
        ranks = sorted({pair.rank for pair in factors.values()})
        _check_one_scaling(without_alpha, ranks, others=len(factors) - len(without_alpha))
    return adapter_of(factors, scalings)


def _check_one_scaling(without_alpha: list[str], ranks: list[int], *, others: int) -> None:
    """Raise AdapterError if diffusers may scale the modules without alpha by an s other than 1.

    `others`: the number of modules that have an alpha.
    """
    if len(ranks) == 1 and not others:
        return
    first = f"{without_alpha[0]} has no alpha"
    reason = (
        f"{others} other modules have one"
        if others
        else f"the modules have ranks of {', '.join(map(str, ranks))}"
    )
    raise AdapterError(
        f"{first}, and {reason}: its alpha in training is not known, and diffusers takes"
        f" that of another module. Add the tensors <module>.alpha, or {CONFIG} to the header"
    )


def _component(chosen: str) -> str:
    """diffusers' name of a text encoder that kohya's files call te, te1, te2, …"""
    if chosen in ("te", "te1"):
        return "text_encoder"
    return re.sub(r"^te(\d)$", r"text_encoder_\1", chosen)


def _scaling(
    source: Source, config: AdapterConfig | None, module: str, rank: int, alpha: float | None
) -> float:
    """s of `module`, from the header's `config` and from the tensor `alpha`. They must agree."""
    # sd-scripts uses the rank if alpha is missing or 0.
    of_tensor = (alpha or rank) / rank
    if config is not None:
        if config.rank_of(module) != rank:
            raise AdapterError(
                f"{module}: lora_A has {rank} rows, the rank in its header is"
                f" {config.rank_of(module)}"
            )
        s = scaling(config, module)
        # alpha may be stored as bfloat16, with 8 bits of precision.
        if alpha is not None and not math.isclose(s, of_tensor, rel_tol=2**-8):
            raise AdapterError(
                f"{module}: its alpha of {alpha:g} scales by {of_tensor:g}, the config in its"
                f" header by {s:g}: remove the wrong one"
            )
        return s
    stated = alpha_in(source.header) if alpha is None else None
    if stated is not None and (stated[1] or rank) != rank:
        raise AdapterError(
            f"{module} has no alpha, which means its rank of {rank}, but {stated[0]} in the header"
            f" is {stated[1]:g}: add the tensor {module}.alpha, or remove {stated[0]}"
        )
    return of_tensor


def _matrix(values: NDArray[Any], module: str) -> NDArray[Any]:
    if values.ndim != 2:
        raise AdapterError(f"{module}: a factor is {list(values.shape)}, expected a matrix")
    return np.ascontiguousarray(values)


def _in_base(source: Source, written: list[str]) -> dict[str, str]:
    """Map each name in the file to the one module of the base that it stands for."""
    base = source.needs_base("the names in the file have underscores for dots")
    spelled: dict[str, list[str]] = {}
    for module in base.modules:
        spelled.setdefault(_spelled(module), []).append(module)
    found = {name: spelled.get(_spelled(name), []) for name in written}
    unclear = [name for name, modules in found.items() if len(modules) != 1]
    if unclear:
        candidates = listed_names(found[unclear[0]], 2, none="not a module")
        raise AdapterError(
            f"{unclear[0]} is {candidates} of {base.directory}: give the base that the adapter was"
            " trained on"
        )
    return {name: modules[0] for name, modules in found.items()}


def _spelled(module: str) -> str:
    # transformers 5 names the modules of CLIP's text encoder without this prefix.
    return module.replace(".", "_").removeprefix("text_model_")
