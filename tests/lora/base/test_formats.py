"""Quantized base models are refused early, with the name of the quantizer and advice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.adapter.files.tensors import write_arrays
from loradeploy.errors import LoraDeployError, ModelError
from loradeploy.export.read.files.source import resolve
from loradeploy.lora.base.checkpoint import find_checkpoint
from loradeploy.lora.base.formats import BITSANDBYTES, check_unquantized, original_name
from tests.conftest import MakeAdapter
from tests.inputs.edits import edited_json

LONGEST = 320  # characters of a message, without paths

CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", "deq"),
    "of 2023": ({"load_in_8bit": True}, "bitsandbytes", r"model\.dequantize\(\)"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "GPTQ", "give the original"),
    "awq": ({"quant_method": "awq", "bits": 4}, "AWQ", "give the original"),
    "compressed": ({"quant_method": "compressed-tensors"}, "compressed-tensors", "dequantize=True"),
    "hqq": ({"quant_method": "hqq"}, "HQQ", "give the original"),
    "torchao": ({"quant_method": "torchao"}, "torchao", "give the original"),
    "fp8": ({"quant_method": "fp8"}, "FP8", "dequantize=True"),
    "mxfp4": ({"quant_method": "mxfp4"}, "MXFP4", "dequantize=True"),
    "tomorrow": ({"quant_method": "x" * 900}, "quantized by xxx", "give the original"),
}


def write_base(place: Path, *tensors: str, **config: Any) -> Path:
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    arrays = {name: np.ones(2, np.float32) for name in tensors or ("model.norm.weight",)}
    write_arrays(place / "model.safetensors", arrays, {})
    return place


def refusal_of(place: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as refusal:
        check_unquantized(place, **options)
    message = str(refusal.value).replace(str(place), "")
    assert "\n" not in message and len(message) <= LONGEST
    return message


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_quantizer_is_named_with_advice(name: str, inner: bool, tmp_path: Path) -> None:
    settings, message, advice = CONFIGS[name]
    config: dict[str, Any] = {"quantization_config": settings}
    place = write_base(tmp_path / "base", **({"text_config": config} if inner else config))
    with pytest.raises(ModelError, match=f"{message}.*{advice}"):
        check_unquantized(place)
    refusal_of(place)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("model.layers.0.self_attn.q_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.self_attn.q_proj.SCB", "bitsandbytes"),
        ("model.layers.0.self_attn.q_proj.qweight", "GPTQ"),
        ("model.layers.0.self_attn.q_proj.weight_packed", "compressed-tensors"),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", "MXFP4"),
    ],
)
def test_the_tensors_show_the_quantizer_where_the_config_does_not(
    tensor: str, message: str, tmp_path: Path
) -> None:
    assert message in refusal_of(write_base(tmp_path / "base", tensor))


@pytest.mark.parametrize(("dtype", "message"), [(np.int8, "stores integers"), (np.float16, None)])
def test_integer_weights_count_as_quantized_under_any_name(
    dtype: Any, message: str | None, tmp_path: Path
) -> None:
    """transformers would load the integers as weights, without scales."""
    place = write_base(tmp_path / "base")
    weights = {"model.layers.0.self_attn.q_proj.weight": np.ones((2, 2), dtype)}
    write_arrays(place / "model.safetensors", weights, {})
    if message is None:
        check_unquantized(place)
    else:
        assert message in refusal_of(place)


def test_a_quantized_mlx_model_is_named(tmp_path: Path) -> None:
    place = write_base(tmp_path / "base", quantization={"group_size": 64, "bits": 4})
    assert "MLX" in refusal_of(place) and "mlx_lm.convert" in refusal_of(place)


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "gguf"}}])
def test_plain_weights_are_accepted(config: dict[str, Any], tmp_path: Path) -> None:
    check_unquantized(write_base(tmp_path / "base", **config))


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "unsloth/Meta-Llama-3.1-8B-Instruct"),
        ("unsloth/Qwen2.5-7B-unsloth-bnb-4bit", "unsloth/Qwen2.5-7B"),
        ("/models/Qwen2-7B-Instruct-AWQ", "Qwen2-7B-Instruct"),
        ("TheBloke/Mistral-7B-v0.1-GPTQ", "Mistral-7B-v0.1"),
        ("RedHatAI/Llama-3.2-1B-Instruct-FP8-dynamic", "Llama-3.2-1B-Instruct"),
        ("mlx-community/some-4bit", "some"),
        ("HuggingFaceTB/SmolLM2-135M", None),
        ("4bit", None),
    ],
)
def test_the_original_model_is_derived_from_the_name(name: str, original: str | None) -> None:
    assert original_name(name) == original


def test_the_original_model_named_by_an_adapter_is_suggested(tmp_path: Path) -> None:
    place = write_base(tmp_path / "base", quantization_config={"load_in_4bit": True})
    names = [None, "unsloth/Llama-3.2-1B-bnb-4bit"]
    assert "give the original, unsloth/Llama-3.2-1B," in refusal_of(place, names=names)


def test_training_accepts_bitsandbytes_weights_and_refuses_others(tmp_path: Path) -> None:
    packed = write_base(tmp_path / "a", quantization_config={"load_in_4bit": True})
    assert find_checkpoint(packed, quantized=[BITSANDBYTES]) == packed
    other = write_base(tmp_path / "b", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match="GPTQ"):
        find_checkpoint(other, quantized=[BITSANDBYTES])


@pytest.mark.parametrize("directory", [False, True])
def test_a_gguf_model_is_named_with_advice(directory: bool, tmp_path: Path) -> None:
    file = tmp_path / "model-Q4_K_M.gguf"
    file.write_bytes(b"GGUF\x03\0\0\0")
    place = tmp_path if directory else file
    for opened in (resolve, find_checkpoint):
        with pytest.raises(ModelError, match="GGUF model of llama.cpp.*gguf_file="):
            opened(place)


@pytest.mark.parametrize("verb", ["export", "merge", "parity"])
def test_a_quantized_base_is_refused_before_anything_is_traced(
    verb: str, tiny_llama: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    with edited_json(place / "config.json") as config:
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    adapter = make_adapter(tiny_llama)
    with pytest.raises(LoraDeployError, match="quantized by bitsandbytes"):
        if verb == "parity":
            ld.parity(tiny_llama_bundle, model=place)
        else:
            ld.export(place, tmp_path / "b", adapters={"a": adapter}, merge=verb == "merge")
    assert not (tmp_path / "b").exists()
