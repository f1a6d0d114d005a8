"""A frozen base in 8 or 4 bits under an adapter of full width (QLoRA).

Dettmers et al., 2022 (arXiv:2208.07339) for int8, by vectors; Dettmers et al., 2023
(arXiv:2305.14314) for int4: the NormalFloat of 4 bits, with double quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any, Final

import torch
from torch import nn

from loradeploy.adapter import AdapterConfig
from loradeploy.adapter.targets import is_saved
from loradeploy.errors import MissingDependencyError, UsageError
from loradeploy.lora.inject import linear_modules
from loradeploy.lora.quiet import quiet


def quantize(model: nn.Module, width: str, *, keep: Collection[str] = ()) -> list[str]:
    """Pack the weights of `model`'s nn.Linear layers, but its output head and `keep`, for good.

    `width`: "int8", or "int4", which leaves layers alone whose inputs are no multiple of 64. To be
    called before an adapter is injected; `keep` names the modules that are to be trained whole.
    The names of what was packed come back.

    Raises:
        UsageError: another width, or nothing to pack.
        MissingDependencyError: bitsandbytes is not installed.
    """
    if width not in _PACK:
        raise UsageError(f"a base in {width!r} is unknown: use {', '.join(_PACK)}")
    try:
        with quiet():
            library = import_module("bitsandbytes").nn
    except ImportError:
        raise MissingDependencyError(
            f"for a base in {width} bitsandbytes is needed: pip install bitsandbytes"
        ) from None
    modules = dict(model.named_modules())
    config = AdapterConfig(task_type="SEQ_CLS", modules_to_save=tuple(keep))
    packed = [
        name
        for name in linear_modules(model, config)
        if _fits(modules[name], width) and not is_saved(f"{name}.weight", config)
    ]
    if not packed:
        raise UsageError(f"the model has no linear layers that could be held in {width}")
    for name in packed:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _packed(library, modules[name], width))
    return packed


def _fits(layer: nn.Module, width: str) -> bool:
    # bitsandbytes 0.50.2 reads other widths back wrongly on a CPU: in_features 96 or 48 for one.
    return type(layer) is nn.Linear and (width != "int4" or layer.in_features % _BLOCK == 0)


def _packed(library: Any, layer: Any, width: str) -> Any:
    # On the meta device: the new layer's own weight would be made for nothing.
    with torch.device("meta"):
        new = _PACK[width](library, layer, layer.weight)
    new.bias = layer.bias
    return new.to(layer.weight.device).train(layer.training)


def _eight_bits(library: Any, layer: Any, weight: Any) -> Any:
    new = library.Linear8bitLt(
        layer.in_features, layer.out_features, bias=False, has_fp16_weights=False
    )
    new.weight = library.Int8Params(weight.data, requires_grad=False, has_fp16_weights=False)
    return new


def _four_bits(library: Any, layer: Any, weight: Any) -> Any:
    new = library.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=weight.dtype,
        quant_type="nf4",
    )
    new.weight = library.Params4bit(weight.data, requires_grad=False, quant_type="nf4")
    # bitsandbytes 0.50 repacks a weight on CPUs with AVX512-BF16 once it is evaluated: to other
    # numbers, in a form that cannot be read back, and not at all where it has under 64 inputs.
    new.support_avx512bf16_for_cpu = False
    return new


_BLOCK: Final = 64  # weights that share a scale in 4 bits

_PACK: Final[Mapping[str, Callable[[Any, Any, Any], Any]]] = {
    "int8": _eight_bits,
    "int4": _four_bits,
}
