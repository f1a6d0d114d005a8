"""LoRA in PyTorch computes the same as PEFT and restores the base unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PhimoeConfig,
)
from transformers.pytorch_utils import Conv1D

from loradeploy.adapter import AdapterConfig, load_adapter, save_adapter
from loradeploy.errors import AdapterMismatchError, UsageError
from loradeploy.lora.inject import adapted, inject, load
from loradeploy.lora.layers.linear import LoraLinear
from loradeploy.lora.layers.targets import is_linear
from tests.conftest import MakeAdapter
from tests.lora.tiny import difference
from tests.tolerances import tolerance

TOKENS = torch.arange(3, 27).reshape(2, 12)

# PEFT adapters by name: the model and the options of PEFT.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-all-linear": ("tiny_llama", {}),
    "llama-list": ("tiny_llama", {"target_modules": ["q_proj", "down_proj"]}),
    "llama-regex": ("tiny_llama", {"target_modules": r".*\.1\..*_proj"}),
    "llama-rslora": ("tiny_llama", {"use_rslora": True, "r": 16}),
    "llama-patterns": (
        "tiny_llama",
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"o_proj": 3}},
    ),
    "llama-layers": (
        "tiny_llama",
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    ),
    "llama-exclude": ("tiny_llama", {"exclude_modules": ["k_proj"]}),
    "llama-head": ("tiny_llama", {"target_modules": ["lm_head", "q_proj"]}),
    "gpt2-conv1d": ("tiny_gpt2", {"fan_in_fan_out": True}),
    "gpt2-tied-head": ("tiny_gpt2", {"target_modules": ["lm_head"]}),
    "bert-classifier": (
        "tiny_bert",
        {"task": "sequence-classification", "num_labels": 3, "modules_to_save": ["classifier"]},
    ),
}


def base_of(directory: Path, options: dict[str, Any]) -> nn.Module:
    if options.get("task") == "sequence-classification":
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            directory, num_labels=options["num_labels"]
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(directory)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request: pytest.FixtureRequest, make_adapter: MakeAdapter) -> tuple[Path, Path, Any]:
    fixture, options = CASES[request.param]
    model = request.getfixturevalue(fixture)
    return model, make_adapter(model, **options), options


def test_an_adapter_by_peft_gives_pefts_logits(case: tuple[Path, Path, Any]) -> None:
    import peft

    model, adapter, options = case
    theirs = logits(peft.PeftModel.from_pretrained(base_of(model, options), adapter).eval())
    base = base_of(model, options)
    before = logits(base)
    with adapted(base, load_adapter(adapter)):
        ours = logits(base)

    assert difference(ours, theirs) <= tolerance("same-torch")
    assert difference(ours, before) > 100 * tolerance("same-torch"), "the adapter did nothing"


def test_peft_gives_the_same_logits_for_an_adapter_by_loradeploy(
    case: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    import peft

    model, source, options = case
    base = base_of(model, options)
    injection = load(base, load_adapter(source))
    save_adapter(injection.adapter(), tmp_path / "ours")
    ours = logits(base)
    theirs = peft.PeftModel.from_pretrained(base_of(model, options), tmp_path / "ours").eval()
    assert difference(ours, logits(theirs)) <= tolerance("same-torch")


def test_merging_changes_nothing_and_unmerging_is_exact(case: tuple[Path, Path, Any]) -> None:
    model, adapter, options = case
    base = base_of(model, options)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    plain = logits(base)

    injection = load(base, load_adapter(adapter))
    unmerged = logits(base)
    injection.merge()
    injection.merge()  # a second call has no effect
    merged = logits(base)
    injection.remove()

    assert difference(merged, unmerged) <= tolerance("merged-torch")
    assert torch.equal(logits(base), plain)
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.slow
def test_smollm2_gives_pefts_logits(smollm2: Path, smollm2_adapters: dict[str, Path]) -> None:
    import peft

    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    before = logits(base)
    with adapted(base, load_adapter(smollm2_adapters["first"])):
        ours = logits(base)
    theirs = logits(peft.PeftModel.from_pretrained(base, smollm2_adapters["first"]).eval())
    assert difference(ours, theirs) <= tolerance("same-torch")
    assert difference(ours, before) > 0.1


def test_a_new_adapter_does_not_change_the_model(tiny_llama: Path) -> None:
    base = base_of(tiny_llama, {})
    before = logits(base)
    injection = inject(base, AdapterConfig(r=4, target_modules="all-linear"), seed=1)
    assert torch.equal(logits(base), before)
    assert {p.requires_grad for p in injection.parameters()} == {True}
    trainable = {id(p) for p in base.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in injection.parameters()}


def test_a_new_adapter_depends_on_the_seed(tiny_llama: Path) -> None:
    config = AdapterConfig(r=4, target_modules="all-linear")
    one, same, other = (
        inject(base_of(tiny_llama, {}), config, seed=seed).adapter().digest for seed in (1, 1, 2)
    )
    assert one == same != other


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_weight_is_cast_once(kind: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = nn.Linear(8, 6) if kind is nn.Linear else Conv1D(6, 8)
    base = base.to(dtype)
    layer = LoraLinear(base, rank=2, scaling=0.5)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    weight = base.weight.detach().float()
    delta = 0.5 * layer.lora_B @ layer.lora_A
    expected = (weight + (delta if kind is nn.Linear else delta.T)).to(dtype)
    layer.merge()
    assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_gives_pefts_logits(
    dtype: torch.dtype, tiny_llama: Path, make_adapter: MakeAdapter
) -> None:
    import peft

    adapter = make_adapter(tiny_llama)
    base = base_of(tiny_llama, {}).to(dtype)
    before = logits(base)
    with adapted(base, load_adapter(adapter)):
        ours = logits(base)
    theirs = logits(peft.PeftModel.from_pretrained(base, adapter).eval())
    assert ours.dtype == dtype
    # PEFT multiplies by s at another place: at most the last bit differs.
    widest = float(theirs.abs().max())
    assert difference(ours, theirs) <= 4 * torch.finfo(dtype).eps * widest
    assert difference(ours, before) > 10 * torch.finfo(dtype).eps * widest


def test_a_second_adapter_is_refused_while_the_first_is_injected(
    tiny_llama: Path, make_adapter: MakeAdapter
) -> None:
    adapter = load_adapter(make_adapter(tiny_llama))
    base = base_of(tiny_llama, {})
    with adapted(base, adapter):
        for another in (
            lambda: load(base, adapter),
            lambda: inject(base, AdapterConfig(target_modules="all-linear")),
        ):
            with pytest.raises(UsageError, match="already has an adapter"):
                another()
    load(base, adapter)


def test_dropout_is_only_on_the_low_rank_path() -> None:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(8, 6), rank=2, scaling=1.0, dropout=0.5)
    x = torch.randn(4, 8)
    layer.train()
    assert torch.equal(layer(x), layer.base(x)), "B is zero: dropout must not reach the base"
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ("nothing",)}, "match nothing .* down_proj, gate_proj"),
        ({"target_modules": ("mlp",)}, "is a LlamaMLP: LoRA supports only linear"),
        (
            {"target_modules": ("q_proj",), "init_lora_weights": "eva"},
            "'eva' is not supported for training",
        ),
        ({"target_modules": ("k_proj",), "r": 64, "init_lora_weights": "pissa"}, "no part of rank"),
        (
            {"target_modules": ("q_proj",), "modules_to_save": ("classifier",)},
            "which this model lacks",
        ),
    ],
)
def test_invalid_targets_are_refused(
    config: dict[str, Any], message: str, tiny_llama: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        inject(base_of(tiny_llama, {}), AdapterConfig(**config))


def test_a_linear_layer_with_another_output_is_no_target() -> None:
    """PhiMoE's router is an nn.Linear that returns three tensors."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        PhimoeConfig(
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
            vocab_size=9,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    with pytest.raises(UsageError, match="is a PhimoeTopKRouter: LoRA supports only linear"):
        inject(base, AdapterConfig(target_modules=("router",)))
    injection = inject(base, AdapterConfig(target_modules="all-linear"))
    assert {name.rpartition(".")[2] for name in injection.layers} == {
        *("q_proj", "k_proj", "v_proj", "o_proj")
    }


