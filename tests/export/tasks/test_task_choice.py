"""The task of an export is that of the adapter if the model supports it, else it must be given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.adapter import Adapter, AdapterConfig, Factors
from loradeploy.errors import ExportError, ModelError, UsageError
from loradeploy.export.tasks import choose_task

LONGEST = 320  # characters of a message


def adapter_for(
    task_type: str | None, *, module: str = "model.layers.0.q", head: bool = False
) -> Adapter:
    config = AdapterConfig(
        r=1,
        target_modules=("q",),
        task_type=task_type,
        modules_to_save=("score",) if head else (),
    )
    factors = {module: Factors(np.ones((1, 2), np.float32), np.ones((2, 1), np.float32))}
    saved = {"score.weight": np.ones((2, 2), np.float32)} if head else {}
    return Adapter(config, factors, saved)


def config_of(architecture: str, **more: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **more}


@pytest.mark.parametrize(
    ("architecture", "task_type", "options", "task"),
    [
        ("LlamaForCausalLM", "CAUSAL_LM", {}, "causal-lm"),
        ("LlamaForCausalLM", None, {}, "causal-lm"),
        ("LlamaForCausalLM", "SEQ_CLS", {"head": True}, "sequence-classification"),
        ("LlamaForCausalLM", "TOKEN_CLS", {"head": True}, "token-classification"),
        ("LlamaForCausalLM", "FEATURE_EXTRACTION", {"module": "layers.0.q"}, "feature-extraction"),
        ("BertForMaskedLM", "FEATURE_EXTRACTION", {}, "feature-extraction"),
        ("BertModel", "SEQ_CLS", {"head": True}, "sequence-classification"),
        ("LlamaModel", "CAUSAL_LM", {}, "causal-lm"),
    ],
)
def test_the_adapters_task_is_used_if_the_model_supports_it(
    architecture: str, task_type: str | None, options: dict[str, Any], task: str
) -> None:
    assert choose_task(config_of(architecture), None, [adapter_for(task_type, **options)]) == task


@pytest.mark.parametrize(
    ("architecture", "task_type", "task"),
    [
        ("LlamaForCausalLM", "SEQ_2_SEQ_LM", "causal-lm"),
        ("LlamaForCausalLM", "FEATURE_EXTRACTION", "causal-lm"),
        ("LlamaForCausalLM", "TOKEN_CLS", "causal-lm"),
        ("LlamaForCausalLM", "QUESTION_ANS", "causal-lm"),
        ("LlamaForCausalLM", "x" * 900, "causal-lm"),
        ("Qwen2ForCausalLM", "SEQ_CLS", "causal-lm"),
        ("GPT2LMHeadModel", "SEQ_2_SEQ_LM", "causal-lm"),
        ("BertForSequenceClassification", "CAUSAL_LM", "sequence-classification"),
        ("BertForTokenClassification", "SEQ_2_SEQ_LM", "token-classification"),
        ("BertModel", "SEQ_2_SEQ_LM", "feature-extraction"),
        ("BertForMaskedLM", "CAUSAL_LM", "feature-extraction"),
    ],
)
def test_a_task_that_contradicts_the_model_is_refused_with_a_suggestion(
    architecture: str, task_type: str, task: str
) -> None:
    config, adapter = config_of(architecture), adapter_for(task_type)
    with pytest.raises(
        UsageError, match=f"task_type.*{architecture}: give `task=.{task}.`"
    ) as error:
        choose_task(config, None, [adapter])
    assert len(str(error.value)) <= LONGEST
    assert choose_task(config, task, [adapter]) == task, "what is asked for wins"


def test_adapters_for_different_tasks_are_refused() -> None:
    adapters = [adapter_for("CAUSAL_LM"), adapter_for("SEQ_CLS", head=True)]
    with pytest.raises(UsageError, match=r"CAUSAL_LM, SEQ_CLS.*`task=.causal-lm.`"):
        choose_task(config_of("LlamaForCausalLM"), None, adapters)


def test_an_encoder_decoder_is_exported_only_for_its_own_task() -> None:
    config = config_of("T5ForConditionalGeneration", is_encoder_decoder=True)
    assert choose_task(config, None, [adapter_for("SEQ_2_SEQ_LM")]) == "seq2seq-lm"
    with pytest.raises(ExportError, match="seq2seq-lm"):
        choose_task(config, "causal-lm", [])


@pytest.mark.parametrize("task", ["seq2seq-lm", "image-classification"])
def test_a_class_missing_in_transformers_is_reported_with_a_suggested_task(
    task: str, tmp_path: Path
) -> None:
    from loradeploy.export.trace import load_model

    values = {"model_type": "llama", **config_of("LlamaForCausalLM")}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=f"for {task}: give `task=.causal-lm.`"):
        load_model(tmp_path, task, meta=True)


@pytest.mark.parametrize("problem", [AssertionError(), KeyError("rope_type"), IndexError()])
def test_an_error_without_a_message_is_reported_with_its_origin(
    problem: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import transformers

    from loradeploy.export.trace import trace

    config = transformers.BertConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    model = transformers.BertModel(config).eval()

    def refuses_the_model(*args: Any, **options: Any) -> None:
        raise problem

    monkeypatch.setattr(torch.export, "export", refuses_the_model)
    kind = type(problem).__name__
    message = f"BertModel cannot be traced .*{kind}.* in refuses_the_model of .*: give an ONNX file"
    with pytest.raises(ExportError, match=message):
        trace(model, "feature-extraction")


VIT = {"model_type": "vit", "architectures": ["ViTModel"], "image_size": 16}
CLIP = {"model_type": "clip", "architectures": ["CLIPModel"], "text_config": {}}
BERT = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 9}


@pytest.mark.parametrize(
    ("config", "asked", "task"),
    [
        (VIT, None, "image-feature-extraction"),
        (VIT, "image-feature-extraction", "image-feature-extraction"),
        (CLIP, "feature-extraction", "feature-extraction"),
        (CLIP, "image-feature-extraction", "image-feature-extraction"),
    ],
)
def test_vectors_are_of_images_or_of_texts(
    config: dict[str, Any], asked: str | None, task: str
) -> None:
    assert choose_task(config, asked) == task


@pytest.mark.parametrize(
    ("config", "asked", "message"),
    [
        (CLIP, None, "CLIPModel has a tower for texts and one for images, .*: give `task="),
        (CLIP, "causal-lm", "each a bundle of its own"),
        (VIT, "feature-extraction", 'ViTModel gives vectors of images: give `task="image-'),
        (BERT, "image-feature-extraction", 'BertModel is not a model of images: give `task="feat'),
    ],
)
def test_vectors_of_a_modality_that_the_model_lacks_are_refused(
    config: dict[str, Any], asked: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose_task(config, asked)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 16},
        {"model_type": "clip", "architectures": ["CLIPForImageClassification"], "text_config": {}},
        {"model_type": "siglip", "architectures": ["SiglipForImageClassification"]},
    ],
)
def test_an_image_model_is_exported_as_a_classifier(config: dict[str, Any]) -> None:
    assert choose_task(config, None) == "image-classification"
    assert choose_task(config, "image-classification") == "image-classification"


@pytest.mark.parametrize("asked", [None, "image-classification"])
def test_an_image_classifier_without_a_fixed_image_size_is_refused(asked: str | None) -> None:
    config = {"model_type": "siglip2", "architectures": ["Siglip2ForImageClassification"]}
    with pytest.raises(ExportError, match="Siglip2ForImageClassification takes patches of images"):
        choose_task(config, asked)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("longt5", "attends in blocks"),
        ("led", "attends in blocks"),
        ("switch_transformers", "mixtures of experts drop tokens"),
        ("nllb-moe", "mixtures of experts drop tokens"),
        ("prophetnet", "decodes several tokens at once"),
        ("fsmt", "no cache in transformers' common form"),
        ("encoder-decoder", "its decoder is a model of its own"),
    ],
)
def test_encoder_decoders_that_cannot_be_split_are_refused_by_name(
    model_type: str, reason: str
) -> None:
    config = config_of("NameOfTheModel", is_encoder_decoder=True, model_type=model_type)
    with pytest.raises(ExportError, match=f"NameOfTheModel is not supported: .*{reason}"):
        choose_task(config, None)
