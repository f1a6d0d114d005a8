"""The table of tasks, which training, export and parity read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

CAUSAL_LM: Final = "causal-lm"
SEQUENCE_CLASSIFICATION: Final = "sequence-classification"
FEATURE_EXTRACTION: Final = "feature-extraction"
TOKEN_CLASSIFICATION: Final = "token-classification"
IMAGE_CLASSIFICATION: Final = "image-classification"
IMAGE_FEATURE_EXTRACTION: Final = "image-feature-extraction"
SEQ2SEQ_LM: Final = "seq2seq-lm"
VISION_TOWER: Final = "vision-tower"
QUESTION_ANSWERING: Final = "question-answering"

CLASSIFIER_HEADS: Final = ("classifier", "score")
QA_HEADS: Final = ("qa_outputs",)
LM_HEAD: Final = "lm_head"
# Names of the output head of language models: Llama and most others, GPT-NeoX, Whisper.
OUTPUT_HEADS: Final = (LM_HEAD, "embed_out", "proj_out")


@dataclass(frozen=True)
class Task:
    """A task, and the names of its parts in transformers and PEFT.

    `auto_class`: the class of transformers that loads the model. `output`: its first output.
    `peft`: PEFT's task_type, or None. `heads`: possible names of the model's output head.
    `trained_head`: whether PEFT trains the head in full for this task, even if modules_to_save does
    not name it. `cached`: whether the model has a KV cache. `trained`: whether `train` supports it.
    `runner`: the class that runs its bundles, which `loradeploy run` uses too; None if only
    `AdapterSession.run` does. `evaluated`: whether parity computes its metrics on held-out data.
    """

    name: str
    auto_class: str
    output: str
    peft: str | None
    heads: tuple[str, ...] = ()
    trained_head: bool = False
    cached: bool = False
    trained: bool = False
    runner: str | None = None
    evaluated: bool = False


TASK_TABLE: Final[Mapping[str, Task]] = {
    task.name: task
    for task in (
        Task(
            CAUSAL_LM,
            "AutoModelForCausalLM",
            "logits",
            "CAUSAL_LM",
            (LM_HEAD,),
            cached=True,
            trained=True,
            runner="TextGenerator",
            evaluated=True,
        ),
        Task(
            SEQUENCE_CLASSIFICATION,
            "AutoModelForSequenceClassification",
            "logits",
            "SEQ_CLS",
            CLASSIFIER_HEADS,
            trained_head=True,
            trained=True,
            runner="TextClassifier",
            evaluated=True,
        ),
        Task(
            FEATURE_EXTRACTION,
            "AutoModel",
            "last_hidden_state",
            "FEATURE_EXTRACTION",
            trained=True,
            runner="TextEmbedder",
            evaluated=True,
        ),
        Task(
            TOKEN_CLASSIFICATION,
            "AutoModelForTokenClassification",
            "logits",
            "TOKEN_CLS",
            CLASSIFIER_HEADS,
            trained_head=True,
            trained=True,
            runner="TokenClassifier",
            evaluated=True,
        ),
        Task(
            IMAGE_CLASSIFICATION,
            "AutoModelForImageClassification",
            "logits",
            None,
            CLASSIFIER_HEADS,
            trained=True,
            runner="ImageClassifier",
            evaluated=True,
        ),
        Task(
            IMAGE_FEATURE_EXTRACTION,
            "AutoModel",
            "last_hidden_state",
            None,
            runner="ImageEmbedder",
        ),
        Task(
            SEQ2SEQ_LM,
            "AutoModelForSeq2SeqLM",
            "logits",
            "SEQ_2_SEQ_LM",
            (LM_HEAD,),
            trained=True,
            runner="TextGenerator",
            evaluated=True,
        ),
        Task(VISION_TOWER, "AutoModelForImageTextToText", "image_features", None),
        Task(
            QUESTION_ANSWERING,
            "AutoModelForQuestionAnswering",
            "start_logits",
            "QUESTION_ANS",
            QA_HEADS,
            trained_head=True,
        ),
    )
}

# All tasks: export supports them with side inputs and merged, and parity checks them.
TASKS: Final = tuple(TASK_TABLE)
# Tasks that `train` supports.
TRAINED_TASKS: Final = tuple(name for name, task in TASK_TABLE.items() if task.trained)
# Tasks with metrics on held-out data.
EVALUATED_TASKS: Final = tuple(name for name, task in TASK_TABLE.items() if task.evaluated)
# Tasks whose models end in a classifier head, which adapters replace.
CLASSIFICATIONS: Final = tuple(n for n in TASKS if TASK_TABLE[n].heads == CLASSIFIER_HEADS)
# Tasks whose models end in a head of their own, which adapters replace.
HEADED: Final = (*CLASSIFICATIONS, QUESTION_ANSWERING)
# Tasks whose models generate text.
GENERATING: Final = (CAUSAL_LM, SEQ2SEQ_LM)
# Tasks whose inputs are images.
IMAGES: Final = (IMAGE_CLASSIFICATION, IMAGE_FEATURE_EXTRACTION, VISION_TOWER)
# Tasks whose models return vectors.
FEATURES: Final = (FEATURE_EXTRACTION, IMAGE_FEATURE_EXTRACTION)
# PEFT's task_type in an adapter's config, by which PEFT selects the class that wraps a model.
PEFT_TASKS: Final = {n: peft for n in TASKS if (peft := TASK_TABLE[n].peft) is not None}


def task_of_peft(task_type: str | None) -> Task | None:
    """The task of an adapter's `task_type`, or None if it is unknown."""
    if task_type is None:
        return None
    return next((task for task in TASK_TABLE.values() if task.peft == task_type), None)
