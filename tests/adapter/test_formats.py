"""Adapters of other libraries are recognized by content and refused with a way to convert them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.adapter import AdapterConfig, load_adapter
from loradeploy.adapter.files.tensors import write_arrays
from loradeploy.errors import AdapterError
from tests.adapter.test_peft import PREFIX, write

LONGEST = 320  # characters of a message, without paths
PAIR = {
    f"{PREFIX}l.q.lora_A.weight": np.ones((2, 3), np.float32),
    f"{PREFIX}l.q.lora_B.weight": np.ones((4, 2), np.float32),
}


def tensors(place: Path, name: str, keys: Mapping[str, tuple[int, ...]]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    arrays = {key: np.ones(shape, np.float32) for key, shape in keys.items()}
    write_arrays(place / name, arrays, {})


def config(place: Path, **fields: Any) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "adapter_config.json").write_text(json.dumps(fields))


def mlx(place: Path) -> None:
    config(place, fine_tune_type="lora", lora_parameters={"rank": 4, "scale": 2.0}, num_layers=2)
    tensors(place, "adapters.safetensors", {"model.layers.0.self_attn.q_proj.lora_a": (8, 4)})


def mlx_without_config(place: Path) -> None:
    tensors(place, "0000100_adapters.safetensors", {"model.layers.0.q_proj.lora_b": (4, 8)})


def mlx_renamed(place: Path) -> None:
    write(place, {"model.layers.0.self_attn.q_proj.lora_a": np.ones((8, 2), np.float32)})


def kohya(place: Path) -> None:
    names = ("lora_down.weight", "lora_up.weight", "alpha")
    keys = {f"lora_unet_down_blocks_0_attentions_0_proj_in.{name}": (2, 2) for name in names}
    tensors(place, "style.safetensors", keys)


def diffusers(place: Path) -> None:
    keys = {f"unet.down_blocks.0.attentions.0.to_q.lora_{half}.weight": (2, 2) for half in "AB"}
    tensors(place, "pytorch_lora_weights.safetensors", keys)


def adapter_hub(place: Path) -> None:
    inner = {"alpha": 8, "architecture": "lora", "r": 8}
    config(place, config=inner, hidden_size=48, model_class="BertModel", model_name="bert")
    (place / "pytorch_adapter.bin").write_bytes(b"pickle")


def adapter_hub_bottleneck(place: Path) -> None:
    inner = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 16}
    config(place, config=inner, model_class="BertModel", model_name="bert")
    (place / "head_config.json").write_text("{}")


def torchtune(place: Path) -> None:
    keys = {f"layers.0.attn.q_proj.lora_{half}.weight": (2, 2) for half in "ab"}
    tensors(place, "adapter_0.safetensors", keys)


def zero3(place: Path) -> None:
    write(place, {key: np.zeros(0, np.float32) for key in PAIR})


def shards(place: Path) -> None:
    write(place, PAIR)
    names = [f"adapter_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (place / "adapter_model.safetensors").rename(place / names[0])
    tensors(place, names[1], {f"{PREFIX}l.k.lora_A.weight": (2, 3)})
    index = {"weight_map": dict.fromkeys(PAIR, names[0])}
    (place / "adapter_model.safetensors.index.json").write_text(json.dumps(index))


def whole_model(place: Path) -> None:
    tensors(place, "model.safetensors", {"model.layers.0.self_attn.q_proj.weight": (4, 4)})
    (place / "config.json").write_text("{}")


def whole_weights(place: Path) -> None:
    write(place, {f"{PREFIX}model.layers.{i}.q_proj.weight": np.ones((4, 4)) for i in range(3)})


def no_config(place: Path) -> None:
    tensors(place, "adapter_model.safetensors", {key: a.shape for key, a in PAIR.items()})


def two_names(place: Path) -> None:
    named = {k.replace(".weight", f".{name}.weight"): a for k, a in PAIR.items() for name in "ab"}
    write(place, named)


def checkpoints(place: Path) -> None:
    for step in (5, 500, 60):
        write_into(place / f"checkpoint-{step}")
    (place / "trainer_state.json").write_text("{}")


def folder_of_its_name(place: Path) -> None:
    write_into(place / "sport")


def several_folders(place: Path) -> None:
    for name in ("sport", "tech"):
        write_into(place / name)


def write_into(place: Path) -> None:
    place.mkdir(parents=True)
    write(place, PAIR)


def gguf(place: Path) -> None:
    place.mkdir()
    (place / "adapter-f16.gguf").write_bytes(b"GGUF\x03\0\0\0")


def fsdp(place: Path) -> None:
    config(place, peft_type="LORA", r=2, lora_alpha=4, target_modules=["q"])
    (place / "pytorch_model_fsdp_0").mkdir()
    (place / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"")


def flattened(place: Path) -> None:
    write_into(place)
    write(place, {key: values.reshape(-1) for key, values in PAIR.items()})


def mlx_vision(place: Path) -> None:
    config(place, rank=2, alpha=1.0, dropout=0.0)
    keys = {"model.layers.0.q_proj.A": (8, 2), "model.layers.0.q_proj.B": (2, 8)}
    tensors(place, "adapters.safetensors", keys)


def loha(place: Path) -> None:
    """An adapter of PEFT's LoHa whose config says that it is a LoRA."""
    write(place, {f"{PREFIX}l.q.hada_w{n}": np.ones((2, 2), np.float32) for n in ("1_a", "1_b")})


