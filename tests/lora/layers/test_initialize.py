"""Initialization of adapters: at the base function, and as defined in the papers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from loradeploy.adapter import AdapterConfig, load_adapter, save_adapter
from loradeploy.adapter.algebra.delta import update
from loradeploy.errors import UsageError
from loradeploy.lora.inject import copy_into, inject
from loradeploy.lora.layers.initialize import initialization
from loradeploy.train.loop.trainer import parameter_groups
from tests.lora import tiny
from tests.tolerances import tolerance

METHODS = [True, "gaussian", "pissa", "pissa_niter_4", "olora"]
W = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)) @ torch.diag(
    0.8 ** torch.arange(40.0)
)


def begin(method: bool | str, rank: int = 4, s: float = 2.0, seed: int = 0) -> Any:
    return initialization(method)(W, rank, s, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
def test_an_initialization_has_the_shapes_of_the_rank(method: bool | str) -> None:
    A, B = begin(method)
    assert (A.shape, B.shape, A.dtype, B.dtype) == ((4, 40), (24, 4), torch.float32, torch.float32)
    assert A.any()
    assert bool(B.any()) == (method not in (True, "gaussian"))


def test_kaiming_and_gaussian_have_their_variance() -> None:
    wide = torch.empty(8, 4000)
    A, _ = initialization(True)(wide, 64, 1.0, torch.Generator().manual_seed(0))
    assert float(A.abs().max()) == pytest.approx(1 / math.sqrt(4000), rel=0.01)
    A, _ = initialization("gaussian")(wide, 64, 1.0, torch.Generator().manual_seed(0))
    assert float(A.std()) == pytest.approx(1 / 64, rel=0.01)


@pytest.mark.parametrize(("method", "error"), [("pissa", 1e-5), ("pissa_niter_4", 1e-3)])
def test_pissa_starts_at_the_principal_part(method: str, error: float) -> None:
    A, B = begin(method)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    assert tiny.difference(2.0 * B @ A, (U[:, :4] * S[:4]) @ Vh[:4]) <= error * float(S[0])
    assert tiny.difference(B.norm(dim=0), A.norm(dim=1)) <= 1e-4, "half of each value to a side"


def test_olora_starts_with_an_orthonormal_b() -> None:
    A, B = begin("olora")
    assert tiny.difference(B.T @ B, torch.eye(4)) <= 1e-5
    Q, R = torch.linalg.qr(W)
    assert tiny.difference(B @ A, Q[:, :4] @ R[:4]) <= 1e-5


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_4", "olora"])
def test_a_rank_above_that_of_the_weight_is_refused(method: str) -> None:
    with pytest.raises(UsageError, match=r"\[24, 40\] has no part of rank 25"):
        begin(method, rank=25)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_the_initialization_equals_that_of_peft(method: str) -> None:
    peft = pytest.importorskip("peft")
    fields = {"r": 4, "lora_alpha": 6, "init_lora_weights": method}
    theirs = peft.get_peft_model(
        tiny.model("llama"), peft.LoraConfig(target_modules=["q_proj", "down_proj"], **fields)
    )
    config = AdapterConfig(target_modules=("q_proj", "down_proj"), **fields)
    for name, layer in inject(tiny.model("llama"), config).layers.items():
        other = theirs.base_model.model.get_submodule(name)
        B, A = (half["default"].weight.detach() for half in (other.lora_B, other.lora_A))
        delta = other.scaling["default"] * B @ A
        ours = (layer.scaling * layer.lora_B @ layer.lora_A).detach()
        assert tiny.difference(ours, delta) <= 1e-5
        assert float(delta.abs().max()) > 0.1


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_pissa_and_olora_convert_to_a_plain_adapter_of_twice_the_rank(
    name: str, method: str, rslora: bool
) -> None:
    targets = {"llama": ("q_proj", "embed_tokens"), "gpt2": ("c_fc",), "vit": ("projection",)}
    last = {"llama": "q_proj", "gpt2": "c_fc", "vit": "projection"}[name]
    config = AdapterConfig(
        r=3,
        lora_alpha=5,
        target_modules=targets[name],
        rank_pattern={last: 2},
        alpha_pattern={last: 7},
        init_lora_weights=method,
        use_rslora=rslora,
    )
    base = tiny.model(name)
    injection = inject(base, config, seed=1)
    before = injection.adapter()
    tiny.train(base, name, injection.parameters())
    adapter = injection.adapter()
    assert not adapter.changes_base
    for module, pair in adapter.factors.items():
        assert pair.rank == 2 * config.rank_of(module)
        layer = injection.layers[module]
        assert adapter.scaling(module) == pytest.approx(layer.scaling, rel=1e-12)
        fresh = before.factors[module]
        nothing = update(fresh, 1.0)
        assert abs(nothing).max() <= tolerance("same-torch"), "training begins at the base"
        assert abs(update(pair, 1.0)).max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_can_be_loaded_into_an_injection(
    method: bool | str, tmp_path: Path
) -> None:
    config = AdapterConfig(
        r=4, target_modules=("q_proj", "embed_tokens"), use_dora=True, init_lora_weights=method
    )
    base = tiny.model("llama")
    injection = inject(base, config, seed=1)
    tiny.train(base, "llama", injection.parameters())
    half_way = tiny.logits(base, "llama")
    digest = save_adapter(injection.adapter(), tmp_path / "a")
    tiny.train(base, "llama", injection.parameters())
    assert not torch.equal(tiny.logits(base, "llama"), half_way)

    again = tiny.model("llama")
    other = inject(again, config, seed=7)
    copy_into(other, load_adapter(tmp_path / "a"))
    assert torch.equal(tiny.logits(again, "llama"), half_way)
    assert other.adapter().digest == digest
    for one, two in zip(injection.parameters(), other.parameters(), strict=True):
        assert one.shape == two.shape


@pytest.mark.parametrize("method", [True, "pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_every_method_trains_on_a_base_in_half_precision(
    name: str, dora: bool, method: bool | str
) -> None:
    targets = {"llama": ("q_proj", "embed_tokens"), "gpt2": ("c_fc",), "vit": ("projection",)}
    base = tiny.model(name).to(torch.bfloat16)
    config = AdapterConfig(
        r=3, target_modules=targets[name], use_dora=dora, init_lora_weights=method
    )
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    injection = inject(base, config, seed=1)
    assert {p.dtype for p in injection.parameters()} == {torch.float32}
    with torch.no_grad():
        start = tiny.loss(base, name).float().item()
    tiny.train(base, name, injection.parameters(), steps=6)
    assert tiny.logits(base, name).dtype == torch.bfloat16
    assert tiny.loss(base, name).float().item() < start
    injection.remove()
    assert all(torch.equal(base.state_dict()[key], value) for key, value in weights.items())


def test_b_learns_faster_with_lora_plus() -> None:
    config = AdapterConfig(
        r=4,
        target_modules=("q_proj", "embed_tokens"),
        use_dora=True,
        bias="all",
        modules_to_save=("lm_head",),
    )
    injection = inject(tiny.model("llama"), config)
    groups = parameter_groups(injection, 1e-3, 16, weight_decay=0.1)

    def rate(parameter: Any) -> tuple[float, float]:
        (found,) = [g for g in groups if any(p is parameter for p in g["params"])]
        return found["lr"], found["weight_decay"]

    q_proj = injection.layers["model.layers.0.self_attn.q_proj"]
    words = injection.layers["model.embed_tokens"]
    assert rate(q_proj.lora_A) == (1e-3, 0.1)
    assert rate(q_proj.lora_B) == (16e-3, 0.1)
    assert rate(q_proj.magnitude) == (16e-3, 0.1)
    assert rate(words.lora_A) == rate(words.lora_B) == (1e-3, 0.1)
    assert rate(injection.saved["lm_head.weight"]) == (1e-3, 0.1)
    assert rate(injection.saved["model.layers.1.self_attn.q_proj.bias"]) == (16e-3, 0.0)
    assert sum(len(group["params"]) for group in groups) == len(injection.parameters())


def test_biases_of_factors_are_not_decayed() -> None:
    config = AdapterConfig(r=4, target_modules=("c_fc",), lora_bias=True)
    injection = inject(tiny.model("gpt2"), config)
    groups = parameter_groups(injection, 1e-3, 16, weight_decay=0.1)
    own = [layer.lora_bias for layer in injection.layers.values()]
    (found,) = [g for g in groups if any(p is own[0] for p in g["params"])]
    assert (found["lr"], found["weight_decay"]) == (16e-3, 0.0)
    assert all(any(p is bias for p in found["params"]) for bias in own)


def test_lora_plus_with_equal_rates_is_plain_training() -> None:
    config = AdapterConfig(r=4, target_modules=("q_proj",))
    logits = []
    for grouped in (False, True):
        base = tiny.model("llama")
        injection = inject(base, config, seed=1)
        what = (
            parameter_groups(injection, 1e-2, 1.0, weight_decay=0.0)
            if grouped
            else injection.parameters()
        )
        optimizer = torch.optim.AdamW(what, lr=1e-2, weight_decay=0)
        for _ in range(3):
            optimizer.zero_grad()
            tiny.loss(base, "llama").backward()
            optimizer.step()
        logits.append(tiny.logits(base, "llama"))
    assert torch.equal(*logits)


def test_doras_norm_is_not_rounded_under_autocast() -> None:
    config = AdapterConfig(r=4, target_modules=("q_proj",), use_dora=True)
    base = tiny.model("llama")
    (layer, *_) = inject(
        base, dataclasses.replace(config, init_lora_weights="olora")
    ).layers.values()
    plain = layer.output_scale()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.output_scale(), plain)
