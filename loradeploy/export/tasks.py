"""What a model is exported as: the task, and what PyTorch and the graph call its parts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loradeploy.bundle.names import (
    CAUSAL_LM,
    DECODER_INPUT_IDS,
    FEATURE_EXTRACTION,
    IMAGE_CLASSIFICATION,
    LAST_HIDDEN_STATE,
    LOGITS,
    PAST,
    PEFT_TASKS,
    PIXEL_VALUES,
    SEQ2SEQ_LM,
    SEQUENCE_CLASSIFICATION,
    TASKS,
    TOKEN_CLASSIFICATION,
)
from loradeploy.errors import ExportError, UsageError

if TYPE_CHECKING:
    from loradeploy.adapter.adapter import Adapter


@dataclass(frozen=True)
class Task:
    """How a task is traced: transformers' auto class, the first output, if it keeps a cache."""

    name: str
    auto_class: str
    output: str
    cached: bool


TASK_TABLE: Final[Mapping[str, Task]] = {
    task.name: task
    for task in (
        Task(CAUSAL_LM, "AutoModelForCausalLM", LOGITS, True),
        Task(
            SEQUENCE_CLASSIFICATION,
            "AutoModelForSequenceClassification",
            LOGITS,
            False,
        ),
        Task(FEATURE_EXTRACTION, "AutoModel", LAST_HIDDEN_STATE, False),
        Task(TOKEN_CLASSIFICATION, "AutoModelForTokenClassification", LOGITS, False),
        Task(IMAGE_CLASSIFICATION, "AutoModelForImageClassification", LOGITS, False),
        Task(SEQ2SEQ_LM, "AutoModelForSeq2SeqLM", LOGITS, False),
    )
}

# Encoder-decoders by name that hear, and endings of theirs that are no language models.
_SPEECH: Final = ("whisper", "speech_to_text", "moonshine")
_HEADS: Final = ("ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification")

# The endings of transformers' class names, in the order they are tried.
_ENDINGS: Final = {
    "ForCausalLM": CAUSAL_LM,
    "LMHeadModel": CAUSAL_LM,
    "ForSequenceClassification": SEQUENCE_CLASSIFICATION,
    "ForTokenClassification": TOKEN_CLASSIFICATION,
    "ForImageClassification": IMAGE_CLASSIFICATION,
    "ForMaskedLM": FEATURE_EXTRACTION,
    "Model": FEATURE_EXTRACTION,
}


def choose_task(
    config: Mapping[str, Any], asked: str | None, adapters: Iterable[Adapter] = ()
) -> str:
    """The task of a checkpoint: as asked for, else the adapters', else its architecture's.

    Raises:
        UsageError: the task asked for is unknown, or nothing tells the task.
        ExportError: an encoder-decoder model, for another task than its own.
    """
    if config.get("is_encoder_decoder"):
        if asked not in (None, SEQ2SEQ_LM) or _architecture(config).endswith(_HEADS):
            raise ExportError(
                f"{_architecture(config)} is an encoder-decoder model, which is exported for"
                f" {SEQ2SEQ_LM} alone"
            )
        return SEQ2SEQ_LM
    if asked is not None:
        return check_task(asked)
    wanted = {adapter.config.task_type for adapter in adapters} - {None}
    if len(wanted) == 1:
        peft_name = wanted.pop()
        for name, theirs in PEFT_TASKS.items():
            if theirs == peft_name:
                return name
        raise ExportError(
            f"the adapter is for {peft_name} (task_type), which cannot be exported yet: there are"
            f" {', '.join(PEFT_TASKS.values())}"
        )
    for ending, task_name in _ENDINGS.items():
        if _architecture(config).endswith(ending):
            return task_name
    raise UsageError(
        f"the task cannot be told from the architecture {_architecture(config)!r} in config.json:"
        f" give --task, one of {', '.join(TASKS)}"
    )


def auto_class(task: str, config: Mapping[str, Any]) -> str:
    """transformers' auto class; one for speech differs from that for text."""
    if task == SEQ2SEQ_LM and config.get("model_type") in _SPEECH:
        return "AutoModelForSpeechSeq2Seq"
    return TASK_TABLE[task].auto_class


def check_task(task: str) -> str:
    """`task` itself, or UsageError where there is none of that name."""
    if task not in TASKS:
        raise UsageError(f"the task {task!r} is unknown: give one of {', '.join(TASKS)}")
    return task


def task_of_graph(inputs: Collection[str], outputs: Mapping[str, int | None]) -> str | None:
    """The task that a graph's inputs, and outputs with their ranks, show; None where they do not.

    A cache makes it a causal language model, `logits` [batch, labels] a classifier, and
    `last_hidden_state` an encoder.
    """
    cached = any(name.startswith(PAST) for name in inputs)
    if LOGITS in outputs:
        rank = outputs[LOGITS]
        if DECODER_INPUT_IDS in inputs:
            return None if cached else SEQ2SEQ_LM
        if PIXEL_VALUES in inputs:
            return IMAGE_CLASSIFICATION
        if cached or rank == 3:
            return CAUSAL_LM
        return SEQUENCE_CLASSIFICATION if rank == 2 else None
    return FEATURE_EXTRACTION if LAST_HIDDEN_STATE in outputs else None


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or [config.get("model_type") or "unknown"]
    return str(names[0])
