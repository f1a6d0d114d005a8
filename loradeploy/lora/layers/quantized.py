"""Quantize the frozen base to 8 or 4 bits under a float32 adapter (QLoRA).

int8: vector-wise quantization (Dettmers et al., 2022, arXiv:2208.07339). int4: NormalFloat of 4
bits with double quantization (Dettmers et al., 2023, arXiv:2305.14314). Both use bitsandbytes,
whose weights are recognized by the name of their class, without importing it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from loradeploy.adapter import AdapterConfig
from loradeploy.adapter.modules.targets import is_saved
from loradeploy.errors import MissingDependencyError, UsageError
from loradeploy.lora.layers.targets import linear_modules
from loradeploy.lora.quiet import quiet

_BLOCK: Final = 64  # number of weights that share a 4-bit scale


def quantize(model: nn.Module, precision: str, *, keep: Collection[str] = ()) -> list[str]:
    """Quantize the nn.Linear layers of `model` in place, and return their names.

    The output head and `keep`, the names of fully trained modules, are not quantized. `precision`:
    "int8", or "int4", which skips layers whose in_features is not a multiple of 64. Call it before
    an adapter is injected.

    Raises:
        UsageError: an unknown precision, or no layer to quantize.
        MissingDependencyError: bitsandbytes is not installed.
    """
    if precision not in _QUANTIZE:
        raise UsageError(
            f"unknown precision {precision!r} of a quantized base: use {', '.join(_QUANTIZE)}"
        )
    try:
        with quiet():
            library = import_module("bitsandbytes").nn
    except ImportError:
        raise MissingDependencyError(
            f"a base in {precision} needs bitsandbytes: pip install 'loradeploy[quantized]'"
        ) from None
    modules = dict(model.named_modules())
    config = AdapterConfig(task_type="SEQ_CLS", modules_to_save=tuple(keep))
    names = [
        name
        for name in linear_modules(model, config)
        if _fits(modules[name], precision) and not is_saved(f"{name}.weight", config)
    ]
    if not names:
        raise UsageError(f"the model has no linear layers that can be quantized to {precision}")
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = _quantized(library, modules[name], precision)
        setattr(model.get_submodule(parent), child, layer)
    return names


def is_quantized(layer: nn.Module) -> bool:
    """Whether the weight of `layer` is quantized to 8 or 4 bits."""
    return type(layer.weight).__name__ in _DEQUANTIZE


def dequantized_weight(layer: nn.Module) -> Tensor:
    """The weight of `layer`, dequantized if needed, in its logical shape and without a gradient.

    Its dtype is that of the layer; for int8 float32, for int4 the dtype before quantization.
    """
    dequantize = _DEQUANTIZE.get(type(layer.weight).__name__)
    return cast(Tensor, layer.weight).detach() if dequantize is None else dequantize(layer)


def _fits(layer: nn.Module, precision: str) -> bool:
    # bitsandbytes 0.50.2 dequantizes other sizes wrongly on a CPU, such as in_features 96 or 48.
    return type(layer) is nn.Linear and (precision != "int4" or layer.in_features % _BLOCK == 0)


def _quantized(library: Any, layer: Any, precision: str) -> Any:
    # On the meta device, because the new layer's initial weight is not used.
    with torch.device("meta"):
        new = _QUANTIZE[precision](library, layer, layer.weight)
    new.bias = layer.bias
    return new.to(layer.weight.device).train(layer.training)


def _to_int8(library: Any, layer: Any, weight: Any) -> Any:
    new = library.Linear8bitLt(
        layer.in_features, layer.out_features, bias=False, has_fp16_weights=False
    )
    new.weight = library.Int8Params(weight.data, requires_grad=False, has_fp16_weights=False)
    return new


def _to_int4(library: Any, layer: Any, weight: Any) -> Any:
    new = library.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=weight.dtype,
        quant_type="nf4",
    )
    new.weight = library.Params4bit(weight.data, requires_grad=False, quant_type="nf4")
    # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a weight in its first evaluation: values
    # change, the weight cannot be dequantized any more, and under 64 inputs it fails.
    new.support_avx512bf16_for_cpu = False
    return new


def _from_int8(layer: Any) -> Tensor:
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    weight: Tensor = _functions().int8_vectorwise_dequant(layer.weight.data, scales)
    return weight


def _from_int4(layer: Any) -> Tensor:
    weight: Tensor = _functions().dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


def _functions() -> Any:
    return import_module("bitsandbytes.functional")


_QUANTIZE: Final[Mapping[str, Callable[[Any, Any, Any], Any]]] = {
    "int8": _to_int8,
    "int4": _to_int4,
}
_DEQUANTIZE: Final[Mapping[str, Callable[[Any], Tensor]]] = {
    "Int8Params": _from_int8,
    "Params4bit": _from_int4,
}
