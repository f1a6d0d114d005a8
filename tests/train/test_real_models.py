"""Training on real models and texts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loradeploy.train.data import read_conversations
from loradeploy.train.features import IGNORED, conversation_features
from loradeploy.train.sources import Source
from tests.train.conftest import Quick, write_lines


@pytest.mark.slow
def test_smollm2s_template_shows_what_the_assistant_says(smollm2: Path, tmp_path: Path) -> None:
    said = ["Paris.", "Rome, of course."]
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": said[0]},
        {"role": "user", "content": "And of Italy?"},
        {"role": "assistant", "content": said[1]},
    ]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    file = write_lines(tmp_path / "chat.jsonl", [{"messages": messages}])
    (feature,) = conversation_features(read_conversations(Source(file)), tokenizer, 512).features
    learnt = [label for label in feature["labels"] if label != IGNORED]
    assert tokenizer.decode(learnt) == "".join(f"{text}<|im_end|>" for text in said)
    assert tokenizer.decode(feature["input_ids"]).startswith("<|im_start|>system\n")


@pytest.mark.slow
def test_minilm_learns_the_topics_of_the_news(
    minilm: Path, bbc: Path, tmp_path: Path, quick: Quick
) -> None:
    for topic in bbc.iterdir():
        if topic.is_dir():
            (tmp_path / "news" / topic.name).mkdir(parents=True)
            for file in sorted(topic.glob("*.txt"))[:40]:
                shutil.copy(file, tmp_path / "news" / topic.name)
    result = quick(
        minilm,
        tmp_path / "news",
        tmp_path / "adapter",
        task="sequence-classification",
        max_steps=40,
        batch_size=8,
        rank=8,
        learning_rate=3e-3,
        validation_split=0.25,
    )
    assert (result.examples, result.evaluated_on) == (150, "validation")
    assert result.accuracy_before is not None
    assert result.accuracy_after is not None
    assert result.accuracy_before < 0.5 < 0.8 < result.accuracy_after