def vera(place: Path) -> None:
    """Of a method in whose names of tensors LoRA's do not occur."""
    write(place, {f"{PREFIX}l.q.vera_lambda_b": np.ones(4, np.float32)})


def vblora(place: Path) -> None:
    """Of a method whose names of tensors contain the word lora."""
    write(place, {f"{PREFIX}l.q.vblora_logits_A": np.ones((2, 2), np.float32)})


def quantized(place: Path) -> None:
    scales = {k.replace(".weight", ".weight_scale"): np.ones(1, np.float32) for k in PAIR}
    write(place, {**PAIR, **scales})


def some_named(place: Path) -> None:
    write(place, {k.replace("lora_A.weight", "lora_A.sport.weight"): a for k, a in PAIR.items()})


def of_another_name(place: Path) -> None:
    write_into(place)
    (place / "adapter_model.safetensors").rename(place / "adapters.safetensors")


def pickle_of_another_name(place: Path) -> None:
    write_into(place)
    (place / "adapter_model.safetensors").rename(place / "pytorch_model.pt")
    (place / "optimizer.pt").write_bytes(b"")


def config_alone(place: Path) -> None:
    config(place, peft_type="LORA", r=2, lora_alpha=4, target_modules=["q"])
    (place / "optimizer.pt").write_bytes(b"")


def litgpt(place: Path) -> None:
    tensors(place, "lora.safetensors", {"transformer.h.0.attn.qkv.lora_A": (6, 8)})


def litgpt_pickle(place: Path) -> None:
    place.mkdir()
    for name in ("lit_model.pth.lora", "lit_model.pth", "hyperparameters.yaml", "config.json"):
        (place / name).write_bytes(b"{}")


def nemo(place: Path) -> None:
    place.mkdir()
    (place / "megatron_gpt_peft_lora_tuning.nemo").write_bytes(b"model_config.yaml")


def nemo_2(place: Path) -> None:
    (place / "context").mkdir(parents=True)
    (place / "weights").mkdir()
    (place / "weights" / "__0_0.distcp").write_bytes(b"")


FORMATS: dict[Callable[[Path], None], tuple[str, str]] = {
    mlx: ("is an adapter of mlx-lm", "loradeploy convert"),
    mlx_without_config: ("is an adapter of mlx-lm", "loradeploy convert"),
    mlx_renamed: ("is an adapter of mlx-lm", "loradeploy convert"),
    kohya: ("kohya's sd-scripts", "fuse it with diffusers"),
    diffusers: ("is an adapter of diffusers", "fuse it with diffusers"),
    adapter_hub: ("a LoRA of AdapterHub's", "loradeploy convert"),
    adapter_hub_bottleneck: ("of AdapterHub's adapters library", "train a LoRA"),
    torchtune: ("torchtune's names", "loradeploy convert"),
    zero3: (r"2 empty tensors of 2 .*l\.q\.lora_A.*DeepSpeed ZeRO-3", "zero_to_fp32.py"),
    shards: ("but shards of it", "join them .*adapter_model-\\*.safetensors"),
    whole_model: ("is not an adapter but a complete model", "`model`"),
    whole_weights: (r"no LoRA factors but 3 full weights .*layers\.0\.q_proj", "`model`"),
    no_config: ("has LoRA factors and no adapter_config.json", "copy it"),
    two_names: ("names of adapters in its keys", "loradeploy convert"),
    of_another_name: ("has adapters.safetensors in place of adapter_model", "rename it"),
    pickle_of_another_name: (r"pytorch_model\.pt is a pickle", "convert it"),
    config_alone: (r"has adapter_config\.json, but", r"adapter_model\.safetensors does not exist"),
    some_named: ("names of adapters in its keys", "loradeploy convert .*are sport"),
    loha: (r"of PEFT's method LOHA .*hada_w1_a", "peft_type .*merge it with PEFT"),
    vera: (r"of PEFT's method VERA .*vera_lambda_b", "peft_type .*merge it with PEFT"),
    vblora: (r"of PEFT's method VBLORA .*vblora_logits_A", "peft_type .*merge it with PEFT"),
    quantized: (r"quantized factors .*q\.lora_A\.weight_scale", "save the adapter in float32"),
    checkpoints: ("has 3 checkpoints", "give the newest, .*checkpoint-500"),
    folder_of_its_name: ("its folder sport is", "give .*sport"),
    several_folders: ("has 2 in folders", "give one of sport, tech"),
    gguf: ("GGUF", "give the PEFT directory"),
    litgpt: ("is an adapter of litgpt", "loradeploy convert ADAPTER --model BASE"),
    litgpt_pickle: ("lit_model.pth.lora, which is a pickle of litgpt", "loradeploy convert"),
    nemo: (r"lora_tuning\.nemo, which is a checkpoint of NeMo", "target hf-peft"),
    nemo_2: ("is a checkpoint of NeMo", "target hf-peft"),
    fsdp: ("shards of a model that FSDP trained", "accelerate merge-weights"),
    flattened: (r"lora_A .6. and lora_B .8. are not matrices: FSDP and DeepSpeed", "gathered"),
    mlx_vision: ("is an adapter of mlx-vlm", "loradeploy convert"),
}


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_a_directory_of_another_library_is_named_with_advice(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    place = tmp_path / "adapter"
    make(place)
    what, advice = FORMATS[make]
    with pytest.raises(AdapterError, match=f"{what}.*{advice}") as refusal:
        load_adapter(place)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value).replace(str(place), "")) <= LONGEST


