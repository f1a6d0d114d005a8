"""Replace the forward pass of a model's RMSNorms, gated MLPs and attention by fused functions.

Whether a module computes one of these is measured, not derived from its name: on random inputs, the
function must give what the module gives. Other modules are left as they are, and so are calls with
more inputs than the trial's, such as the gate of Mamba-2's norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loradeploy.lora.quiet import quiet
from loradeploy.train.fusion.attention import recorded
from loradeploy.train.fusion.elementwise import rms_norm
from loradeploy.train.fusion.layers import of_gated, outputs

# Of the trial's inputs: at small ones an epsilon shows, at large ones a limit of the activation.
_SCALES: Final = (1e-3, 1.0, 30.0, 1e4)
_ROWS: Final = 3
# Relative to the largest output. The two differ only by rounding.
_SAME: Final = 1e-5

_Forward = Callable[[Tensor], Tensor]


def fuse(model: PreTrainedModel) -> int:
    """Use the fused functions in `model` where they compute the same, on a CPU.

    A module that an adapter trains in full keeps its own forward pass. Returns the number of
    changed modules.
    """
    changed = 0
    with quiet():
        for module in model.modules():
            forward = _norm(module) or _gated_mlp(module) or _attention(module)
            if forward is not None:
                module.forward = forward
                changed += 1
    return changed


def _norm(module: nn.Module) -> _Forward | None:
    """The forward pass of `module` if it is a float32 RMSNorm, with its weight w or 1 + w."""
    weight, own = getattr(module, "weight", None), module.forward
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if (
        [name for name, _ in module.named_parameters()] != ["weight"]
        or not isinstance(weight, nn.Parameter)
        or weight.ndim != 1
        or weight.dtype != torch.float32
        or not isinstance(epsilon, float)
    ):
        return None

    def offset_by(offset: float) -> _Forward:
        def function(x: Tensor) -> Tensor:
            w = cast(Tensor, module.weight)
            return rms_norm(x, w + offset if offset else w, epsilon)

        return function

    function = next(
        (f for f in map(offset_by, (0.0, 1.0)) if _same(module, f, weight.numel())), None
    )
    if function is None:
        return None

    def forward(x: Tensor, *more: Any, **named: Any) -> Tensor:
        w: Any = module.weight
        fused = x.device.type == "cpu" and x.dtype == w.dtype and not w.requires_grad
        plain = fused and not more and not named
        y: Tensor = function(x) if plain else own(x, *more, **named)
        return y

    return forward


def _gated_mlp(module: nn.Module) -> _Forward | None:
    """The forward pass of `module` if it is down(silu(gate(x)) · up(x))."""
    own, projected = module.forward, cast(Any, module)
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Linear) for part in parts):
        return None

    def function(x: Tensor) -> Tensor:
        # The layers are looked up in each call, because an adapter replaces them.
        gate, up = outputs(x, [projected.gate_proj, projected.up_proj])
        return of_gated(gate, up, projected.down_proj)

    if not _same(module, function, projected.gate_proj.in_features):
        return None

    def forward(x: Tensor, *more: Any, **named: Any) -> Tensor:
        plain = x.device.type == "cpu" and not more and not named
        y: Tensor = function(x) if plain else own(x, *more, **named)
        return y

    return forward


def _attention(module: nn.Module) -> Callable[..., Any] | None:
    """The forward pass of `module` if it is attention with rotated queries and keys."""
    return None if "forward" in vars(module) else recorded(module)


@torch.no_grad()
def _same(module: nn.Module, function: _Forward, size: int) -> bool:
    """Whether `function` gives the outputs that `module` has in training."""
    parameter = next(module.parameters())
    if parameter.device.type != "cpu" or "forward" in vars(module):
        return False
    generator = torch.Generator().manual_seed(0)
    training = module.training
    module.train()  # a dropout would make the outputs differ
    try:
        for scale in _SCALES:
            x = scale * torch.randn((1, _ROWS, size), generator=generator).to(parameter.dtype)
            expected = module(x)
            limit = _SAME * float(expected.abs().max())
            if not torch.allclose(function(x), expected, rtol=0, atol=limit):
                return False
    except Exception:  # another kind of module may raise anything
        return False
    finally:
        module.train(training)
    return True
