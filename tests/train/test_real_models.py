"""Training on real models and texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loradeploy.train.data.examples import read_conversations
from loradeploy.train.data.features import IGNORED, conversation_features
from loradeploy.train.data.sources import Source
from tests.conftest import Topics
from tests.train.conftest import write_lines


@pytest.mark.slow
def test_the_loss_with_smollm2s_template_is_on_the_assistant_messages(
    smollm2: Path, tmp_path: Path
) -> None:
    message = ["Paris.", "Rome, of course."]
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": message[0]},
        {"role": "user", "content": "And of Italy?"},
        {"role": "assistant", "content": message[1]},
    ]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    file = write_lines(tmp_path / "chat.jsonl", [{"messages": messages}])
    (feature,) = conversation_features(read_conversations(Source(file)), tokenizer, 512).features
    learned = [label for label in feature["labels"] if label != IGNORED]
    assert tokenizer.decode(learned) == "".join(f"{text}<|im_end|>" for text in message)
    assert tokenizer.decode(feature["input_ids"]).startswith("<|im_start|>system\n")


@pytest.mark.slow
def test_minilm_learns_the_topics_of_the_news(topics_of_news: Topics) -> None:
    result = topics_of_news.result
    assert (result["examples"], result["evaluated_on"]) == (150, "validation")
    assert result["accuracy_before"] < 0.5 < 0.8 < result["accuracy_after"]