@pytest.mark.parametrize(
    ("name", "what"), [("lit_model.pth.lora", "pickle of litgpt"), ("a.nemo", "checkpoint of NeMo")]
)
def test_a_pickle_of_another_library_is_named(name: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(AdapterError, match=what):
        load_adapter(tmp_path / name)


def test_a_training_checkpoint_with_trainer_files_is_an_adapter(tmp_path: Path) -> None:
    place = write(tmp_path / "checkpoint-500", PAIR)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (place / name).write_bytes(b"")
    assert load_adapter(place).modules == ("l.q",)


@pytest.mark.parametrize(
    "name",
    [
        "non_lora_trainables.bin",
        "trainable_params.bin",
        "new_embeddings.safetensors",
        "vit.safetensors",
    ],
)
def test_trained_weights_in_another_file_beside_an_adapter_are_refused_by_name(
    name: str, tmp_path: Path
) -> None:
    place = write(tmp_path / "sport", PAIR)
    (place / name).write_bytes(b"")
    with pytest.raises(AdapterError, match=f"sport has {name}, weights .*remove the file"):
        load_adapter(place)


@pytest.mark.parametrize(
    ("peft_type", "advice"),
    [
        ("IA3", "merge it with PEFT"),
        ("LOHA", "merge it with PEFT"),
        ("PROMPT_TUNING", "it learns inputs, not weights"),
        ("PREFIX_TUNING", "it learns inputs, not weights"),
        ("XLORA", "cannot be exported"),
        ("ALORA", "active after some tokens only"),
        (["LORA"], "merge it with PEFT"),
        ("lora", 'write "LORA"'),
    ],
)
def test_another_peft_type_is_named_with_advice(peft_type: Any, advice: str) -> None:
    with pytest.raises(AdapterError, match=f"only LORA, ADALORA and TRAINABLE_TOKENS .*{advice}"):
        AdapterConfig.from_peft({"peft_type": peft_type})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("lora_alpha", None, "lora_alpha is null, expected a number"),
        ("r", None, "r is null, expected a number"),
        ("r", "8", "r is '8', expected a positive integer"),
        ("lora_alpha", "16", "lora_alpha is '16', expected a number"),
        ("task_type", ["CAUSAL_LM"], "task_type is .*, expected a name or null"),
        ("base_model_name_or_path", 3, "base_model_name_or_path is 3, expected a name or null"),
    ],
)
def test_an_invalid_field_is_reported_with_file_field_value_and_expectation(
    field: str, value: Any, expected: str, tmp_path: Path
) -> None:
    place = write(tmp_path / "sport", PAIR, **{field: value})
    with pytest.raises(AdapterError, match=f"sport: adapter config: {expected}"):
        load_adapter(place)


def test_git_lfs_pointers_instead_of_files_are_reported(tmp_path: Path) -> None:
    place = write(tmp_path / "sport", PAIR)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"
    (place / "adapter_model.safetensors").write_text(pointer)
    with pytest.raises(AdapterError, match="is a pointer of Git LFS, not the file: run git lfs"):
        load_adapter(place)
