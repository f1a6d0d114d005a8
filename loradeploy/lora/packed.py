"""Frozen weights that bitsandbytes holds in 8 or 4 bits, as numbers again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Final, cast

from torch import Tensor, nn


def is_packed(layer: nn.Module) -> bool:
    """Whether the weight of `layer` is held in 8 or 4 bits."""
    return type(layer.weight).__name__ in _UNPACK


def dense(layer: nn.Module) -> Tensor:
    """The weight of `layer` in its own shape and without a gradient, unpacked if it is packed."""
    unpack = _UNPACK.get(type(layer.weight).__name__)
    return cast(Tensor, layer.weight).detach() if unpack is None else unpack(layer)


def _eight_bits(layer: Any) -> Tensor:
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    unpacked: Tensor = _functions().int8_vectorwise_dequant(layer.weight.data, scales)
    return unpacked


def _four_bits(layer: Any) -> Tensor:
    unpacked: Tensor = _functions().dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return unpacked


def _functions() -> Any:
    return import_module("bitsandbytes.functional")


# By the class of the weight: whether there is one can be told without importing the library.
_UNPACK: Final[Mapping[str, Callable[[Any], Tensor]]] = {
    "Int8Params": _eight_bits,
    "Params4bit": _four_bits,
}
