"""Random adapters written by PEFT, with factors large enough to have a clear effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def random_adapter(
    model: Path,
    out: Path,
    *,
    r: int = 4,
    seed: int = 0,
    alpha: float = 8,
    target_modules: Any = "all-linear",
    modules_to_save: list[str] | None = None,
    task: str = "causal-lm",
    num_labels: int = 2,
    scale: float = 0.05,
    **config: Any,
) -> Path:
    import peft
    import torch
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForQuestionAnswering,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForSpeechSeq2Seq,
        AutoModelForTokenClassification,
    )

    torch.manual_seed(seed)
    classifiers = {
        "sequence-classification": AutoModelForSequenceClassification,
        "token-classification": AutoModelForTokenClassification,
    }
    if task in classifiers:
        base = classifiers[task].from_pretrained(model, num_labels=num_labels)
    else:
        kinds = {
            "causal-lm": AutoModelForCausalLM,
            "seq2seq-lm": AutoModelForSeq2SeqLM,
            "question-answering": AutoModelForQuestionAnswering,
            "speech": AutoModelForSpeechSeq2Seq,
        }
        kind = kinds.get(task, AutoModel)
        base = kind.from_pretrained(model)
    peft_task = {
        "causal-lm": "CAUSAL_LM",
        "seq2seq-lm": "SEQ_2_SEQ_LM",
        "sequence-classification": "SEQ_CLS",
        "token-classification": "TOKEN_CLS",
        "question-answering": "QUESTION_ANS",
    }.get(task)
    adapted = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=r,
            lora_alpha=alpha,
            target_modules=target_modules,
            modules_to_save=modules_to_save,
            task_type=peft_task,
            **config,
        ),
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            size = scale if "lora_" in name else 0.2
            parameter.data = torch.randn(parameter.shape, generator=generator) * size
    adapted.save_pretrained(out, save_embedding_layers=False)
    return out
