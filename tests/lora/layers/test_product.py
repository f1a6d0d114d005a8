"""The autograd function of LoRA computes the equation and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from loradeploy.lora.layers.linear import LoraLinear
from loradeploy.lora.layers.low_rank import LowRankLayer
from loradeploy.lora.layers.product import LowRank, low_rank_linears
from tests.tolerances import tolerance


def operands(dtype: torch.dtype, *, factors: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, W, b = random(2, 5, 6).to(dtype), random(4, 6).to(dtype), random(4).to(dtype)
    A, B = random(3, 6).to(factors), random(4, 3).to(factors)
    return [x.requires_grad_(), W, b, A.requires_grad_(), B.requires_grad_()]


def together(x: Tensor, *layer: Any) -> Tensor:
    return low_rank_linears(x, [LowRank(*layer)])[0]


def plainly(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
    y = linear(x, W, b)
    return (y + s * linear(linear(x.to(A.dtype), A), B)).to(y.dtype)


def test_the_gradients_are_those_of_finite_differences() -> None:
    x, W, b, A, B = operands(torch.float64, factors=torch.float64)
    assert torch.autograd.gradcheck(lambda x, A, B: together(x, W, b, A, B, 1.7), (x, A, B))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("width", "row"),
    [(torch.float32, "same-torch"), (torch.bfloat16, "bf16-rounding")],
    ids=["fp32", "bf16"],
)
def test_the_function_equals_the_explicit_equation(
    width: torch.dtype, row: str, bias: bool
) -> None:
    results = []
    for product in (together, plainly):
        x, W, b, A, B = operands(width, factors=torch.float32)
        y = product(x, W, b if bias else None, A, B, 0.5)
        y.float().square().sum().backward()
        results.append([y, x.grad, A.grad, B.grad])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and theirs is not None and ours.dtype == theirs.dtype
        limit = tolerance(row) * float(theirs.detach().abs().max())
        torch.testing.assert_close(ours, theirs, atol=limit, rtol=0)


@pytest.mark.parametrize("width", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_layers_of_one_input_equal_the_layers_one_by_one(width: torch.dtype) -> None:
    """Layers of other sizes, ranks and scalings; the sum of the gradients of x is theirs."""
    wide = torch.float64 if width == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 5, 6), generator=generator).to(width).requires_grad_()
    layers = [
        LowRank(
            torch.randn((out, 6), generator=generator).to(width),
            torch.randn(out, generator=generator).to(width) if out == 3 else None,
            torch.randn((rank, 6), generator=generator).to(wide).requires_grad_(),
            torch.randn((out, rank), generator=generator).to(wide).requires_grad_(),
            s,
        )
        for out, rank, s in ((4, 3, 0.5), (3, 1, 2.0), (7, 2, 0.25))
    ]
    trained = [x, *(tensor for layer in layers for tensor in (layer.A, layer.B))]
    results = []
    for ys in (
        low_rank_linears(x, layers),
        [together(x, *vars(layer).values()) for layer in layers],
    ):
        total = sum(y.double().square().sum() for y in ys)
        results.append([*ys, *torch.autograd.grad(total, trained)])
    limit = tolerance("same-torch" if width == torch.float64 else "bf16-rounding")
    for ours, theirs in zip(*results, strict=True):
        most = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours, theirs, atol=limit * most, rtol=0)


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    x, W, b, A, B = operands(torch.float32, factors=torch.float32)
    together(x.detach(), W, b, A, B, 0.5).sum().backward()
    assert x.grad is None and A.grad is not None and B.grad is not None


def test_no_rows_have_gradients_of_zeros() -> None:
    """As the tokens of an expert to which a batch sends none."""
    x, W, b, A, B = operands(torch.float32, factors=torch.float32)
    none = x.detach()[:0].requires_grad_()
    y = together(none, W, b, A, B, 0.5)
    y.sum().backward()
    assert none.grad is not None and none.grad.shape == none.shape and not y.numel()
    assert A.grad is not None and not A.grad.any()


BASES = {
    "linear": lambda: nn.Linear(6, 4),
    "linear-without-bias": lambda: nn.Linear(6, 4, bias=False),
    "conv1d": lambda: Conv1D(4, 6),
}


def layer_on(base: nn.Module, method: bool | str = True) -> LoraLinear:
    layer = LoraLinear(base.requires_grad_(False), 3, 0.5)
    layer.initialize(method, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.lora_B.add_(0.1)
    return layer


@pytest.mark.parametrize("method", [True, "pissa"], ids=["lora", "pissa"])
@pytest.mark.parametrize("base", BASES)
def test_a_layer_computes_the_same_with_and_without_the_function(base: str, method: str) -> None:
    torch.manual_seed(0)
    layer = layer_on(BASES[base](), method)
    x = torch.randn(2, 5, 6, requires_grad=True)
    assert layer._is_one_product(x)
    trained = [x, layer.lora_A, layer.lora_B]
    results = []
    for y in (layer(x), LowRankLayer.forward(layer, x)):
        results.append([y, *torch.autograd.grad(y.square().sum(), trained)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance("same-torch"), rtol=1e-5)


def test_special_cases_do_not_use_the_function() -> None:
    x = torch.randn(2, 6)
    hooked, trained_bias, dropping = (layer_on(nn.Linear(6, 4)) for _ in range(3))
    hooked.base.register_forward_hook(lambda *_: None)
    trained_bias.base.bias.requires_grad_(True)
    dropping.dropout.p = 0.5
    merged = layer_on(nn.Linear(6, 4))
    merged.merge()
    half = layer_on(nn.Linear(6, 4).bfloat16())
    assert not any(
        layer._is_one_product(x) for layer in (hooked, trained_bias, dropping, merged, half)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert not layer_on(nn.Linear(6, 4))._is_one_product(x)
