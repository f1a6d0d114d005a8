"""Settings of a training run. Each default is stated here and nowhere else."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from loradeploy.adapter.config import BIASES
from loradeploy.adapter.heads import TRAINED_PROBLEMS
from loradeploy.adapter.tasks import (
    CAUSAL_LM,
    FEATURE_EXTRACTION,
    SEQUENCE_CLASSIFICATION,
    TRAINED_TASKS,
)
from loradeploy.errors import UsageError, shown

TASKS: Final = TRAINED_TASKS
PROBLEMS: Final = tuple(TRAINED_PROBLEMS)
# Losses of embedders: for pairs and triplets of texts, and for pairs of texts with a score.
RANKING_LOSSES: Final = ("ranking", "triplet")
SCORED_LOSSES: Final = ("cosent", "cosine")
NO_PROMPT: Final = "none"
SCHEDULES: Final = ("linear", "cosine", "constant")
QUANTIZED: Final = ("int8", "int4")
PRECISIONS: Final = ("fp32", "bf16", *QUANTIZED)
INITS: Final = ("kaiming", "gaussian", "pissa", "olora")
AUTOCAST: Final = ("fp32", "bf16", "fp16")
# The end of the type of a setting that may be None: not set.
OPTIONAL: Final = " | None"
# Settings that can also be given as a pathlib.Path.
OF_PATHS: Final = ("validation", "init_adapter")
# Settings that an adapter to continue from already has.
OF_ADAPTER: Final = (
    *("rank", "alpha", "use_rslora", "use_dora", "init", "bias", "target_modules"),
    *("exclude_modules", "layers_to_transform", "modules_to_save", "rank_pattern", "alpha_pattern"),
)


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run. Each field is a key of the YAML file and a flag.

    Raises:
        UsageError: a value is out of range, or settings contradict each other.
    """

    task: str = _option(CAUSAL_LM, f"Training task: {', '.join(TASKS)}.")
    problem_type: str = _option(
        "single-label", f"Problem type of sequence-classification: {', '.join(PROBLEMS)}."
    )
    embedding_loss: str = _option(
        "ranking",
        "Loss of feature-extraction: ranking (anchor, positive, optionally negative; in-batch"
        " negatives), triplet (anchor, positive, negative), cosent or cosine (text, text_pair,"
        " score).",
    )
    query_prompt: str = _option(
        "",
        "Text before each anchor (feature-extraction). The base's own query prompt, or else its"
        f" default prompt, if not set; {NO_PROMPT}: no prompt.",
    )
    document_prompt: str = _option(
        "",
        "Text before each positive and negative (feature-extraction). The base's own document"
        f" prompt, or else its default prompt, if not set; {NO_PROMPT}: no prompt.",
    )
    columns: str = _option(
        "", "Column names in the data, as NAME=COLUMN pairs: prompt=question,completion=answer."
    )
    split: str = _option("train", "Split of the dataset to train on.")
    validation: str = _option(
        "",
        "Evaluation data: a file, a directory, a dataset, or the name of another split of the"
        " training dataset.",
    )
    init_adapter: str = _option(
        "",
        "Directory of a PEFT adapter to continue from. Rank, alpha, targets and method are those of"
        " this adapter.",
    )
    rank: int = _option(8, "Rank r of the factors A and B.")
    alpha: float = _option(16.0, "LoRA alpha. The scaling is alpha / rank.")
    dropout: float = _option(0.0, "Dropout probability at the input of the low-rank path.")
    use_rslora: bool = _option(False, "Scale by alpha / √rank instead of alpha / rank (rsLoRA).")
    use_dora: bool = _option(False, "Also train a magnitude for each output feature (DoRA).")
    init: str = _option(
        "kaiming",
        f"Initialization of A and B: {', '.join(INITS)}, or pissa_niter_N for PiSSA by a randomized"
        " SVD with N power iterations.",
    )
    bias: str = _option("none", f"Biases to train: {', '.join(BIASES)}.")
    target_modules: str = _option(
        "all-linear",
        "Modules to adapt: all-linear, a comma-separated list of module names or their endings, or"
        " re:PATTERN.",
    )
    exclude_modules: str = _option(
        "",
        "Modules to exclude from the targets: a comma-separated list of module names or their"
        " endings, or re:PATTERN.",
    )
    layers_to_transform: str = _option(
        "",
        "Indices of the layers to adapt, comma-separated. `target_modules` must be a list of"
        " names. All layers are adapted if not set.",
    )
    modules_to_save: str = _option(
        "", "Modules to train in full and save with the adapter, comma-separated."
    )
    rank_pattern: str = _option(
        "", "Per-module ranks that override `rank`, as comma-separated NAME=RANK pairs."
    )
    alpha_pattern: str = _option(
        "", "Per-module alphas that override `alpha`, as comma-separated NAME=ALPHA pairs."
    )
    learning_rate: float = _option(5e-4, "Peak learning rate of AdamW.")
    lora_plus_ratio: float = _option(
        1.0, "Ratio of B's learning rate to A's (LoRA+). A usual value is 16; 1 disables LoRA+."
    )
    schedule: str = _option(
        "linear", f"Learning rate schedule after the warm-up: {', '.join(SCHEDULES)}."
    )
    warmup_steps: int = _option(5, "Number of steps in which the learning rate rises to its peak.")
    weight_decay: float = _option(0.0, "Weight decay of AdamW.")
    max_grad_norm: float = _option(
        1.0, "Maximum gradient norm, to which gradients are clipped. 0 disables clipping."
    )
    epochs: float = _option(1.0, "Passes over the training data. Ignored if `max_steps` is set.")
    max_steps: int | None = _option(
        None, "Number of optimizer steps. If not set, `epochs` determines it."
    )
    batch_size: int = _option(8, "Number of examples in a forward pass, on each device.")
    gradient_accumulation: int = _option(1, "Number of forward passes in an optimizer step.")
    max_length: int = _option(
        512,
        "Maximum number of tokens of an example; longer examples are truncated. Limited to what the"
        " model supports.",
    )
    packing: bool = _option(
        True,
        "Concatenate the examples of a batch into one row without padding, where the model supports"
        " it (causal-lm). Each example attends only to itself.",
    )
    validation_split: float = _option(
        0.0, "Fraction of the training examples to keep for evaluation."
    )
    precision: str = _option("fp32", f"Precision of the frozen base: {', '.join(PRECISIONS)}.")
    autocast: str = _option(
        "fp32",
        f"Compute precision (torch.autocast): {', '.join(AUTOCAST)}. fp32 disables autocast.",
    )
    gradient_checkpointing: bool = _option(
        False, "Recompute activations in the backward pass: less memory, more time."
    )
    group_by_length: bool = _option(
        False,
        "Form batches of examples of similar length: less padding, another order of examples.",
    )
    eval_steps: int = _option(
        0,
        "Number of optimizer steps between evaluations. With 0, evaluation runs only before and"
        " after training.",
    )
    early_stopping: int = _option(
        0,
        "Stop after this many consecutive evaluations without a lower loss. 0 disables early"
        " stopping.",
    )
    keep_best: bool = _option(
        False, "Write the adapter with the lowest evaluation loss instead of the last one."
    )
    tensorboard: bool = _option(
        False, "Write TensorBoard events to the directory OUTPUT-tensorboard."
    )
    save_steps: int = _option(
        0,
        "Number of optimizer steps between checkpoints. With 0, a checkpoint is written only if a"
        " signal interrupts the run.",
    )
    seed: int = _option(
        0, "Random seed of the initialization, the order of the examples and dropout."
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in OF_PATHS and isinstance(value, os.PathLike):
                object.__setattr__(self, field.name, os.fspath(value))
            elif not has_type(value, str(field.type)):
                kind = str(field.type).removesuffix(OPTIONAL)
                raise UsageError(f"`{field.name}` is {shown(value)}: give a value of type {kind}")
        if self.max_steps == 0:
            raise UsageError(
                "`max_steps` is 0, which trains nothing: leave it out to train for `epochs`"
            )
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"`{name}` is {shown(value)}: give a value from {low} to {high}")
        for name in ("alpha", "learning_rate"):
            if getattr(self, name) == 0:
                raise UsageError(f"`{name}` is 0, with which the adapter has no effect")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"`{name}` is {getattr(self, name)!r}: give one of {', '.join(allowed)}"
                )
        for name, task in _OF_TASK.items():
            value = getattr(self, name)
            if value != getattr(type(self), name) and self.task != task:
                raise UsageError(
                    f"`{name}` is {value!r}, which is for {task}, not for {self.task}: leave it out"
                )
        if (self.early_stopping or self.keep_best) and not self.eval_steps:
            setting = "early_stopping" if self.early_stopping else "keep_best"
            raise UsageError(f"`{setting}` needs evaluations: set `eval_steps`")
        if self.validation and self.validation_split:
            raise UsageError(
                "`validation` and `validation_split` exclude each other: set one of them"
            )
        if not re.fullmatch("|".join((*INITS, r"pissa_niter_[1-9]\d*")), self.init):
            raise UsageError(f"`init` is {self.init!r}: give {', '.join(INITS)} or pissa_niter_N")
        check_initial(
            self,
            (
                field.name
                for field in dataclasses.fields(self)
                if getattr(self, field.name) != field.default
            ),
        )
        # Values that cannot be parsed are refused here, not on first use.
        for name, setting in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
            self._check_pattern(name, setting)
        _ = self.column_names, self.layers
        if not self.targets:
            raise UsageError("`target_modules` is empty: give all-linear, names, or re:PATTERN")
        if self.layers is not None and isinstance(self.targets, str):
            raise UsageError(
                "`layers_to_transform` needs a list of names in `target_modules`, which is"
                f" {self.target_modules!r}: give names, or a pattern that includes the layers"
            )

    @property
    def targets(self) -> str | tuple[str, ...]:
        """`target_modules` in the form of an adapter's config."""
        return _names(self.target_modules)

    @property
    def excluded(self) -> str | tuple[str, ...] | None:
        """`exclude_modules` in the form of an adapter's config."""
        return _names(self.exclude_modules) or None

    @property
    def saved(self) -> tuple[str, ...]:
        """`modules_to_save` in the form of an adapter's config."""
        return tuple(_names(self.modules_to_save))

    @property
    def column_names(self) -> dict[str, str]:
        """`columns` in the form of `Source`: the column in the data by the task's name for it."""
        pairs = [part.split("=") for part in self.columns.split(",") if part.strip()]
        if any(len(pair) != 2 or not all(map(str.strip, pair)) for pair in pairs):
            raise UsageError(f"`columns` is {self.columns!r}: give NAME=COLUMN,NAME=COLUMN")
        return {name.strip(): column.strip() for name, column in pairs}

    @property
    def layers(self) -> tuple[int, ...] | None:
        """`layers_to_transform` in the form of an adapter's config."""
        try:
            return tuple(int(number) for number in _names(self.layers_to_transform)) or None
        except ValueError:
            raise UsageError(
                f"`layers_to_transform` is {self.layers_to_transform!r}: give whole numbers, 0,1,2"
            ) from None

    def pattern(self, name: str) -> dict[str, float]:
        """`rank_pattern` or `alpha_pattern` in the form of an adapter's config."""
        text: str = getattr(self, name)
        parts = [part.rpartition("=") for part in text.split(",") if part.strip()]
        try:
            return {module.strip(): float(number) for module, _, number in parts}
        except ValueError:
            raise UsageError(f"`{name}` is {text!r}: give NAME=8,NAME=4") from None

    def _check_pattern(self, name: str, setting: str) -> None:
        """Check the values of a pattern like those of `setting`."""
        low, high = next((low, high) for field, low, high in _RANGES if field == setting)
        for module, value in self.pattern(name).items():
            if value == 0 and setting == "alpha":
                raise UsageError(
                    f"`{name}` has 0 for {module}, with which the adapter has no effect there"
                )
            if not low <= value <= high or (setting == "rank" and not value.is_integer()):
                kind = "whole number" if setting == "rank" else "value"
                raise UsageError(
                    f"`{name}` has {value:g} for {module}: give a {kind} from {low} to {high}"
                )


