"""The functions of few passes equal the separate operations and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from loradeploy.lora.layers.product import LowRank, low_rank_linears
from loradeploy.train.fusion import elementwise
from loradeploy.train.fusion.elementwise import gated_low_rank_linear, gated_silu, rms_norm, rotated
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
    W, A, B = (random(*shape, dtype=torch.float64) for shape in ((5, 6), (2, 6), (5, 2)))

    def down(gate: Tensor, up: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return gated_low_rank_linear(gate, up, LowRank(W.detach(), None, A, B, 0.5))

    assert torch.autograd.gradcheck(down, (gate, up, A, B))
    heads, turns = random(2, 5, 3, 4, dtype=torch.float64), random(2, 5, 4, dtype=torch.float64)
    cos, sin = turns.detach().cos(), turns.detach().sin()
    assert torch.autograd.gradcheck(lambda x: rotated(x, cos, sin), (heads,))


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


@pytest.mark.usefixtures("chunks")
def test_the_layer_of_a_gated_activation_equals_the_layer_of_its_result() -> None:
    gate, up = (random(2, 5, 64, seed=seed) for seed in (1, 2))
    W, b = random(32, 64, seed=3).detach(), random(32, seed=4).detach()
    A, B = random(4, 64, seed=5), random(32, 4, seed=6)

    def ours(gate: Tensor, up: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return gated_low_rank_linear(gate, up, LowRank(W, b, A, B, 0.5))

    def theirs(gate: Tensor, up: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return low_rank_linears(silu(gate) * up, [LowRank(W, b, A, B, 0.5)])[0]

    results = [result_and_gradients(function, gate, up, A, B) for function in (ours, theirs)]
    for one, other in zip(*results, strict=True):
        limit = tolerance("same-torch") * float(other.detach().abs().max())
        torch.testing.assert_close(one, other, atol=limit, rtol=0)


def test_no_rows_have_gradients_of_zeros() -> None:
    gate, up = (random(0, 64, seed=seed) for seed in (1, 2))
    W, A, B = random(32, 64, seed=3).detach(), random(4, 64, seed=5), random(32, 4, seed=6)
    y = gated_low_rank_linear(gate, up, LowRank(W, None, A, B, 0.5))
    dg, du, dA = torch.autograd.grad(y.sum(), [gate, up, A])
    assert y.shape == (0, 32) and dg.shape == du.shape == (0, 64) and not dA.any()


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("rows", [1, 2], ids=["positions-of-the-batch", "positions-of-a-row"])
def test_rotated_equals_the_function_of_transformers(rows: int) -> None:
    x, angles = random(2, 7, 3, 8), random(rows, 7, 8, seed=1).detach()
    cos, sin = angles.cos(), 1.5 * angles.sin()  # the halves differ

    def theirs(x: Tensor) -> Tensor:
        both = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
        return both[0]

    ours = result_and_gradients(lambda x: rotated(x, cos, sin), x)
    for one, other in zip(ours, result_and_gradients(theirs, x), strict=True):
        torch.testing.assert_close(one, other, atol=tolerance("same-torch"), rtol=0)


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
