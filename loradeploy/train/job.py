"""A training run from beginning to end."""

from __future__ import annotations

import logging
import os
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from loradeploy.adapter import AdapterConfig, base_digest, save_adapter
from loradeploy.adapter.config import CONFIG_NAME
from loradeploy.errors import DataError, ModelError, TrainingError, UsageError
from loradeploy.files import atomic_directory, check_replaceable
from loradeploy.lora.checkpoint import find_checkpoint
from loradeploy.lora.inject import Injection, inject
from loradeploy.train.api import TrainResult
from loradeploy.train.config import CAUSAL_LM, TrainConfig
from loradeploy.train.curve import write_curve
from loradeploy.train.data import read_conversations, read_labelled_texts
from loradeploy.train.features import IGNORED, Collator, conversation_features, text_features
from loradeploy.train.trainer import AdapterTrainer, Progress, arguments, steps_of

_PEFT_TASKS: Final = {CAUSAL_LM: "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}
_WIDTHS: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Examples that tell the loss before and after where no validation split is asked for.
_EVALUATED: Final = 32


@dataclass(frozen=True)
class Prepared:
    """What a run trains on: token ids, and a classifier's label names."""

    training: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    labels: tuple[str, ...] | None


def run(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: TrainConfig,
    *,
    resume: bool,
) -> TrainResult:
    """See `loradeploy.train.api.train`."""
    target = Path(output)
    check_replaceable(target, marker=CONFIG_NAME)
    checkpoint = find_checkpoint(model)
    with _quiet():
        tokenizer = _tokenizer(checkpoint)
        prepared = _prepare(Path(data), tokenizer, config)
        set_seed(config.seed)
        base, fresh = _load(checkpoint, config, prepared.labels)
        injection = inject(base, _adapter_config(model, config, fresh), seed=config.seed)
        checkpoints = target.with_name(f"{target.name}-checkpoints")
        trainer, progress = _trainer(injection, config, prepared, tokenizer, checkpoints)
        before = _evaluate(trainer, prepared.evaluation)
        begin = time.perf_counter()
        with _explained(progress):
            trainer.train(resume_from_checkpoint=_newest(checkpoints) if resume else None)
        seconds = time.perf_counter() - begin
        after = _evaluate(trainer, prepared.evaluation)
    digest_of_base = base_digest(checkpoint)
    adapter = injection.adapter(base_digest=digest_of_base, labels=prepared.labels)
    with atomic_directory(target, marker=CONFIG_NAME) as place:
        save_adapter(adapter, place)
        write_curve(progress.curve, place)
        (place / "train.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    return TrainResult(
        adapter=target,
        digest=adapter.digest,
        base_digest=digest_of_base,
        steps=trainer.state.global_step,
        tokens=trainer.tokens,
        seconds=round(seconds, 2),
        parameters=adapter.parameter_count,
        loss_before=before[0],
        loss_after=after[0],
        accuracy_before=before[1],
        accuracy_after=after[1],
    )


def _tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as problem:
        first = str(problem).splitlines()[0]
        raise ModelError(f"{checkpoint} has no tokenizer that can be read: {first}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _prepare(data: Path, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> Prepared:
    labels: tuple[str, ...] | None = None
    if config.task == CAUSAL_LM:
        features = conversation_features(read_conversations(data), tokenizer, config.max_length)
    else:
        texts = read_labelled_texts(data)
        labels = tuple(sorted({text.label for text in texts}))
        features = text_features(texts, labels, tokenizer, config.max_length)
    random.Random(config.seed).shuffle(features)
    held = round(len(features) * config.validation_split)
    if config.validation_split and not 0 < held < len(features):
        raise DataError(f"{data}: {len(features)} examples are too few for a validation split")
    evaluation = features[:held] if held else features[:_EVALUATED]
    return Prepared(features[held:], evaluation, labels)


def _load(
    checkpoint: Path, config: TrainConfig, labels: Sequence[str] | None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The base model, and the modules that its checkpoint has no weights for."""
    options: dict[str, Any] = {"dtype": _WIDTHS[config.precision], "output_loading_info": True}
    if labels is None:
        kind = AutoModelForCausalLM
    else:
        kind = AutoModelForSequenceClassification
        options["num_labels"] = len(labels)
    try:
        model, info = kind.from_pretrained(checkpoint, **options)
    except (OSError, ValueError, RuntimeError) as problem:
        first = str(problem).strip().splitlines()[0]
        raise ModelError(f"{checkpoint} cannot be loaded for {config.task}: {first}") from None
    fresh = tuple(sorted({name.rpartition(".")[0] for name in info["missing_keys"]}))
    if labels is None and fresh:
        raise ModelError(
            f"{checkpoint} has no weights for {', '.join(fresh)}: it is no {config.task} model"
        )
    if labels is not None:
        model.config.pad_token_id = model.config.pad_token_id or 0
        # A head that the checkpoint brings is trained on too: its labels are others.
        fresh = fresh or tuple(n for n in ("classifier", "score") if hasattr(model, n))
    return model, fresh


def _adapter_config(
    model: str | os.PathLike[str], config: TrainConfig, fresh: tuple[str, ...]
) -> AdapterConfig:
    return AdapterConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.use_rslora,
        target_modules=config.targets,
        modules_to_save=tuple(sorted({name.rpartition(".")[2] for name in fresh})),
        task_type=_PEFT_TASKS[config.task],
        base_model_name_or_path=os.fspath(model),
    )


def _trainer(
    injection: Injection,
    config: TrainConfig,
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    checkpoints: Path,
) -> tuple[AdapterTrainer, Progress]:
    progress = Progress()
    steps = steps_of(config, len(prepared.training))
    trainer = AdapterTrainer(
        injection=injection,
        config=config,
        args=arguments(config, checkpoints, steps=steps),
        train_dataset=prepared.training,
        data_collator=Collator(int(tokenizer.pad_token_id or 0)),
        callbacks=[progress],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, progress


@torch.no_grad()
def _evaluate(
    trainer: AdapterTrainer, examples: Sequence[dict[str, Any]]
) -> tuple[float, float | None]:
    """Mean loss (by labelled token, or by text), and a classifier's accuracy."""
    model = trainer.model
    training = model.training
    model.eval()
    total, counted, right, texts = 0.0, 0, 0, 0
    for inputs in trainer.get_eval_dataloader(list(examples)):
        inputs = trainer._prepare_inputs(inputs)
        loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
        labels = inputs["labels"]
        items = int((labels[:, 1:] != IGNORED).sum()) if labels.ndim == 2 else len(labels)
        total, counted = total + float(loss) * items, counted + items
        if labels.ndim == 1:
            right += int((outputs.logits.argmax(-1) == labels).sum())
            texts += len(labels)
    model.train(training)
    return total / counted, right / texts if texts else None


def _newest(checkpoints: Path) -> str:
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda place: int(place.name[11:]))
    if not found:
        raise UsageError(f"there is nothing to resume in {checkpoints}: train with --save-steps")
    return str(found[-1])


@contextmanager
def _explained(progress: Progress) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise TrainingError(
            "memory ran out: lower batch_size (and raise gradient_accumulation), max_length or rank"
        ) from None
    finally:
        progress.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' and torch's progress bars, notes and warnings from the user."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    logger = logging.getLogger("accelerate")
    level = logger.level
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        logger.setLevel(level)
        if bars:
            transformers.logging.enable_progress_bar()
