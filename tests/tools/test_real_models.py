"""The real models and texts of the tests are what their names say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from safetensors import safe_open


def test_smollm2_knows_the_capital_of_france(smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(answer[prompt["input_ids"].shape[1] :])
    # The answer ends with the token that ends a turn in the chat template.
    assert answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_smollm2_is_a_plain_float32_checkpoint(smollm2: Path) -> None:
    files = {file.name for file in smollm2.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= files
    with safe_open(smollm2 / "model.safetensors", framework="np") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {"F32"}
    assert "quantization_config" not in json.loads((smollm2 / "config.json").read_text())


def test_minilm_is_an_encoder_with_its_tokenizer(minilm: Path) -> None:
    assert json.loads((minilm / "config.json").read_text())["model_type"] == "bert"
    assert (minilm / "model.safetensors").is_file()
    assert (minilm / "tokenizer.json").is_file()


def test_the_news_have_five_topics(bbc: Path) -> None:
    assert Counter(file.parent.name for file in bbc.glob("*/*.txt")) == {
        "business": 510,
        "entertainment": 386,
        "politics": 417,
        "sports": 511,
        "tech": 401,
    }
