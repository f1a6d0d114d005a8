"""`convert`: an adapter as an .onnx_adapter file, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from loradeploy.adapter import load_adapter
from loradeploy.bundle.manifest import read_manifest
from tests.cli.calling import call
from tests.conftest import MakeAdapter

if TYPE_CHECKING:
    from torch import Tensor


def logits(model: Path, adapter: Path | None, kind: str) -> Tensor:
    """What PEFT computes with the adapter, from fixed tokens."""
    import torch
    import transformers
    from peft import PeftModel

    options = {"num_labels": 2} if kind == "AutoModelForSequenceClassification" else {}
    torch.manual_seed(0)  # of a head that is not in the checkpoint
    base = getattr(transformers, kind).from_pretrained(model, **options).eval()
    adapted = base if adapter is None else PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        found: Tensor = adapted(torch.arange(3, 15)[None]).logits
    return found


CAUSAL = "AutoModelForCausalLM"
CLASSIFIER = "AutoModelForSequenceClassification"
CASES: dict[str, tuple[str, str, dict[str, object]]] = {
    "llama": ("llama", CAUSAL, {}),
    "a rank of its own": ("llama", CAUSAL, {"rank_pattern": {"q_proj": 2, "1.mlp.up_proj": 7}}),
    "an alpha of its own": ("llama", CAUSAL, {"alpha_pattern": {"q_proj": 30}}),
    "rsLoRA": ("llama", CAUSAL, {"use_rslora": True}),
    "some modules": ("llama", CAUSAL, {"target_modules": ["q_proj", "down_proj"]}),
    "Conv1D": ("gpt2", CAUSAL, {}),
    "a head": (
        "bert",
        CLASSIFIER,
        {"task": "sequence-classification", "modules_to_save": ["classifier"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_survives_the_way_to_onnx_adapter_and_back(
    case: str, request: pytest.FixtureRequest, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    import torch

    name, kind, options = CASES[case]
    model: Path = request.getfixturevalue(f"tiny_{name}")
    bundle: Path = request.getfixturevalue(f"tiny_{name}_bundle")
    source = make_adapter(model, r=4, alpha=12, **options)
    native, back = tmp_path / "a.onnx_adapter", tmp_path / "back"
    call("convert", source, "--bundle", bundle, "--output", native)
    said = json.loads(call("convert", native, "--bundle", bundle, "--output", back, "--json"))
    assert said["digest"] == load_adapter(back).digest
    assert said["targets"] == len(load_adapter(source).factors)
    assert json.loads(call("inspect", native, "--json"))["kind"] == "ONNX Runtime adapter"

    before, after = logits(model, source, kind), logits(model, back, kind)
    torch.testing.assert_close(before, after, atol=1e-5, rtol=0)
    effect = (before - logits(model, None, kind)).abs().max()
    assert effect > 1e-3, f"the adapter changes {effect} at most: the test would see nothing"


def test_the_way_back_says_what_the_adapter_is_for(
    tiny_llama: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    native, back = tmp_path / "a.onnx_adapter", tmp_path / "back"
    source = make_adapter(tiny_llama, r=4, alpha=12)
    call("convert", source, "--bundle", tiny_llama_bundle, "--output", native)
    call("convert", native, "--bundle", tiny_llama_bundle, "--output", back)
    config = load_adapter(back).config
    assert (config.r, config.lora_alpha) == (4, 4), "the scaling stays in the factors"
    assert config.task_type == "CAUSAL_LM"
    assert load_adapter(back).base_digest == read_manifest(tiny_llama_bundle).base.digest
