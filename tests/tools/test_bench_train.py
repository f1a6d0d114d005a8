"""The peers of the training benchmark do the same work as PEFT with the model's own loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from tests.tolerances import tolerance
from tools.bench_train.unsloth import UnslothTrainer, patch


def test_the_techniques_of_unsloth_give_the_loss_and_gradients_of_peft(tiny_llama: Path) -> None:
    import peft

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.05)
    rows = [torch.randint(2, 99, (size,)).tolist() for size in (5, 12, 9)]
    features = [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in rows]
    batch = dict(DataCollatorForSeq2Seq(tokenizer, padding=True)(features))

    expected = model(**batch).loss
    slopes = torch.autograd.grad(expected, trained)
    loss = UnslothTrainer.compute_loss(None, patch(model), batch)
    ours = torch.autograd.grad(loss, trained)

    assert float(loss.detach()) == pytest.approx(
        float(expected.detach()), abs=tolerance("same-torch")
    )
    for one, other in zip(ours, slopes, strict=True):
        assert bool(other.any())
        torch.testing.assert_close(one, other, atol=tolerance("same-torch"), rtol=1e-4)