def has_type(value: object, kind: str) -> bool:
    """Whether `value` is of the type `kind` of a setting; a whole number is also a float."""
    types = {"str": str, "bool": bool, "int": int, "float": int | float}
    if kind.endswith(OPTIONAL) and value is None:
        return True
    kind = kind.removesuffix(OPTIONAL)
    return isinstance(value, types[kind]) and (kind == "bool" or not isinstance(value, bool))


def check_initial(config: TrainConfig, given: Iterable[str]) -> None:
    """Raise UsageError if `given` has settings that the adapter of `init_adapter` has itself."""
    both = [f"`{name}`" for name in given if name in OF_ADAPTER]
    if config.init_adapter and both:
        raise UsageError(
            f"{', '.join(both)} cannot be set with `init_adapter`: the adapter determines this"
        )


def _names(text: str) -> str | tuple[str, ...]:
    """all-linear, a pattern, or the names of a comma-separated list."""
    if text.startswith("re:"):
        return text.removeprefix("re:")
    if text == "all-linear":
        return text
    return tuple(sorted(name for part in text.split(",") if (name := part.strip())))


_BIG: Final = 10**9
_RANGES: Final = (
    ("rank", 1, 4096),
    ("alpha", 0, _BIG),
    ("dropout", 0, 0.99),
    ("learning_rate", 0, 10),
    ("lora_plus_ratio", 1, 1000),
    ("warmup_steps", 0, _BIG),
    ("weight_decay", 0, 10),
    ("max_grad_norm", 0, _BIG),
    ("epochs", 0.001, 10_000),
    ("max_steps", 1, _BIG),
    ("batch_size", 1, 65_536),
    ("gradient_accumulation", 1, 65_536),
    ("max_length", 2, 1_000_000),
    ("validation_split", 0, 0.9),
    ("eval_steps", 0, _BIG),
    ("early_stopping", 0, _BIG),
    ("save_steps", 0, _BIG),
    ("seed", 0, 2**32 - 1),
)
# Settings of one task only.
_OF_TASK: Final = {
    "problem_type": SEQUENCE_CLASSIFICATION,
    "embedding_loss": FEATURE_EXTRACTION,
    "query_prompt": FEATURE_EXTRACTION,
    "document_prompt": FEATURE_EXTRACTION,
}
CHOICES: Final = {
    "bias": BIASES,
    "embedding_loss": (*RANKING_LOSSES, *SCORED_LOSSES),
    "problem_type": PROBLEMS,
    "task": TASKS,
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "autocast": AUTOCAST,
}
