"""The table of renamed modules equals that of transformers and is applied in the same way."""

from __future__ import annotations

import json

import pytest
import torch

from loradeploy.adapter.modules.renamings import Renaming, base_prefix_of, renamings, submodels_of
from loradeploy.lora.submodels import submodels
from tools import renamings as written


def test_the_table_is_that_of_the_installed_transformers() -> None:
    held = json.loads(written.FILE.read_text())
    assert held == written.table(), "write it again: python -m tools.renamings"


def test_the_base_models_are_those_of_the_installed_transformers() -> None:
    held = json.loads(written.BASES.read_text())
    assert held == written.base_models(), "write it again: python -m tools.renamings"


@pytest.mark.parametrize(
    "architecture",
    ["ViTForImageClassification", "DeiTForImageClassification", "BeitForImageClassification",
     "Dinov2ForImageClassification", "ViTModel", "SwinForImageClassification", "LlamaForCausalLM"],
)  # fmt: skip
def test_a_config_shows_the_renamings_of_the_whole_model(architecture: str) -> None:
    import transformers

    model_class = getattr(transformers, architecture)
    with torch.device("meta"):
        model = model_class(model_class.config_class())
    model_type = model.config.model_type
    whole = renamings(submodels(model), model.base_model_prefix)
    ours = renamings(submodels_of(architecture, model_type), base_prefix_of(model_type))
    head = "" if architecture.endswith("Model") else f"{model.base_model_prefix}."
    for name in (
        "encoder.layer.3.attention.attention.query.lora_B.weight",
        "encoder.layers.0.blocks.1.attention.self.query.lora_A.weight",
        "encoder.layer.3.output.dense.bias",
        "layers.3.self_attn.o_proj.lora_A.weight",
    ):
        one, other = (_applied(rules, head + name) for rules in (whole, ours))
        assert one == other


def _applied(rules: tuple[Renaming, ...], name: str) -> str:
    for rule in rules:
        name = rule(name)
    return name


@pytest.mark.parametrize(
    "architecture", ["Gemma3ForConditionalGeneration", "ViTModel", "LlamaModel"]
)
def test_names_are_renamed_as_in_transformers(architecture: str) -> None:
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    model_class = getattr(transformers, architecture)
    with torch.device("meta"):
        model = model_class(model_class.config_class())
    theirs = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    ours = renamings(submodels(model), model.base_model_prefix)
    for name in (
        "language_model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "language_model.lm_head.weight",
        "encoder.layer.3.attention.attention.query.lora_B.weight",
        "model.layers.0.mlp.up_proj.lora_A.weight",
    ):
        assert _applied(ours, name) == rename_source_key(name, theirs, [])[0]
