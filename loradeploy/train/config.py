"""What a training run can be told, each default stated once."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loradeploy.adapter.config import BIASES
from loradeploy.adapter.tasks import (
    CAUSAL_LM,
    FEATURE_EXTRACTION,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)
from loradeploy.errors import UsageError
from loradeploy.files import read_text
from loradeploy.printable import printable

# Keys of the YAML file that are no settings of the training itself: see `read_places`.
PLACES: Final = ("model", "data", "output")
TASKS: Final = (CAUSAL_LM, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, FEATURE_EXTRACTION)
PROBLEMS: Final = ("single-label", "multi-label", "regression")
SCHEDULES: Final = ("linear", "cosine", "constant")
QUANTIZED: Final = ("int8", "int4")
WIDTHS: Final = ("fp32", "bf16", *QUANTIZED)
INITS: Final = ("kaiming", "gaussian", "pissa", "olora")
AUTOCAST: Final = ("fp32", "bf16", "fp16")


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """A training run's settings. Every field is a key of the YAML file and a flag.

    Raises:
        UsageError: a value out of its range.
    """

    task: str = _option(CAUSAL_LM, f"one of {', '.join(TASKS)}")
    problem_type: str = _option("single-label", f"of a classifier: {', '.join(PROBLEMS)}")
    columns: str = _option("", "what the data calls a column, prompt=question,completion=answer")
    split: str = _option("train", "the split of a dataset to train on")
    validation: str = _option("", "data to evaluate on: a file, a folder, a dataset, or its split")
    rank: int = _option(8, "rank r of the factors")
    alpha: float = _option(16.0, "alpha; the scaling is alpha / rank")
    dropout: float = _option(0.0, "dropout on the input of the low-rank path")
    use_rslora: bool = _option(False, "scale by alpha / √rank (rsLoRA)")
    use_dora: bool = _option(False, "train a magnitude for each output as well (DoRA)")
    init: str = _option("kaiming", f"what training begins at: {', '.join(INITS)}, pissa_niter_N")
    bias: str = _option("none", f"biases to train: {', '.join(BIASES)}")
    target_modules: str = _option("all-linear", "all-linear, a list of name endings, or re:PATTERN")
    exclude_modules: str = _option("", "names that are no targets, a list or re:PATTERN")
    layers_to_transform: str = _option("", "numbers of the layers that have targets, a list")
    modules_to_save: str = _option("", "names of modules to train whole, a list")
    rank_pattern: str = _option("", "ranks of their own, NAME=RANK,…")
    alpha_pattern: str = _option("", "alphas of their own, NAME=ALPHA,…")
    learning_rate: float = _option(5e-4, "peak learning rate of AdamW")
    lora_plus_ratio: float = _option(1.0, "how much faster B learns than A (LoRA+; 16 is usual)")
    schedule: str = _option("linear", f"after the warm-up: {', '.join(SCHEDULES)}")
    warmup_steps: int = _option(5, "steps in which the learning rate rises")
    weight_decay: float = _option(0.0, "AdamW's weight decay")
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm")
    epochs: float = _option(1.0, "passes over the data, unless max_steps is given")
    max_steps: int = _option(0, "optimizer steps; 0 leaves it to epochs")
    batch_size: int = _option(8, "examples in a forward pass")
    gradient_accumulation: int = _option(1, "forward passes for an optimizer step")
    max_length: int = _option(
        512, "tokens of an example at most, and never more than the model takes"
    )
    packing: bool = _option(
        True, "a batch's examples in one row, without padding, where the model allows it (exact)"
    )
    validation_split: float = _option(0.0, "share of the examples kept for evaluation")
    precision: str = _option("fp32", f"width of the frozen base: {', '.join(WIDTHS)}")
    autocast: str = _option("fp32", f"width of the products: {', '.join(AUTOCAST)}")
    gradient_checkpointing: bool = _option(
        False, "compute activations again instead of keeping them: less memory, more time"
    )
    group_by_length: bool = _option(
        False, "batches of examples of like length: less padding, another order"
    )
    eval_steps: int = _option(0, "steps between evaluations; 0 evaluates before and after alone")
    early_stopping: int = _option(
        0, "stop after so many evaluations without a lower loss; 0 does not"
    )
    keep_best: bool = _option(
        False, "write the adapter of the lowest evaluation loss, not the last"
    )
    tensorboard: bool = _option(False, "write TensorBoard events to OUTPUT-tensorboard")
    save_steps: int = _option(0, "steps between checkpoints; 0 writes none")
    seed: int = _option(0, "decides initialization, order and dropout")

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}: give a value from {low} to {high}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"{name} is {getattr(self, name)!r}: give one of {', '.join(allowed)}"
                )
        if (self.early_stopping or self.keep_best) and not self.eval_steps:
            wanted = "early_stopping" if self.early_stopping else "keep_best"
            raise UsageError(f"{wanted} needs evaluations: give eval_steps")
        if self.validation and self.validation_split:
            raise UsageError("validation and validation_split: give one of them")
        if not re.fullmatch("|".join((*INITS, r"pissa_niter_[1-9]\d*")), self.init):
            raise UsageError(f"init is {self.init!r}: give {', '.join(INITS)} or pissa_niter_N")
        # What does not parse is to be told now.
        for name in ("rank_pattern", "alpha_pattern"):
            self.pattern(name)
        _ = self.column_names, self.layers
        if not self.targets:
            raise UsageError("target_modules is empty: give all-linear, names, or re:PATTERN")

    @property
    def targets(self) -> str | tuple[str, ...]:
        """`target_modules` as an adapter's config holds it."""
        return _names(self.target_modules)

    @property
    def excluded(self) -> str | tuple[str, ...] | None:
        """`exclude_modules` as an adapter's config holds it."""
        return _names(self.exclude_modules) or None

    @property
    def saved(self) -> tuple[str, ...]:
        """`modules_to_save` as an adapter's config holds it."""
        return tuple(_names(self.modules_to_save))

    @property
    def column_names(self) -> dict[str, str]:
        """`columns` as `sources` takes them: the data's names by the task's."""
        pairs = [part.split("=") for part in self.columns.split(",") if part.strip()]
        if any(len(pair) != 2 or not all(map(str.strip, pair)) for pair in pairs):
            raise UsageError(f"columns is {self.columns!r}: give NAME=COLUMN,NAME=COLUMN")
        return {ours.strip(): theirs.strip() for ours, theirs in pairs}

    @property
    def layers(self) -> tuple[int, ...] | None:
        """`layers_to_transform` as an adapter's config holds it."""
        try:
            return tuple(int(number) for number in _names(self.layers_to_transform)) or None
        except ValueError:
            raise UsageError(
                f"layers_to_transform is {self.layers_to_transform!r}: give whole numbers, 0,1,2"
            ) from None

    def pattern(self, name: str) -> dict[str, float]:
        """`rank_pattern` or `alpha_pattern` as an adapter's config holds it."""
        text: str = getattr(self, name)
        parts = [part.rpartition("=") for part in text.split(",") if part.strip()]
        try:
            return {module.strip(): float(number) for module, _, number in parts}
        except ValueError:
            raise UsageError(f"{name} is {text!r}: give NAME=8,NAME=4") from None


