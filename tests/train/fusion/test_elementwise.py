"""The functions of few passes equal the separate operations and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from loradeploy.train.fusion import elementwise
from loradeploy.train.fusion.elementwise import gated_silu, rms_norm
from tests.tolerances import tolerance

EPSILON = 1e-5


def plain_norm(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def result_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, inputs, torch.cos(y.detach()))]


@pytest.fixture(params=[3, 128], ids=["chunks-of-3", "one-chunk"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "_ROWS", request.param)


@pytest.mark.usefixtures("chunks")
def test_the_gradients_are_those_of_finite_differences() -> None:
    x, w = random(2, 4, 6, dtype=torch.float64), random(6, dtype=torch.float64).detach()
    gate, up = (random(2, 4, 6, dtype=torch.float64, seed=seed) for seed in (1, 2))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, w, EPSILON), (x,))
    assert torch.autograd.gradcheck(gated_silu, (gate, up))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_rms_norm_equals_the_separate_operations(scale: float) -> None:
    x, w = random(2, 5, 64), random(64, seed=1).detach()
    x = (scale * x.detach()).requires_grad_()
    ours = result_and_gradients(lambda x: rms_norm(x, w, EPSILON), x)
    theirs = result_and_gradients(lambda x: plain_norm(x, w), x)
    for one, other in zip(ours, theirs, strict=True):
        limit = tolerance("same-torch") * float(other.detach().abs().max())
        torch.testing.assert_close(one, other, atol=limit, rtol=0)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_gated_activation_equals_the_separate_operations_bit_for_bit(
    dtype: torch.dtype,
) -> None:
    gate, up = (random(2, 5, 64, dtype=dtype, seed=seed) for seed in (1, 2))
    ours = result_and_gradients(gated_silu, gate, up)
    theirs = result_and_gradients(lambda gate, up: silu(gate) * up, gate, up)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_inputs_and_gradients_that_are_not_contiguous_are_accepted() -> None:
    gate, up = (random(4, 6, seed=seed).T for seed in (1, 2))
    slope = random(4, 6, seed=3).detach().T
    w = random(4).detach()
    for ours, theirs in (
        (gated_silu(gate, up), silu(gate) * up),
        (rms_norm(gate, w, EPSILON), plain_norm(gate, w)),
    ):
        gradients = [
            torch.autograd.grad(y, gate, slope, retain_graph=True)[0] for y in (ours, theirs)
        ]
        torch.testing.assert_close(*gradients, atol=tolerance("same-torch"), rtol=1e-5)
