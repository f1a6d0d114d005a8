"""Loading a base model: only its own weights are used, and none is silently random."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from loradeploy.adapter import load_adapter
from loradeploy.errors import AdapterMismatchError, ModelError
from loradeploy.export.adapters.given import check_brought
from loradeploy.export.read.files.source import resolve
from loradeploy.export.trace import load_model
from loradeploy.lora.base.checkpoint import find_checkpoint, warn_of_unused_files
from loradeploy.lora.standard import to_standard_lora_from_checkpoint
from loradeploy.train.config import TrainConfig
from loradeploy.train.model import load_base, open_checkpoint
from loradeploy.train.tasks.table import task_of
from tests.conftest import MakeAdapter
from tests.inputs.edits import edited_json

IDS = torch.tensor([[5, 6, 7, 8, 9]])
Tensors = dict[str, torch.Tensor]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def for_export(directory: Path) -> Any:
    return load_model(directory, "causal-lm")[0]


def for_training(directory: Path) -> Any:
    opened = open_checkpoint(find_checkpoint(directory))
    return load_base(opened, task_of(TrainConfig()), None, "fp32").model


LOADERS = {"export": for_export, "training": for_training}


@pytest.fixture(params=LOADERS.values(), ids=LOADERS)
def loader(request: pytest.FixtureRequest) -> Callable[[Path], Any]:
    return request.param


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may modify."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


def change(directory: Path, how: Callable[[Tensors], None]) -> None:
    """Apply `how` to the tensors of the checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    how(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def rename(tensors: Tensors, old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


# -- other files in the directory ------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}],
    ids=["lora", "dora", "a head"],
)
def test_an_adapter_in_the_base_directory_is_not_applied(
    options: dict[str, Any],
    loader: Callable[[Path], Any],
    tiny_llama: Path,
    copy: Path,
    make_adapter: MakeAdapter,
) -> None:
    adapter = make_adapter(tiny_llama, seed=3, scale=0.3, **options)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, copy)
    unasked = transformers.AutoModelForCausalLM.from_pretrained(copy)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    # The control: transformers itself applies the adapter.
    assert (logits(unasked) - logits(base)).abs().max() > 0.1
    model = loader(copy)
    assert torch.equal(logits(model), logits(base))
    assert {name for name, _ in model.named_modules()} == {name for name, _ in base.named_modules()}


def test_only_the_config_of_an_adapter_in_the_directory_changes_nothing(
    loader: Callable[[Path], Any], tiny_llama: Path, copy: Path
) -> None:
    (copy / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/nowhere/else"})
    )
    assert torch.equal(logits(loader(copy)), logits(loader(tiny_llama)))


