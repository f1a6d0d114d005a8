"""The settings of a training run as keyword arguments, for type checkers and editors."""

from __future__ import annotations

import os
from typing import TypedDict


class TrainFlags(TypedDict, total=False):
    """The fields of `TrainConfig`, which `train` takes as keyword arguments."""

    task: str
    problem_type: str
    embedding_loss: str
    query_prompt: str
    document_prompt: str
    columns: str
    split: str
    init_adapter: str | os.PathLike[str]
    validation: str | os.PathLike[str]
    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    init: str
    bias: str
    target_modules: str
    exclude_modules: str
    layers_to_transform: str
    modules_to_save: str
    rank_pattern: str
    alpha_pattern: str
    learning_rate: float
    lora_plus_ratio: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    epochs: float
    max_steps: int | None
    batch_size: int
    gradient_accumulation: int
    max_length: int
    packing: bool
    validation_split: float
    precision: str
    autocast: str
    gradient_checkpointing: bool
    group_by_length: bool
    eval_steps: int
    early_stopping: int
    keep_best: bool
    tensorboard: bool
    save_steps: int
    seed: int
