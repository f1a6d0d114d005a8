"""Choose the task of an export: the requested one, or what adapters, config or graph show."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.fitting.towers import TOWER_TASKS
from loradeploy.adapter.tasks import (
    CAUSAL_LM,
    CLASSIFICATIONS,
    FEATURE_EXTRACTION,
    HEADED,
    IMAGE_CLASSIFICATION,
    IMAGE_FEATURE_EXTRACTION,
    PEFT_TASKS,
    QUESTION_ANSWERING,
    SEQ2SEQ_LM,
    SEQUENCE_CLASSIFICATION,
    TASK_TABLE,
    TASKS,
    TOKEN_CLASSIFICATION,
    VISION_TOWER,
)
from loradeploy.bundle.names import (
    DECODER_INPUT_IDS,
    END_LOGITS,
    IMAGE_EMBEDS,
    PAST,
    PIXEL_VALUES,
    START_LOGITS,
    TEXT_EMBEDS,
)
from loradeploy.bundle.outputs import HIDDEN_NAMES, LOGITS_NAMES, main_output
from loradeploy.errors import ExportError, UsageError, listed_names, shortened, shown
from loradeploy.export.towers import KINDS
from loradeploy.lora.base.architectures import architecture, encoder_decoder_refusal

if TYPE_CHECKING:
    from loradeploy.adapter.adapter import Adapter


# Encoder-decoders of speech, and unsupported models with two towers, by model type.
_SPEECH: Final = ("whisper", "speech_to_text", "moonshine")
_TWO_TOWERS: Final = ("align", "altclip", "blip", "chinese_clip")
_ALONE: Final = re.compile(r"(\w+?)_(text|vision)_model")
# Modules of a model without a head, whose layers are at its top level.
_BARE: Final = re.compile(r"(layers?|h|blocks?|decoder\.layers|encoder\.layers?)\.\d+\.|embed|wte")

# The endings of transformers' class names, in the order they are tried.
_ENDINGS: Final = {
    "ForCausalLM": CAUSAL_LM,
    "LMHeadModel": CAUSAL_LM,
    "ForSequenceClassification": SEQUENCE_CLASSIFICATION,
    "ForTokenClassification": TOKEN_CLASSIFICATION,
    "ForQuestionAnswering": QUESTION_ANSWERING,
    "ForImageClassification": IMAGE_CLASSIFICATION,
    "ForMaskedLM": FEATURE_EXTRACTION,
    "Model": FEATURE_EXTRACTION,
}


def choose_task(
    config: Mapping[str, Any], requested: str | None, adapters: Iterable[Adapter] = ()
) -> str:
    """The task of a checkpoint: the requested one, else the adapters', else the architecture's.

    Raises:
        UsageError: the requested task is unknown, nothing shows the task, or an adapter's task does
            not fit the architecture; the message names a task that fits.
        ExportError: an encoder-decoder model, for another task than its own, or one that is not
            supported.
    """
    if config.get("is_encoder_decoder"):
        if (refusal := encoder_decoder_refusal(config, requested)) is not None:
            raise ExportError(refusal)
        return SEQ2SEQ_LM
    if (tower := _tower_task(config, requested)) is not None:
        return tower
    if requested == VISION_TOWER and not is_image_text(config):
        raise UsageError(
            f"{architecture(config)} is not a model of images and text: only these have a"
            f" {VISION_TOWER} to export"
        )
    if requested is not None:
        _check_vectors(config, check_task(requested))
        return requested
    own = own_task(config)
    if own == IMAGE_FEATURE_EXTRACTION:
        return own
    given = list(adapters)
    declared = {adapter.config.task_type for adapter in given} - {None}
    if len(declared) > 1:
        raise UsageError(
            "the adapters are for different tasks (task_type"
            f" {listed_names(sorted(map(str, declared)))}): export a bundle for each, or give"
            f" {_advised(own)}"
        )
    if declared:
        task_type = declared.pop()
        meant = next((name for name, theirs in PEFT_TASKS.items() if theirs == task_type), None)
        if meant is None or not _can_be(meant, own, architecture(config), given):
            advice = f"give {_advised(own)}"
            if own and meant == FEATURE_EXTRACTION:
                advice += f", or {_advised(meant)} for its hidden states"
            headless = " (it has no head)" if meant in CLASSIFICATIONS else ""
            raise UsageError(
                f"the adapter's task_type is {shown(task_type)}{headless}, and the model is of the"
                f" class {shortened(architecture(config), 60)}: {advice}"
            )
        return meant
    if own is not None:
        return own
    if is_image_text(config):
        raise UsageError(
            f"{architecture(config)} is a model of images and text: `task={CAUSAL_LM!r}` exports"
            f" its decoder, `task={VISION_TOWER!r}` its vision tower with the projector"
        )
    raise UsageError(
        f"the task is not known from the architecture {shown(architecture(config))} in"
        f" config.json: give {_advised(None)}"
    )


def _tower_task(config: Mapping[str, Any], requested: str | None) -> str | None:
    """The requested task of a model with two towers; None for other models.

    Raises:
        ExportError: the model, or its image tower, is not supported.
        UsageError: no tower is requested.
    """
    model_type, named = str(config.get("model_type")), architecture(config)
    alone = _ALONE.fullmatch(model_type)
    if alone and alone[1] in KINDS and (named.endswith("WithProjection") or alone[1] != "clip"):
        raise ExportError(
            f"{named} is one tower of a model, which is exported from the directory of the"
            " whole model"
        )
    if model_type not in (*KINDS, *_TWO_TOWERS):
        return None
    towers = {TOWER_TASKS[kind.tower]: kind.tower for kind in KINDS.get(model_type, ())}
    classifies = (requested or own_task(config)) == IMAGE_CLASSIFICATION
    if classifies and (not towers or IMAGE_FEATURE_EXTRACTION in towers):
        return None
    if model_type not in KINDS:
        raise ExportError(
            f"{named} has a tower for texts and one for images, which is not"
            f" supported; of such models {', '.join(KINDS)} are"
        )
    if requested in towers:
        return requested
    if classifies or requested == IMAGE_FEATURE_EXTRACTION:
        its = "" if classifies else f': its text tower is (`task="{FEATURE_EXTRACTION}"`)'
        raise ExportError(
            f"the image tower of {named} takes patches of images of any size, which is not"
            f" supported{its}"
        )
    advice = " or ".join(f'`task="{task}"` for its {tower} tower' for task, tower in towers.items())
    raise UsageError(
        f"{named} has a tower for texts and one for images, each a bundle of its own: give {advice}"
    )


def _check_vectors(config: Mapping[str, Any], task: str) -> None:
    """Raise UsageError if text vectors are requested from an image model, or the reverse."""
    if task == FEATURE_EXTRACTION and _of_images(config):
        raise UsageError(
            f"{architecture(config)} gives vectors of images: give"
            f" {_advised(IMAGE_FEATURE_EXTRACTION)}"
        )
    if task == IMAGE_FEATURE_EXTRACTION and not _of_images(config):
        raise UsageError(
            f"{architecture(config)} is not a model of images: give {_advised(own_task(config))}"
        )


def _of_images(config: Mapping[str, Any]) -> bool:
    return "vocab_size" not in config and "image_size" in config and "text_config" not in config


def _advised(task: str | None) -> str:
    """The parameter to give, for a message."""
    return f"`task`, one of {', '.join(TASKS)}" if task is None else f'`task="{task}"`'


def own_task(config: Mapping[str, Any]) -> str | None:
    """The task of a checkpoint's architecture; None if its name does not show it."""
    if config.get("is_encoder_decoder"):
        return SEQ2SEQ_LM
    for ending, task_name in _ENDINGS.items():
        if architecture(config).endswith(ending):
            images = task_name == FEATURE_EXTRACTION and _of_images(config)
            return IMAGE_FEATURE_EXTRACTION if images else task_name
    return None


