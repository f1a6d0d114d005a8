"""The loss is on exactly the tokens that should be learned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from loradeploy.errors import DataError
from loradeploy.train.config import TrainConfig
from loradeploy.train.data.examples import LabeledText, read_conversations
from loradeploy.train.data.features import IGNORED, Collator, conversation_features, text_features
from loradeploy.train.data.sources import Source
from loradeploy.train.model import open_checkpoint
from loradeploy.train.tasks.table import task_of
from tests.inputs.pairs import give_rules
from tests.train.conftest import write_lines

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "bye"},
]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def encode(line: dict[str, Any], tokenizer: Any, place: Path, max_length: int = 128) -> Any:
    file = write_lines(place / "data.jsonl", [line])
    return conversation_features(read_conversations(Source(file)), tokenizer, max_length)


def learned(feature: dict[str, Any], tokenizer: Any) -> str:
    return tokenizer.decode([label for label in feature["labels"] if label != IGNORED])


@pytest.mark.parametrize(
    ("line", "whole", "part"),
    [
        ({"prompt": "Question:", "completion": " yes."}, "Question: yes.<|im_end|>", " yes."),
        ({"prompt": "", "completion": "yes."}, "yes.<|im_end|>", "es."),
        ({"text": "all of it"}, "all of it<|im_end|>", " of it"),
    ],
    ids=["prompt", "empty-prompt", "text"],
)
def test_the_loss_is_on_completions_and_the_end_token(
    line: dict[str, Any], whole: str, part: str, tokenizer: Any, tmp_path: Path
) -> None:
    (feature,) = encode(line, tokenizer, tmp_path).features
    assert tokenizer.decode(feature["input_ids"]) == whole
    assert learned(feature, tokenizer).endswith(part + "<|im_end|>")
    assert learned(feature, tokenizer) in whole
    assert feature["labels"][0] == IGNORED, "nothing predicts the first token"


def test_the_loss_is_on_the_assistant_messages(tokenizer: Any, tmp_path: Path) -> None:
    (feature,) = encode({"messages": CHAT}, tokenizer, tmp_path).features
    assert learned(feature, tokenizer) == "good day<|im_end|>bye<|im_end|>"
    shown = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(feature["input_ids"]) == shown


def test_a_template_with_generation_markers_defines_the_assistant_tokens(
    tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: "
        "{% if m.role == 'assistant' %}{%- generation %}{{ m.content }}!{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    (feature,) = encode({"messages": CHAT}, tokenizer, tmp_path).features
    assert learned(feature, tokenizer) == " good day! bye!"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the model's tokenizer has no chat template: give prompt and completion"),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}",
            "line 1: the chat template refuses the messages: no system",
        ),
        ("{{ messages[-1]['content'] }}", "line 1: the chat template changes earlier turns"),
        ("{% for _ in range(10**9) %}{% endfor %}", "line 1: .*: Range too big"),
        ("{{ 'a' * 10**10 }}", "line 1: the chat template exceeds a limit"),
        ("{% if false %}{{ 9**(9**9) }}{% endif %}", "line 1: the chat template exceeds a limit"),
        (
            "{% if 0 %}{{ 'a'|center(9**9) }}{% endif %}",
            "line 1: the chat template exceeds a limit",
        ),
        ("{% if 0 %}{{ 9|urlize }}{% endif %}", "line 1: the chat template exceeds a limit"),
    ],
)
def test_an_unsuitable_template_is_reported(
    template: str | None, message: str, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=message):
        encode({"messages": CHAT}, tokenizer, tmp_path)


def test_examples_that_are_too_long_are_truncated_and_counted(
    tokenizer: Any, tmp_path: Path
) -> None:
    line = {"prompt": "Question:", "completion": " yes, and much more than fits here."}
    whole = encode(line, tokenizer, tmp_path)
    cut = encode(line, tokenizer, tmp_path, max_length=8)
    assert (whole.truncated, cut.truncated) == (0, 1)
    for name in ("input_ids", "labels"):
        assert cut.features[0][name] == whole.features[0][name][:8]


def test_a_text_is_truncated_between_its_special_tokens(tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    texts = [LabeledText("a", "a b c d e f g h i j", "x"), LabeledText("b", "a", "y")]
    encoded = text_features(texts, ("x", "y"), tokenizer, 6)
    assert [len(feature["input_ids"]) for feature in encoded.features] == [
        6,
        len(tokenizer("a").input_ids),
    ]
    assert [feature["labels"] for feature in encoded.features] == [0, 1]
    assert encoded.truncated == 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_each_text_has_the_tokens_that_it_has_alone(side: str, tiny_bert: Path) -> None:
    """Also texts of exactly the largest length, and those that are several times as long."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert, truncation_side=side)
    texts = [" ".join("abcdefghij"[:size] * times) for size in range(1, 11) for times in (1, 3)]
    length = len(tokenizer(texts[8]).input_ids)
    examples = [LabeledText(str(number), text, "x") for number, text in enumerate(texts)]
    encoded = text_features(examples, ("x",), tokenizer, length)
    for text, feature in zip(texts, encoded.features, strict=True):
        alone = tokenizer(text, truncation=True, max_length=length)
        assert feature["input_ids"] == alone["input_ids"]
    whole = [len(tokenizer(text).input_ids) for text in texts]
    assert encoded.truncated == sum(size > length for size in whole)
    assert length in whole
    assert max(whole) > 2 * length


def test_a_text_without_tokens_is_named(tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    with pytest.raises(DataError, match="line 7: the text has no tokens"):
        text_features([LabeledText("line 7", "", "x")], ("x",), tokenizer, 6)


def test_batches_are_padded_on_the_right() -> None:
    batch = Collator(pad_id=9)(
        [
            {"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]},
            {"input_ids": [4], "labels": [IGNORED]},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [IGNORED] * 3]
    classes = Collator(pad_id=9)([{"input_ids": [1], "labels": 2}, {"input_ids": [3], "labels": 0}])
    assert classes["labels"].tolist() == [2, 0]
    assert {tensor.dtype for tensor in (*batch.values(), *classes.values())} == {torch.int64}


def test_pairs_are_encoded_like_by_the_tokenizer_with_token_types(
    tiny_bert: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bert, tmp_path / "model")
    opened = open_checkpoint(give_rules(tmp_path / "model"))
    task = task_of(TrainConfig(task="sequence-classification"))
    examples = [
        LabeledText("line 1", "a b c d e f g h i j", "x", "k l m n"),
        LabeledText("line 2", "a", "y", "b"),
    ]
    encoded = opened.encode(task, examples, ("x", "y"), 12)
    for feature, example in zip(encoded.features, examples, strict=True):
        expected = opened.tokenizer(example.text, example.pair, truncation=True, max_length=12)
        assert feature["input_ids"] == expected["input_ids"]
        assert feature["token_type_ids"] == expected["token_type_ids"]
        assert 1 in feature["token_type_ids"]
    assert encoded.truncated == 1
    batch = Collator(0)(encoded.features)
    assert batch["token_type_ids"].shape == batch["input_ids"].shape == (2, 12)
    short = len(encoded.features[1]["input_ids"])
    assert batch["token_type_ids"][1, short:].tolist() == [0] * (12 - short)
    opened.config.type_vocab_size = 1  # like RoBERTa
    assert "token_type_ids" not in opened.encode(task, examples, ("x", "y"), 12).features[0]
