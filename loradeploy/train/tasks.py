"""The tasks that adapters are trained for: one row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.bundle.names import CAUSAL_LM, PEFT_TASKS, SEQUENCE_CLASSIFICATION
from loradeploy.train.data import read_conversations, read_labelled_texts
from loradeploy.train.features import Encoded, conversation_features, text_features
from loradeploy.train.losses import LossFunction, causal_lm_loss, classification_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """What one task does differently.

    `auto_class`: transformers' class that loads the base.
    `read`: examples from a file or folder. `encode`: their token ids and labels; it is given a
    classifier's label names. `labelled`: whether the examples have classes, and results accuracy.
    """

    name: str
    auto_class: str
    labelled: bool
    read: Callable[[Path], Sequence[Any]]
    encode: Callable[[Sequence[Any], Sequence[str], PreTrainedTokenizerBase, int], Encoded]
    loss: LossFunction

    @property
    def peft(self) -> str:
        """PEFT's name of the task."""
        return PEFT_TASKS[self.name]


TASK_TABLE: Final[Mapping[str, Task]] = {
    task.name: task
    for task in (
        Task(
            name=CAUSAL_LM,
            auto_class="AutoModelForCausalLM",
            labelled=False,
            read=read_conversations,
            encode=lambda examples, _, tokenizer, longest: conversation_features(
                examples, tokenizer, longest
            ),
            loss=causal_lm_loss,
        ),
        Task(
            name=SEQUENCE_CLASSIFICATION,
            auto_class="AutoModelForSequenceClassification",
            labelled=True,
            read=read_labelled_texts,
            encode=text_features,
            loss=classification_loss,
        ),
    )
}