def _can_be(task: str, own: str | None, named: str, adapters: Iterable[Adapter]) -> bool:
    """Whether adapters that declare `task` fit a model whose own task is `own`."""
    if task == SEQ2SEQ_LM:
        return False  # only encoder-decoders have this task
    if own in (None, task):
        return True
    if task in HEADED:
        # A head is new to the model, and comes with its adapter.
        return any(adapter.saved for adapter in adapters)
    bare = named.endswith("Model") and not named.endswith("LMHeadModel")
    if task == CAUSAL_LM:
        return bare  # a decoder's checkpoint may have this architecture
    return own in CLASSIFICATIONS or all(_BARE.match(m) for a in adapters for m in a.factors)


def is_image_text(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of images and text: a vision tower before a decoder."""
    vision = isinstance(config.get("vision_config"), Mapping)
    return vision and architecture(config).endswith("ForConditionalGeneration")


def auto_class(task: str, config: Mapping[str, Any]) -> str:
    """The name of transformers' auto class, which differs for speech, and for images and text.

    `causal-lm` of a model of images and text is its decoder, but the whole model is loaded.
    """
    if task == CAUSAL_LM and is_image_text(config):
        return "AutoModelForImageTextToText"
    if task == SEQ2SEQ_LM and config.get("model_type") in _SPEECH:
        return "AutoModelForSpeechSeq2Seq"
    return TASK_TABLE[task].auto_class


def check_task(task: str) -> str:
    """Return `task`; raise UsageError if there is no task of that name."""
    if task not in TASKS:
        raise UsageError(f"the task {task!r} is unknown: give one of {', '.join(TASKS)}")
    return task


def task_of_graph(inputs: Collection[str], outputs: Mapping[str, int | None]) -> str | None:
    """The task that a graph's inputs, and outputs with their ranks, show; None if they do not.

    Logits of the start and the end of an answer show question answering, a cache a causal language
    model, `logits` [batch, labels] a classifier, and `last_hidden_state` an encoder; other
    exporters have other names for them.
    """
    cached = any(name.startswith(PAST) for name in inputs)
    if START_LOGITS in outputs and END_LOGITS in outputs:
        return None if cached else QUESTION_ANSWERING
    logits = next((name for name in LOGITS_NAMES if name in outputs), None)
    if logits is None and cached:
        logits = main_output(CAUSAL_LM, outputs)
    if logits is not None:
        rank = outputs[logits]
        if DECODER_INPUT_IDS in inputs:
            return None if cached else SEQ2SEQ_LM
        if PIXEL_VALUES in inputs:
            return IMAGE_CLASSIFICATION
        if cached or rank == 3:
            return CAUSAL_LM
        return SEQUENCE_CLASSIFICATION if rank == 2 else None
    if not any(name in outputs for name in (*HIDDEN_NAMES, TEXT_EMBEDS, IMAGE_EMBEDS)):
        return None
    return IMAGE_FEATURE_EXTRACTION if PIXEL_VALUES in inputs else FEATURE_EXTRACTION
