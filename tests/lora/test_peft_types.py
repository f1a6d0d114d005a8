"""AdaLoRA and trainable tokens as PEFT saves them: the same logits as PEFT from the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from loradeploy.adapter import load_adapter, save_adapter
from loradeploy.errors import AdapterError
from loradeploy.lora.inject import adapted
from tests.lora import tiny
from tests.tolerances import tolerance

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about tied embeddings


def saved(model: str, config: peft.PeftConfig, place: Path, *, kept: bool = False) -> Path:
    """Write an adapter with random values; with `kept`, AdaLoRA's rank_pattern removes some."""
    made = peft.get_peft_model(tiny.model(model), config)
    numbers = torch.Generator().manual_seed(1)
    pattern: dict[str, list[bool]] = {}
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=numbers) * 0.3
        if kept and "lora_E" in name:
            some = [number % 2 == len(pattern) % 2 for number in range(len(parameter))]
            some = [False] * len(some) if len(pattern) == 1 else some  # one module loses all
            pattern[name.removeprefix("base_model.model.")] = some
    if kept:
        made.peft_config["default"].rank_pattern = pattern  # type: ignore[union-attr]
    made.save_pretrained(place)
    return place


def adalora(**options: Any) -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(init_r=6, target_r=3, total_step=10, **options)


def theirs(model: str, place: Path) -> torch.Tensor:
    return tiny.logits(peft.PeftModel.from_pretrained(tiny.model(model), place), model)


def check_equals_peft(model: str, place: Path, again: Path) -> None:
    expected, base = theirs(model, place), tiny.model(model)
    before = tiny.logits(base, model)
    adapter = load_adapter(place)
    with adapted(base, adapter):
        ours = tiny.logits(base, model)
    assert tiny.difference(ours, expected) <= tolerance("same-torch")
    assert tiny.difference(ours, before) > 0.01, "it does nothing"
    assert save_adapter(adapter, again) == load_adapter(again).digest
    assert tiny.difference(theirs(model, again), expected) <= tolerance("same-torch")


@pytest.mark.parametrize("kept", [False, True], ids=["all ranks", "ranks by pattern"])
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 16}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"q_proj": 32}}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_alpha": -1}),
        ("llama", {"target_modules": ["q_proj"], "lora_bias": True}),  # which PEFT ignores
        ("gpt2", {"target_modules": ["c_attn"]}),
    ],
)
def test_adalora_has_pefts_logits(
    model: str, options: dict[str, Any], kept: bool, tmp_path: Path
) -> None:
    check_equals_peft(
        model, saved(model, adalora(**options), tmp_path / "a", kept=kept), tmp_path / "b"
    )


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama", {}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("llama", {"target_modules": ["lm_head"]}),
        ("llama-tied", {}),
        ("gpt2", {}),
        ("bert", {"target_modules": r".*word_embeddings"}),
    ],
)
def test_trainable_tokens_have_pefts_logits(
    model: str, options: dict[str, Any], tmp_path: Path
) -> None:
    config = peft.TrainableTokensConfig(token_indices=[9, 3, 20], **options)
    check_equals_peft(model, saved(model, config, tmp_path / "a"), tmp_path / "b")


def change(place: Path, **values: Any) -> None:
    file = place / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


KEY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_r": 4}, r"lora_E \[6, 1\], the config has rank 4"),
        ({"init_r": None}, "init_r is None, expected a positive integer"),
        ({"rank_pattern": {"model.layers.7.q.lora_E": [True]}}, "layers.7.q', which has no lora_E"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern has 'q_proj': 4, expected lists"),
        ({"rank_pattern": [6]}, r"rank_pattern is \[6\], expected an object"),
        ({"use_dora": True}, "use_dora is True"),
        ({"target_parameters": ["experts.w"]}, "target_parameters is not supported with"),
    ],
)
def test_a_config_that_contradicts_the_factors_of_adalora_is_refused(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved("llama", adalora(target_modules=["q_proj"]), tmp_path)
    change(tmp_path, **values)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("lora_B", "q_proj has lora_E without lora_A and lora_B"),
        ("lora_E", "layers.0.self_attn.q_proj has factors without lora_E"),
    ],
)
def test_singular_values_or_factors_alone_are_refused(
    part: str, message: str, tmp_path: Path
) -> None:
    saved("llama", adalora(target_modules=["q_proj"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[f"{KEY}.{part}"]
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"token_indices": [3, 9]}, "names 2"),
        ({"token_indices": [3, 9, 9]}, "names a token of model.embed_tokens twice"),
        ({"token_indices": None}, "does not list them"),
        ({"target_modules": ["lm_head"]}, "target_modules leaves model.embed_tokens out"),
    ],
)
def test_a_config_that_contradicts_the_rows_of_tokens_is_refused(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved("llama", peft.TrainableTokensConfig(token_indices=[9, 3, 20]), tmp_path)
    change(tmp_path, **values)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path)


@pytest.mark.parametrize("peft_type", [["ADALORA"], {"ADALORA": 1}, 3, None])
def test_a_peft_type_that_is_no_name_is_refused(peft_type: Any, tmp_path: Path) -> None:
    saved("llama", adalora(target_modules=["q_proj"]), tmp_path)
    change(tmp_path, peft_type=peft_type)
    with pytest.raises(AdapterError, match="peft_type is"):
        load_adapter(tmp_path)
