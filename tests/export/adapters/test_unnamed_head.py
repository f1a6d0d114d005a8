"""A classifier head in an adapter's file that neither modules_to_save nor the task type names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from loradeploy.adapter.files.peft import load_adapter
from loradeploy.export.api import export
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter
from tests.export.reference import difference
from tests.runtime.feeds import logits
from tests.tolerances import tolerance

TASK: Final = "sequence-classification"
IDS: Final = np.random.default_rng(0).integers(5, 100, (2, 6))


def _peft(model: Path, adapter: Path, labels: int) -> Any:
    """PEFT's logits: it copies the head of the file into the model."""
    import peft
    import torch
    import transformers

    auto = transformers.AutoModelForSequenceClassification
    base = auto.from_pretrained(model, num_labels=labels, ignore_mismatched_sizes=True)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(base, adapter).eval()
        return found(input_ids=torch.from_numpy(IDS)).logits.numpy()


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION"])
def test_a_head_in_the_file_is_used_as_peft_uses_it(
    task_type: str | None, labels: int, tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    whole = make_adapter(tiny_bert, task=TASK, num_labels=labels, target_modules=["query"])
    place = tmp_path / "a"
    place.mkdir()
    config = json.loads((whole / "adapter_config.json").read_text())
    config |= {"modules_to_save": None, "task_type": task_type}
    (place / "adapter_config.json").write_text(json.dumps(config))
    (place / "adapter_model.safetensors").write_bytes(
        (whole / "adapter_model.safetensors").read_bytes()
    )
    assert load_adapter(place).config.modules_to_save == ("classifier",)

    expected = _peft(tiny_bert, place, labels)
    export(tiny_bert, tmp_path / "merged", adapters={"a": place}, merge=True, task=TASK)
    export(tiny_bert, tmp_path / "side", adapters={"a": place, "b": whole}, task=TASK)
    merged = logits(AdapterSession(tmp_path / "merged"), IDS)
    side = logits(AdapterSession(tmp_path / "side"), IDS, ["a", "b"])
    for found in (merged, side):
        assert difference(found, expected) <= tolerance("torch-onnx-tiny")
    other = make_adapter(tiny_bert, task=TASK, num_labels=labels, target_modules=["query"], seed=5)
    assert difference(_peft(tiny_bert, other, labels), expected) > 0.05, "the adapter does nothing"


@pytest.mark.parametrize("name", ["classifier.dense.weight", "score.weight", "qa_outputs.weight"])
def test_all_parts_of_a_head_count_as_one_module(
    name: str, tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    place = make_adapter(tiny_bert, target_modules=["query"], task="feature-extraction")
    tensors = load_file(place / "adapter_model.safetensors")
    head = name.partition(".")[0]
    tensors[f"base_model.model.{name}"] = np.ones((3, 4), np.float32)
    (tmp_path / "adapter_config.json").write_text((place / "adapter_config.json").read_text())
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert load_adapter(tmp_path).config.modules_to_save == (head,)


@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION"])
def test_a_heads_bias_that_was_trained_with_all_biases_is_not_a_head(
    task_type: str | None, tiny_bert: Path, tmp_path: Path
) -> None:
    import peft
    import torch
    import transformers

    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["query"], bias="all", task_type=task_type)
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.2
    adapted.save_pretrained(tmp_path / "a")
    assert load_adapter(tmp_path / "a").config.modules_to_save == ()

    expected = _peft(tmp_path / "base", tmp_path / "a", 2)
    export(tmp_path / "base", tmp_path / "side", adapters={"a": tmp_path / "a"}, task=TASK)
    session = AdapterSession(tmp_path / "side")
    side, base = logits(session, IDS, "a"), logits(session, IDS)
    assert difference(side, expected) <= tolerance("torch-onnx-tiny")
    assert difference(base, expected) > 0.05, "the adapter changes nothing"
