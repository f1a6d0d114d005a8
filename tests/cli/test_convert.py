"""`convert`: an adapter as an .onnx_adapter file, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.calling import call
from tests.conftest import MakeAdapter


@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"q_proj": 2}}], ids=["plain", "pattern"])
def test_an_adapter_survives_the_way_to_onnx_adapter_and_back(
    options: dict[str, object],
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source = make_adapter(tiny_llama, r=4, alpha=12, **options)
    native, back = tmp_path / "a.onnx_adapter", tmp_path / "back"
    call("convert", source, "--bundle", tiny_llama_bundle, "--output", native)
    said = json.loads(
        call("convert", native, "--bundle", tiny_llama_bundle, "--output", back, "--json")
    )
    assert said["targets"] == 14
    assert json.loads(call("inspect", native, "--json"))["kind"] == "ONNX Runtime adapter"

    logits = []
    for place in (source, back):
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        with torch.no_grad():
            adapted = PeftModel.from_pretrained(base, place).eval()
            logits.append(adapted(torch.arange(3, 15)[None]).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
