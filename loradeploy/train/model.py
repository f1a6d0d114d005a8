"""Open and load the base model of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from loradeploy.adapter.tasks import CAUSAL_LM
from loradeploy.bundle.model_config import stated_length
from loradeploy.bundle.names import TOKEN_TYPE_IDS
from loradeploy.errors import ModelError, first_line, listed_names
from loradeploy.lora.base.architectures import encoder_decoder_refusal, untraceable
from loradeploy.lora.base.checkpoint import pad_token
from loradeploy.lora.base.loading import from_pretrained, load_pretrained
from loradeploy.lora.quiet import quiet
from loradeploy.printable import logger_of
from loradeploy.train.config import TrainConfig
from loradeploy.train.data.features import Encoded
from loradeploy.train.data.packing import evaluating, same_logits, separate_logits, trial_examples
from loradeploy.train.loop.processes import is_main_process
from loradeploy.train.tasks.table import Task

logger = logger_of(__name__)

_UNLIMITED: Final = 1_000_000  # tokens, for image models
# int8 and int4 bases are loaded in float32, and quantized afterwards.
_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Checkpoint:
    """A base model on disk, before its weights are read. `tokenizer`: None for image models."""

    directory: Path
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def pad_id(self) -> int:
        """The padding token; 0 for image models."""
        if self.tokenizer is None:
            return 0
        return pad_token(self.config, self.tokenizer)

    @property
    def max_length(self) -> int:
        """The maximum number of tokens that the model and its tokenizer support."""
        if self.tokenizer is None:
            return _UNLIMITED
        longest = int(self.tokenizer.model_max_length)
        positions = stated_length(self.config.to_dict())
        targets = getattr(self.config, "max_target_positions", None)  # of Whisper's decoder
        return min(limit for limit in (longest, positions, targets) if limit is not None)

    def encode(
        self, task: Task, examples: Sequence[Any], labels: Sequence[str], max_length: int
    ) -> Encoded:
        """Encode examples for the model, with token types only if it has several.

        Raises:
            DataError: as the task's `encode`.
        """
        encoded = task.encode(examples, labels, self.tokenizer, max_length)
        if (getattr(self.config, "type_vocab_size", None) or 0) < 2:
            for feature in encoded.features:
                feature.pop(TOKEN_TYPE_IDS, None)
        return encoded

    def within(self, config: TrainConfig) -> TrainConfig:
        """`config` with `max_length` limited to what the model supports; a warning names both."""
        if config.max_length <= self.max_length:
            return config
        if config.max_length != TrainConfig.max_length and is_main_process():
            logger.warning(
                "`max_length` is %d, and the model and its tokenizer support %d tokens: longer"
                " examples are truncated to these",
                config.max_length,
                self.max_length,
            )
        return replace(config, max_length=self.max_length)

    def check_exportable(self, task: str) -> None:
        """Raise ModelError if no adapter of this architecture is exported for `task`."""
        values = self.config.to_dict()
        if (refusal := encoder_decoder_refusal(values, task)) is not None:
            raise ModelError(f"{self.directory}: {refusal}")
        for own in (self.config, self.config.get_text_config()):
            if (refusal := untraceable(own.model_type)) is not None:
                raise ModelError(f"{self.directory} {refusal}")


@dataclass(frozen=True)
class Base:
    """A loaded base model, and its fully trained modules: the head of a classifier."""

    model: PreTrainedModel
    heads: tuple[str, ...]


def open_checkpoint(directory: Path, *, texts: bool = True) -> Checkpoint:
    """The config and, for `texts`, the tokenizer of the Hugging Face model directory `directory`.

    Raises:
        ModelError: one of them cannot be read.
    """
    try:
        config = from_pretrained(AutoConfig, directory)
    except ModelError:
        raise
    except Exception as problem:  # from_pretrained raises exceptions of many types
        raise ModelError(
            f"{directory}: config.json cannot be used: {first_line(problem)}"
        ) from None
    if not texts:
        return Checkpoint(directory, config, None)
    try:
        tokenizer = from_pretrained(AutoTokenizer, directory)
    except ModelError:
        raise
    except Exception as problem:
        raise ModelError(
            f"{directory} has no tokenizer that can be used: {first_line(problem)}"
        ) from None
    return Checkpoint(directory, config, tokenizer)


def load_base(
    checkpoint: Checkpoint, task: Task, labels: Sequence[str] | None, precision: str
) -> Base:
    """Load the base model for `task` with its weights in `precision`.

    A classifier's head consists of all modules beside the encoder, and of modules in it that the
    checkpoint lacks (a pooler). It is new or has other labels, so it is fully trained, and float32
    for every `precision`.

    Raises:
        ModelError: the weights cannot be read, or are not those of a model for `task`.
    """
    auto_class = getattr(transformers, task.auto_class)
    headed = task.labels is not None
    # A regression of one number has no label names.
    options: dict[str, Any] = {"num_labels": len(labels or ("",))} if headed else {}
    try:
        loaded = load_pretrained(
            auto_class,
            checkpoint.directory,
            dtype=_DTYPES.get(precision, torch.float32),
            ignore_mismatched_sizes=headed,
            **options,
        )
    except ModelError:
        raise
    except Exception as problem:  # as above: a broken file, an unknown architecture, a wrong shape
        raise ModelError(
            f"{checkpoint.directory} cannot be loaded for {task.name}: {first_line(problem)}"
        ) from None
    model, missing = loaded.model, set(loaded.lacking)
    if not headed and getattr(model, "pooler", None) is not None:
        # The pooler's output is not used: it needs no weights, and is not a target.
        model.pooler = None
        missing = {name for name in missing if not name.startswith("pooler.")}
    heads = _heads(model, missing) if headed else ()
    absent = sorted(name for name in missing if not name.startswith(tuple(f"{h}." for h in heads)))
    if absent or model.base_model_prefix in heads:
        raise ModelError(
            f"{checkpoint.directory} has no weights for {listed_names(absent, none='the encoder')}:"
            f" it is not a {task.name} model"
        )
    if checkpoint.tokenizer is not None:
        words, rows = len(checkpoint.tokenizer), model.get_input_embeddings().num_embeddings
        if rows < words:
            raise ModelError(
                f"{checkpoint.directory}: the tokenizer has {words} tokens, the model {rows}: they"
                " belong to different models"
            )
        model.config.pad_token_id = checkpoint.pad_id
    for name in heads:
        _to_float32(model.get_submodule(name))
    if task.name == CAUSAL_LM and _reads_ahead(model):
        raise ModelError(
            f"{checkpoint.directory}: {type(model).__name__} is not a {CAUSAL_LM} model: its"
            " prediction of a token depends on this token and on those after it"
        )
    return Base(model, heads)


def _reads_ahead(model: PreTrainedModel) -> bool:
    """Whether logits depend on later tokens, as an encoder's do: BERT's without `is_decoder`."""
    with quiet(), suppress(Exception), evaluating(model):  # a model that needs other inputs
        row = trial_examples(model)[0]
        other = [*row[:-1], (row[-1] + 1) % model.get_input_embeddings().num_embeddings]
        logits, changed = (separate_logits(model, [ids])[:, :-1] for ids in (row, other))
        return bool(logits.isfinite().all()) and not same_logits(model, changed, logits)
    return False


def _heads(model: PreTrainedModel, missing: set[str]) -> tuple[str, ...]:
    """Modules with weights beside the encoder, and the topmost ones that the checkpoint lacks."""
    heads: list[str] = []
    for name, module in model.named_modules():  # parents come first
        weights = [f"{name}.{weight}" for weight, _ in module.named_parameters()]
        beside = "." not in name and name != model.base_model_prefix
        if (
            name
            and weights
            and (beside or missing.issuperset(weights))
            and not name.startswith(tuple(f"{head}." for head in heads))
        ):
            heads.append(name)
    return tuple(sorted(heads))


def _to_float32(head: nn.Module) -> None:
    """Convert a head's weights and inputs to float32, because bfloat16 loses small steps."""
    if all(weight.dtype == torch.float32 for weight in head.parameters()):
        return
    head.float()
    head.register_forward_pre_hook(
        lambda _, inputs: tuple(
            value.float() if torch.is_tensor(value) and value.is_floating_point() else value
            for value in inputs
        )
    )
