"""The models of the training benchmark: a decoder that writes headlines, a topic classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tools.inputs.news_tasks import full_stories
from tools.inputs.real_models import bbc_news, minilm, smollm2

if TYPE_CHECKING:
    from loradeploy.train.tasks.losses import LossFunction

TOPICS: Final = 5


@dataclass(frozen=True)
class Benchmarked:
    """A model, its examples, and how each side puts them into batches.

    `features`: returns the examples of a number of stories, each of at most `max_length` tokens.
    `peft_collator`: the collator that PEFT users pass to transformers' Trainer. `ours`: the
    collator and the loss of `loradeploy.train`, which may change the model's attention.
    """

    task_type: str
    heads: tuple[str, ...]  # modules trained as a whole
    directory: Callable[[], Path]
    load: Callable[..., Any]
    features: Callable[[Any, int, int], list[dict[str, Any]]]
    peft_collator: Callable[[Any], Any]
    ours: Callable[[Any, Any], tuple[Any, LossFunction]]

    def model(self, dtype: str) -> Any:
        """Load the base in `dtype`, the name of a torch dtype."""
        import torch

        return self.load(self.directory(), dtype=getattr(torch, dtype))

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.directory(), trust_remote_code=False)


def _decoder(*arguments: Any, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(*arguments, trust_remote_code=False, **options)


def _classifier(*arguments: Any, **options: Any) -> Any:
    """Load the encoder with a random head for the topics, the same at each call."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        *arguments, **options, num_labels=TOPICS, trust_remote_code=False
    )


def _headlines(tokenizer: Any, count: int, max_length: int) -> list[dict[str, Any]]:
    """Return stories, with the loss on the headline."""
    features = []
    for story in full_stories(bbc_news())[:count]:
        answer = [*tokenizer.encode(f" {story.headline}"), tokenizer.eos_token_id]
        question = tokenizer.encode(f"News story: {story.text}")[: max_length - len(answer) - 8]
        question += tokenizer.encode("\n\nHeadline:")
        features.append({"input_ids": question + answer, "labels": [-100] * len(question) + answer})
    return features


def _topics(tokenizer: Any, count: int, max_length: int) -> list[dict[str, Any]]:
    """Return stories, each with the number of its topic."""
    stories = full_stories(bbc_news())
    topics = sorted({story.topic for story in stories})
    return [
        {
            "input_ids": tokenizer.encode(story.text, truncation=True, max_length=max_length),
            "labels": topics.index(story.topic),
        }
        for story in stories[:count]
    ]


def _padded_labels(tokenizer: Any) -> Any:
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(tokenizer, padding=True)


def _padded(tokenizer: Any) -> Any:
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer)


def _packed(model: Any, tokenizer: Any) -> tuple[Any, LossFunction]:
    from loradeploy.train.data.packing import PackingCollator, enable_packing
    from loradeploy.train.fusion.last_layer import shorten
    from loradeploy.train.fusion.modules import fuse
    from loradeploy.train.tasks.losses import causal_lm_loss

    if not enable_packing(model):
        raise RuntimeError("SmolLM2 is expected to pack")
    fuse(model)
    if not shorten(model):
        raise RuntimeError("SmolLM2 is expected to compute its last layer at labels only")
    return PackingCollator(), causal_lm_loss


def _classes(model: Any, tokenizer: Any) -> tuple[Any, LossFunction]:
    from loradeploy.train.data.features import Collator
    from loradeploy.train.tasks.losses import classification_loss

    return Collator(tokenizer.pad_token_id), classification_loss


MODELS: Final[Mapping[str, Benchmarked]] = {
    "SmolLM2-135M": Benchmarked(
        "CAUSAL_LM", (), smollm2, _decoder, _headlines, _padded_labels, _packed
    ),
    "MiniLM-L6": Benchmarked(
        "SEQ_CLS", ("classifier",), minilm, _classifier, _topics, _padded, _classes
    ),
}
