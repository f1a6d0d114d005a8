"""Inject the adapter that a run trains: a new one, or the one that training continues from."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from loradeploy.adapter import Adapter, AdapterConfig
from loradeploy.errors import UsageError, listed_names
from loradeploy.lora.inject import Injection, inject, load
from loradeploy.lora.layers.quantized import quantize
from loradeploy.train.config import QUANTIZED, TrainConfig
from loradeploy.train.fusion.modules import fuse
from loradeploy.train.initial import initial_adapter
from loradeploy.train.model import Base
from loradeploy.train.tasks.table import Task


@dataclass(frozen=True, eq=False)
class Injected:
    """The layers that a run trains. `initial`: the adapter that training continues from."""

    injection: Injection
    initial: Adapter | None


def inject_adapter(
    base: Base,
    base_name: str | os.PathLike[str],
    base_digest: str,
    task: Task,
    labels: tuple[str, ...] | None,
    config: TrainConfig,
) -> Injected:
    """Fuse and quantize the base as the run does, and inject the adapter.

    Raises:
        AdapterError: `init_adapter` cannot be read.
        UsageError: it does not fit the run, or an entry of a pattern applies to no module.
    """
    initial = initial_adapter(config, task, labels, base.heads, base_digest)
    if initial is None:
        adapter_config = _adapter_config(base_name, config, task, base.heads)
    else:
        initial = _continued(initial, config, task)
        adapter_config = initial.config
    fuse(base.model)
    if config.precision in QUANTIZED:
        quantize(base.model, config.precision, keep=adapter_config.modules_to_save)
    if initial is not None:
        return Injected(load(base.model, initial), initial)
    injection = inject(base.model, adapter_config, seed=config.seed)
    if unused := adapter_config.unused_patterns(injection.layers):
        raise UsageError(
            f"{listed_names(unused)}: applies to none of the target modules, or an earlier entry"
            " does"
        )
    return Injected(injection, None)


def _adapter_config(
    base_name: str | os.PathLike[str], config: TrainConfig, task: Task, heads: tuple[str, ...]
) -> AdapterConfig:
    return AdapterConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=True if config.init == "kaiming" else config.init,
        bias=config.bias,
        target_modules=config.targets,
        exclude_modules=config.excluded,
        layers_to_transform=config.layers,
        rank_pattern={name: int(r) for name, r in config.pattern("rank_pattern").items()},
        alpha_pattern=config.pattern("alpha_pattern"),
        modules_to_save=tuple(sorted({*heads, *config.saved})),
        task_type=task.peft,
        base_model_name_or_path=os.fspath(base_name),
    )


def _continued(adapter: Adapter, config: TrainConfig, task: Task) -> Adapter:
    """`adapter` with the dropout and the task of this run."""
    own = dataclasses.replace(
        adapter.config, lora_dropout=config.dropout, task_type=task.peft, init_lora_weights=True
    )
    return dataclasses.replace(adapter, config=own)
