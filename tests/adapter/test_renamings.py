"""The table of renamed modules equals that of transformers and is applied in the same way."""

from __future__ import annotations

import json

import pytest
import torch

from loradeploy.adapter.modules.renamings import renamings
from loradeploy.lora.submodels import submodels
from tools import renamings as written


def test_the_table_is_that_of_the_installed_transformers() -> None:
    held = json.loads(written.FILE.read_text())
    assert held == written.table(), "write it again: python -m tools.renamings"


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
        renamed = name
        for rule in ours:
            renamed = rule(renamed)
        assert renamed == rename_source_key(name, theirs, [])[0]
