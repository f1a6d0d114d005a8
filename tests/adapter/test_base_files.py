"""The base model is the set of files in a model directory that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.adapter import base_digest
from loradeploy.adapter.files.base_files import (
    check_no_peft_layers,
    refuse_adapter,
    stray_weights,
    weight_files,
)
from loradeploy.adapter.files.tensors import write_arrays
from loradeploy.errors import ModelError

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
A = {"a": np.arange(4, dtype=np.float32)}
B = {"b": np.ones((2, 2), np.float32)}


def directory(place: Path, files: Mapping[str, Any]) -> Path:
    """Write a directory of safetensors (dicts of arrays), JSON (other values) and empty files."""
    place.mkdir()
    for name, content in files.items():
        if content is None:
            (place / name).touch()
        elif name.endswith(".safetensors"):
            write_arrays(place / name, content, {})
        else:
            (place / name).write_text(json.dumps(content))
    return place


def index(*files: str) -> dict[str, Any]:
    return {"weight_map": {f"tensor {number}": file for number, file in enumerate(files)}}


SINGLE = {"model.safetensors": {**A, **B}}
SHARDED = {INDEX: index(*SHARDS), SHARDS[0]: A, SHARDS[1]: B}
STRAY = {
    "an adapter": {"adapter_model.safetensors": A, "adapter_config.json": {}},
    "an optimizer": {"optimizer.safetensors": A},
    "the same weights by other names": {"consolidated.safetensors": A},
    "a variant": {"model.fp16.safetensors": A},
    "a shard of another save": {"model-00003-of-00003.safetensors": A},
    "a pickle": {"pytorch_model.bin": None},
}


@pytest.mark.parametrize("base", [SINGLE, SHARDED], ids=["single", "sharded"])
@pytest.mark.parametrize("stray", STRAY.values(), ids=STRAY)
def test_other_files_are_neither_listed_nor_in_the_digest(
    base: Mapping[str, Any], stray: Mapping[str, Any], tmp_path: Path
) -> None:
    alone = directory(tmp_path / "alone", base)
    both = directory(tmp_path / "both", {**base, **stray})
    assert [f.name for f in weight_files(both)] == [f.name for f in weight_files(alone)]
    assert base_digest(both) == base_digest(alone)
    assert base_digest(both) != base_digest(directory(tmp_path / "other", {"model.safetensors": A}))


def test_a_single_file_takes_precedence_over_an_index_and_that_is_logged(tmp_path: Path) -> None:
    both = directory(tmp_path / "both", {**SHARDED, "model.safetensors": A})
    assert [file.name for file in weight_files(both)] == ["model.safetensors"]
    assert INDEX in str(stray_weights(both))
    assert stray_weights(directory(tmp_path / "one", SHARDED)) is None


def test_the_file_named_by_the_config_takes_precedence(tmp_path: Path) -> None:
    config = {"transformers_weights": "other.safetensors"}
    named = {**SINGLE, "other.safetensors": A, "config.json": config}
    assert [f.name for f in weight_files(directory(tmp_path / "m", named))] == ["other.safetensors"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({INDEX: index(*SHARDS), SHARDS[0]: A}, f"{SHARDS[1]}, which does not exist: .* complete"),
        ({INDEX: index("../x.safetensors")}, "is outside"),
        ({INDEX: {}}, "no weight_map"),
        (
            {"model.fp16.safetensors": A},
            r"transformers does not load model\.fp16\.safetensors by default",
        ),
        ({"consolidated.safetensors": A}, "does not load consolidated.safetensors"),
        ({"pytorch_model.bin": None}, "pytorch_model.bin, a pickle"),
        ({"shard-00000-model-00001-of-00001.safetensors": A}, "distributed checkpoint"),
        ({"config.json": {"transformers_weights": "../x.safetensors"}}, "is outside"),
        ({"config.json": {"transformers_weights": "x.safetensors"}}, "no such file"),
        (
            {"config.json": {"transformers_weights": "x.bin"}},
            "expected the name of a .safetensors file",
        ),
    ],
)
def test_weights_that_transformers_would_not_load_are_named(
    files: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        weight_files(directory(tmp_path / "m", files))
    assert len(str(raised.value).replace(str(tmp_path), "")) <= 300


@pytest.mark.parametrize(
    "beside",
    [{}, {"config.json": {}}, {"model.safetensors": A}],
    ids=["alone", "config", "weights"],
)
def test_an_adapter_directory_is_refused_as_a_model_and_its_base_is_named(
    beside: Mapping[str, Any], tmp_path: Path
) -> None:
    config = {"base_model_name_or_path": "org/base"}
    place = directory(tmp_path / "checkpoint-500", {"adapter_config.json": config, **beside})
    with pytest.raises(ModelError, match=r"is an adapter: give its base as the model \(org/base\)"):
        refuse_adapter(place)


def test_a_model_directory_with_an_adapter_in_it_is_a_model(tmp_path: Path) -> None:
    beside = {"adapter_config.json": {}, "adapter_model.safetensors": A, "config.json": {}}
    refuse_adapter(directory(tmp_path / "m", {**SINGLE, **beside}))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.embed_tokens.lora_embedding_B.default",
        "model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight",
        "score.original_module.weight",
        "score.modules_to_save.default.weight",
        "base_model.model.model.norm.weight",
    ],
)
def test_a_model_saved_with_peft_layers_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="saved with PEFT's layers in it .*merge_and_unload"):
        check_no_peft_layers(Path("m"), ["model.norm.weight", name])


def test_names_that_only_resemble_peft_layers_are_accepted() -> None:
    check_no_peft_layers(
        Path("m"), ["model.base_model.weight", "flora_A.weight", "model.q_a_proj.weight"]
    )
