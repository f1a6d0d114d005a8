"""The text decoder of an image-text model, used with text alone, with PEFT adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.adapter import load_adapter
from loradeploy.errors import UsageError
from tests.export.reference import onnx_output, token_feeds
from tests.export.reference import session as ort
from tests.export.small import SMALL
from tests.tolerances import tolerance

IDS: Final = np.array([[5, 17, 3, 101, 5, 44, 60]])
_TEXT: Final = {**SMALL, "vocab_size": 120}
_VISION: Final = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_TURNING: Final = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
MODELS: Final[dict[str, dict[str, Any]]] = {
    "SmolVLM": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": _VISION,
        "image_token_id": 110,
        "scale_factor": 2,
        "pad_token_id": 0,
    },
    "Qwen2VL": {
        "text_config": {**_TEXT, "rope_parameters": _TURNING},
        "vision_config": {
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        "image_token_id": 110,
        "video_token_id": 111,
        "vision_start_token_id": 112,
        "vision_end_token_id": 113,
    },
    "Gemma3": {
        "text_config": {**_TEXT, "head_dim": 8, "sliding_window": 16},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 110,
        "boi_token_index": 111,
        "eoi_token_index": 112,
    },
}


def _make(name: str, model: Path, adapter: Path) -> None:
    """Write a model and an adapter trained on text only: its factors of the tower are zero."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    base = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    base.save_pretrained(model)
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    made = peft.get_peft_model(base, options)
    with torch.no_grad():
        for parameter_name, parameter in made.named_parameters():
            if parameter.requires_grad and "vision" not in parameter_name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    made.save_pretrained(adapter)


def _logits(model: Path, adapter: Path | None) -> Any:
    import peft
    import torch
    from transformers import AutoModelForImageTextToText

    made = AutoModelForImageTextToText.from_pretrained(model).eval()
    if adapter is not None:
        made = peft.PeftModel.from_pretrained(made, adapter).eval()
    with torch.no_grad():
        return made(torch.tensor(IDS)).logits.numpy()


@pytest.mark.breadth(3)
@pytest.mark.parametrize("name", MODELS)
def test_the_decoder_computes_what_the_whole_model_computes_for_text(
    name: str, tmp_path: Path
) -> None:
    model, adapter, bundle = tmp_path / "model", tmp_path / "a", tmp_path / "bundle"
    _make(name, model, adapter)
    with pytest.raises(
        UsageError, match=r"images and text: `task='causal-lm'` exports its decoder"
    ):
        ld.export(model, bundle)
    ld.export(model, bundle, adapters={"a": adapter}, task="causal-lm")
    session = ld.AdapterSession(bundle)
    session.load("a")
    session.load("again", adapter)
    rows = [None, "a", "again"]
    feeds = token_feeds(ort(bundle), np.repeat(IDS, len(rows), axis=0))
    found = session.run(["logits"], feeds, rows)[0]
    expected, base = _logits(model, adapter)[0], _logits(model, None)[0]
    allowed = tolerance("torch-onnx-tiny")
    for row, theirs in zip(found, (base, expected, expected), strict=True):
        assert np.abs(row - theirs).max() <= allowed
    assert np.abs(expected - base).max() > 0.01, "it does nothing"
    report = ld.parity(
        bundle, model=model, tokens=3, backends=["onnx-side-inputs"], certificate=False
    )
    assert report.passed, report.failures
    ld.export(bundle, tmp_path / "merged", adapters={"a": adapter}, merge=True)
    assert np.abs(onnx_output(tmp_path / "merged", IDS)[0] - expected).max() <= allowed
    if name != "Qwen2VL":  # its tower has other names
        assert any("vision" in module for module in load_adapter(adapter).factors)
