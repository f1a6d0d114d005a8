"""AdaLoRA and trainable tokens are exported like LoRA, and pass parity, which compares PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from tests.conftest import export_and_check

TYPES: Final[Mapping[str, Callable[[Any], Any]]] = {
    "AdaLoRA": lambda peft: peft.AdaLoraConfig(
        init_r=6,
        target_r=3,
        total_step=10,
        target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM",
    ),
    "trainable tokens": lambda peft: peft.TrainableTokensConfig(
        token_indices=[5, 9, 11], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.filterwarnings("ignore")  # PEFT warns about tied embeddings
@pytest.mark.parametrize("merge", [False, True], ids=["side inputs", "merged"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("name", TYPES)
def test_other_types_of_peft_pass_parity(
    name: str, model: str, merge: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = request.getfixturevalue(model)
    config = TYPES[name](peft)
    if model == "tiny_gpt2" and name == "AdaLoRA":
        config.target_modules = {"c_attn"}
    made = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    numbers = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=numbers) * 0.3
    made.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    export_and_check(base, tmp_path / "bundle", adapters={"a": tmp_path / "a"}, merge=merge)
