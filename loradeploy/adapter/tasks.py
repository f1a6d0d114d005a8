"""The tasks that adapters are for: one table, which training, export and parity read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

CAUSAL_LM: Final = "causal-lm"
SEQUENCE_CLASSIFICATION: Final = "sequence-classification"
FEATURE_EXTRACTION: Final = "feature-extraction"
TOKEN_CLASSIFICATION: Final = "token-classification"
IMAGE_CLASSIFICATION: Final = "image-classification"
SEQ2SEQ_LM: Final = "seq2seq-lm"
QUESTION_ANSWERING: Final = "question-answering"

CLASSIFIER_HEADS: Final = ("classifier", "score")
LM_HEAD: Final = "lm_head"


@dataclass(frozen=True)
class Task:
    """What transformers and PEFT call the parts of a model for one task.

    `auto_class`: transformers' class that loads it. `output`: the first output of its forward.
    `peft`: PEFT's task_type, None where it has none. `heads`: names of modules that end the model.
    `trained_head`: whether PEFT trains them whole for this task, named in modules_to_save or not.
    `cached`: whether the model keeps a KV cache. `exported`: whether a bundle can be for it.
    """

    name: str
    auto_class: str
    output: str
    peft: str | None
    heads: tuple[str, ...] = ()
    trained_head: bool = False
    cached: bool = False
    exported: bool = True


TASK_TABLE: Final[Mapping[str, Task]] = {
    task.name: task
    for task in (
        Task(CAUSAL_LM, "AutoModelForCausalLM", "logits", "CAUSAL_LM", (LM_HEAD,), cached=True),
        Task(
            SEQUENCE_CLASSIFICATION,
            "AutoModelForSequenceClassification",
            "logits",
            "SEQ_CLS",
            CLASSIFIER_HEADS,
            trained_head=True,
        ),
        Task(FEATURE_EXTRACTION, "AutoModel", "last_hidden_state", "FEATURE_EXTRACTION"),
        Task(
            TOKEN_CLASSIFICATION,
            "AutoModelForTokenClassification",
            "logits",
            "TOKEN_CLS",
            CLASSIFIER_HEADS,
            trained_head=True,
        ),
        Task(
            IMAGE_CLASSIFICATION,
            "AutoModelForImageClassification",
            "logits",
            None,
            CLASSIFIER_HEADS,
        ),
        Task(SEQ2SEQ_LM, "AutoModelForSeq2SeqLM", "logits", "SEQ_2_SEQ_LM", (LM_HEAD,)),
        Task(
            QUESTION_ANSWERING,
            "AutoModelForQuestionAnswering",
            "start_logits",
            "QUESTION_ANS",
            ("qa_outputs",),
            trained_head=True,
            exported=False,
        ),
    )
}

# Those that a bundle can be for.
TASKS: Final = tuple(name for name, task in TASK_TABLE.items() if task.exported)
# Their models end in a head, which adapters replace whole.
CLASSIFICATIONS: Final = tuple(n for n in TASKS if TASK_TABLE[n].heads == CLASSIFIER_HEADS)
# PEFT's names of them in an adapter's config, by which it chooses the class around a model.
PEFT_TASKS: Final = {n: peft for n in TASKS if (peft := TASK_TABLE[n].peft) is not None}


def task_of_peft(task_type: str | None) -> Task | None:
    """The task that an adapter's `task_type` names, None where it names none that is known."""
    if task_type is None:
        return None
    return next((task for task in TASK_TABLE.values() if task.peft == task_type), None)