def _names(text: str) -> str | tuple[str, ...]:
    """all-linear, a pattern, or the names in a list."""
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
    ("max_steps", 0, _BIG),
    ("batch_size", 1, 65_536),
    ("gradient_accumulation", 1, 65_536),
    ("max_length", 2, 1_000_000),
    ("validation_split", 0, 0.9),
    ("eval_steps", 0, _BIG),
    ("early_stopping", 0, _BIG),
    ("save_steps", 0, _BIG),
    ("seed", 0, 2**32 - 1),
)
CHOICES: Final = {
    "bias": BIASES,
    "problem_type": PROBLEMS,
    "task": TASKS,
    "schedule": SCHEDULES,
    "precision": WIDTHS,
    "autocast": AUTOCAST,
}


def read_config(
    config: TrainConfig | str | os.PathLike[str] | Mapping[str, Any] | None,
    flags: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The settings in `config`, a YAML file or what was read of one, with `flags` over them.

    Settings that are whole already are taken as they are.

    Raises:
        UsageError: an unreadable file, an unknown key (the nearest is suggested), a wrong type.
    """
    known = dataclasses.asdict(config) if isinstance(config, TrainConfig) else read_yaml(config)
    values = {**known, **(flags or {})}
    values = {name: value for name, value in values.items() if name not in PLACES}
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f": did you mean {near[0]}?" if near else f"; there are {', '.join(fields)}"
            raise UsageError(f"there is no setting {name!r}{hint}")
        values[name] = _typed(name, value, str(fields[name].type))
    return TrainConfig(**values)


def read_places(config: Mapping[str, Any], given: Mapping[str, str | None]) -> dict[str, str]:
    """Where model, data and output are: as `given`, else as `config` says.

    Raises:
        UsageError: one of them is no text.
    """
    places = {name: given.get(name) or config.get(name) for name in PLACES}
    for name, place in places.items():
        if place is not None and not isinstance(place, str):
            raise UsageError(f"{name} is {place!r}: give a path")
    return {name: place for name, place in places.items() if place is not None}


def to_yaml(config: TrainConfig, *, explained: bool = False) -> str:
    """`config` as the YAML that `read_config` reads, each key `explained` by a comment if asked."""
    import yaml

    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if explained:
            lines.append(f"# {field.metadata['help']}\n")
        # Where there is something to hide, YAML's own escapes.
        seen = printable(str(value)) == str(value)
        lines.append(yaml.safe_dump({field.name: value}, allow_unicode=seen, width=1000))
    return "".join(lines)


def _typed(name: str, value: Any, kind: str) -> Any:
    if name in _PATTERNS and isinstance(value, Mapping):
        value = ",".join(f"{key}={number}" for key, number in value.items())
    if name == "layers_to_transform" and isinstance(value, int):
        value = str(value)
    if name in _LISTS and isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "float" and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            number = False
    valid = {
        "str": isinstance(value, str),
        "bool": isinstance(value, bool),
        "int": number and float(value).is_integer() if number else False,
        "float": number,
    }[kind]
    if not valid:
        raise UsageError(f"{name} is {value!r}: give a value of type {kind}")
    return {"int": int, "float": float}.get(kind, lambda v: v)(value)


_MAX_YAML_BYTES: Final = 1 << 20
_LISTS: Final = ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save")
_PATTERNS: Final = ("columns", "rank_pattern", "alpha_pattern")


def read_yaml(config: str | os.PathLike[str] | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What the YAML file `config` holds; what is no file comes back as it is.

    Raises:
        UsageError: the file is unreadable, or holds no settings.
    """
    import yaml

    if config is None or isinstance(config, Mapping):
        return config or {}
    file = Path(config)
    try:
        values = yaml.safe_load(read_text(file, error=UsageError, limit=_MAX_YAML_BYTES))
    except (yaml.YAMLError, RecursionError) as problem:
        text = " ".join(str(problem).split())
        raise UsageError(f"{file} is not readable as YAML: {text}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{file} holds no settings: write lines such as `rank: 16`")
    return values
