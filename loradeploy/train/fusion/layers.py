"""Linear layers of a fused module, each of which an adapter may have replaced."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from loradeploy.lora.layers.linear import LoraLinear
from loradeploy.lora.layers.product import LowRank, low_rank_linears
from loradeploy.train.fusion.elementwise import gated_low_rank_linear, gated_silu


def outputs(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """The outputs of `layers` for `x`; together if all have an update that is one product."""
    products = [product for layer in layers if (product := _product(layer, x)) is not None]
    if len(products) < len(layers) or len({product.A.dtype for product in products}) > 1:
        return tuple(layer(x) for layer in layers)
    return low_rank_linears(x, products)


def of_gated(gate: Tensor, up: Tensor, layer: nn.Module) -> Tensor:
    """The output of `layer` for `silu(gate) · up`, which is not kept if this is exact."""
    product = _product(layer, gate)
    if product is None or product.A.dtype != gate.dtype or up.dtype != gate.dtype:
        y: Tensor = layer(gated_silu(gate, up))
        return y
    return gated_low_rank_linear(gate, up, product)


def _product(layer: nn.Module, x: Tensor) -> LowRank | None:
    """The operands of a LoRA layer that is one product for `x`, and whose call has no hooks."""
    return layer.product(x) if isinstance(layer, LoraLinear) and not is_hooked(layer) else None


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of `module` does more than its forward pass."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any(hooks) or bool(module._backward_hooks) or bool(module._backward_pre_hooks)