def test_an_adapter_in_the_directory_is_logged_unless_it_is_given(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (copy / "adapter_config.json").write_text("{}")
    warn_of_unused_files(copy, "give it with --adapter", given=[copy / ".." / copy.name])
    assert not caplog.messages
    warn_of_unused_files(copy, "give it with --adapter", given=[copy.parent])
    (message,) = caplog.messages
    assert message.endswith("is not loaded: give it with --adapter")
    assert str(copy) in message


@pytest.mark.parametrize("beside", [(), ("config.json", "tokenizer.json")], ids=["alone", "config"])
def test_a_training_checkpoint_of_an_adapter_is_refused_as_a_base(
    beside: tuple[str, ...], tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    place = tmp_path / "checkpoint-500"
    shutil.copytree(make_adapter(tiny_llama), place)
    for name in beside:
        shutil.copy(tiny_llama / name, place)
    for find in (resolve, find_checkpoint):
        with pytest.raises(
            ModelError, match=r"is an adapter: give its base as the model \(.*llama"
        ):
            find(place)


def test_shards_are_the_base_regardless_of_other_files(
    loader: Callable[[Path], Any], tiny_llama: Path, tmp_path: Path
) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    place = Path(shutil.copytree(tiny_llama, tmp_path / "sharded"))
    (place / "model.safetensors").unlink()
    base.save_pretrained(place, max_shard_size="150KB")
    shards = sorted(place.glob("model-*.safetensors"))
    assert len(shards) > 1
    strange = {"model.norm.weight": torch.full((64,), 7.0)}
    save_file(strange, place / "consolidated.safetensors", {"format": "pt"})
    assert torch.equal(logits(loader(place)), logits(base))
    shards[0].unlink()
    with pytest.raises(ModelError, match=f"{shards[0].name}, which does not exist"):
        loader(place)


# -- contents of the files -------------------------------------------------------------------------


def wrapped(tensors: Tensors) -> None:
    rename(tensors, "lm_head.weight", "lm_head.base_layer.weight")


def wrapped_whole(tensors: Tensors) -> None:
    for name in list(tensors):
        rename(tensors, name, f"base_model.model.{name}")


def with_factors(tensors: Tensors) -> None:
    """Use the format of PEFT before 0.7: factors beside the layer's own weight."""
    tensors["lm_head.lora_A.default.weight"] = torch.ones(2, 64)
    tensors["lm_head.lora_B.default.weight"] = torch.ones(512, 2)


def trained_head(tensors: Tensors) -> None:
    tensors["lm_head.original_module.weight"] = tensors["lm_head.weight"].clone()
    rename(tensors, "lm_head.weight", "lm_head.modules_to_save.default.weight")


def stray_bias(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)


def stray_scale(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.weight_scale"] = torch.ones(1)


def incomplete(tensors: Tensors) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def narrower(tensors: Tensors) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:, :32].clone()


def fewer_words(tensors: Tensors) -> None:
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name][:500].clone()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (wrapped, r"saved with PEFT's layers in it \(lm_head\.base_layer"),
        (wrapped_whole, "saved with PEFT's layers in it .* more"),
        (with_factors, "saved with PEFT's layers in it .*lm_head.lora_A"),
        (trained_head, "saved with PEFT's layers in it .*merge_and_unload"),
        (stray_bias, "q_proj.bias, which LlamaForCausalLM does not have"),
        (stray_scale, "up_proj.weight_scale, which .* does not have"),
        (incomplete, "up_proj"),
        (narrower, r"up_proj.weight as \[96, 32\], and by its config.json it is \[96, 64\]: w"),
        (fewer_words, r"as \[500, 64\], and by its config.json it is \[512, 64\], and 1 more"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused_by_name(
    how: Callable[[Tensors], None], message: str, loader: Callable[[Path], Any], copy: Path
) -> None:
    change(copy, how)
    with pytest.raises(ModelError, match=message):
        loader(copy)


def test_layers_that_the_config_omits_are_logged(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with edited_json(copy / "config.json") as config:
        for name in ("num_hidden_layers", "layer_types"):
            if name in config:
                config[name] = 1 if name == "num_hidden_layers" else config[name][:1]
    with caplog.at_level(logging.WARNING):
        for_export(copy)
    (message,) = caplog.messages
    assert "model.layers.1." in message
    assert "does not use" in message


def test_a_tied_head_is_not_missing(tiny_gpt2: Path) -> None:
    model = for_export(tiny_gpt2)
    assert model.lm_head.weight is model.transformer.wte.weight


# -- heads -----------------------------------------------------------------------------------------


def test_an_adapter_without_the_head_that_its_base_lacks_is_refused(
    tiny_bert: Path, make_adapter: MakeAdapter
) -> None:
    task = "sequence-classification"
    _, lacking = load_model(tiny_bert, task, labels=2)
    assert lacking == ("classifier.bias", "classifier.weight")
    check_brought("topic", load_adapter(make_adapter(tiny_bert, task=task)), lacking)
    headless = load_adapter(make_adapter(tiny_bert, task="feature-extraction"))
    with pytest.raises(
        AdapterMismatchError, match=r"topic: classifier\.bias is in neither the base"
    ):
        check_brought("topic", headless, lacking)


def test_an_adapter_is_not_converted_with_random_base_weights(
    copy: Path, make_adapter: MakeAdapter, tiny_llama: Path
) -> None:
    adapter = load_adapter(make_adapter(tiny_llama, init_lora_weights="pissa"))
    to_standard_lora_from_checkpoint(adapter, copy)
    change(copy, incomplete)
    with pytest.raises(ModelError, match=r"lacks the weight of model\.layers\.1\.mlp\.up_proj"):
        to_standard_lora_from_checkpoint(adapter, copy)