def test_a_subclass_that_computes_the_same_is_a_target() -> None:
    class Wrapped(Conv1D):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    assert is_linear(Wrapped(8, 4))


@pytest.mark.parametrize("whole", ["lm_head", "wte"])
def test_a_fully_trained_tied_weight_does_not_change_the_other(whole: str, tiny_gpt2: Path) -> None:
    base = base_of(tiny_gpt2, {})
    tied, before = base.lm_head.weight, logits(base)
    config = AdapterConfig(target_modules=("c_attn",), modules_to_save=(whole,))
    injection = inject(base, config)
    (own,) = injection.saved.values()
    with torch.no_grad():
        own.mul_(2)

    left = base.transformer.wte.weight if whole == "lm_head" else base.lm_head.weight
    assert left is tied
    assert not torch.equal(logits(base), before)
    injection.remove()
    assert base.lm_head.weight is base.transformer.wte.weight is tied
    assert torch.equal(logits(base), before)


def test_an_adapter_of_another_model_is_refused_with_every_mismatch(
    tiny_llama: Path, tiny_gpt2: Path, make_adapter: MakeAdapter
) -> None:
    adapter = load_adapter(make_adapter(tiny_gpt2))
    base = base_of(tiny_llama, {})
    before = logits(base)
    with pytest.raises(
        AdapterMismatchError, match="is not a linear layer of this base model, nor are the other 7"
    ):
        load(base, adapter)
    assert torch.equal(logits(base), before)
