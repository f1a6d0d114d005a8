"""Adapters with another vocabulary than the base, as users train them with PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

BASE: Final = 512  # vocabulary size of the tiny models
WORDS: Final = ("<|tool|>", "<|end_of_turn|>")


@dataclass(frozen=True)
class Case:
    """`size`: the adapter's vocabulary size. `options`: of PEFT. `saved`: with saved embeddings."""

    size: int
    options: Mapping[str, Any] = field(default_factory=dict)
    saved: bool = True
    model: str = "llama"


TABLES: Final = ["embed_tokens", "lm_head"]
CASES: Final = {
    "embeddings saved": Case(BASE + 2),
    "a multiple of 64": Case(BASE + 64),
    "fewer tokens": Case(BASE - 9),
    "trained in full": Case(BASE + 2, {"modules_to_save": TABLES}, saved=False),
    "LoRA on both": Case(BASE + 2, {"target_modules": ["q_proj", *TABLES]}),
    "trained rows": Case(
        BASE + 2,
        {"trainable_token_indices": {name: [7, BASE, BASE + 1] for name in TABLES}},
        saved=False,
    ),
    "trained rows of saved embeddings": Case(
        BASE + 2, {"trainable_token_indices": [BASE, BASE + 1]}
    ),
    "tied": Case(BASE + 2, model="gpt2"),
    "tied, trained rows": Case(
        BASE + 2, {"trainable_token_indices": [BASE, BASE + 1]}, saved=False, model="gpt2"
    ),
}
_TARGETS: Final = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}


def resized(base: Path, size: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    model.resize_token_embeddings(size)
    return model


def make(
    case: Case, base: Path, place: Path, *, seed: int = 1, words: tuple[str, ...] = WORDS
) -> None:
    """Write an adapter as users train it, the tokenizer beside it, and PEFT's merged logits."""
    import peft
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    if case.size > BASE:
        first, *more = words
        tokenizer.add_special_tokens({"additional_special_tokens": [first]})
        if more:
            tokenizer.add_special_tokens({"eos_token": more[0]})
        tokenizer.save_pretrained(place)
    config = {"target_modules": _TARGETS[case.model], **case.options}
    options = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **config)
    made = peft.get_peft_model(resized(base, case.size), options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.1 if "lora" in name else 0.3))
    made.save_pretrained(place, save_embedding_layers=case.saved)
    fresh = peft.PeftModel.from_pretrained(resized(base, case.size), place)
    ids = torch.from_numpy(ids_of(case))
    with torch.no_grad():
        logits = fresh.merge_and_unload().eval()(ids, attention_mask=torch.ones_like(ids)).logits
    np.save(place / "expected.npy", logits.numpy())


def ids_of(case: Case) -> NDArray[np.int64]:
    added = [*range(BASE, case.size)][:2] or [case.size - 1]
    return np.array([[5, 7, *added, 44, 60]])
