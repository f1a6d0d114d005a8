"""Run a training from start to finish."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel, set_seed

from loradeploy.adapter import Adapter, AdapterConfig, base_digest, save_adapter
from loradeploy.adapter.config import CONFIG_NAME
from loradeploy.adapter.files.peft import own_files
from loradeploy.adapter.tasks import (
    CAUSAL_LM,
    IMAGE_CLASSIFICATION,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)
from loradeploy.bundle.text.vectors.files import MODULES_NAME
from loradeploy.errors import (
    LoraDeployError,
    ModelError,
    OutputError,
    TrainingError,
    TrainingInterruptedError,
    UsageError,
    first_line,
    kind_and_line,
    listed_names,
)
from loradeploy.files import atomic_directory, check_replaceable, read_json
from loradeploy.lora.base.checkpoint import find_checkpoint, warn_of_unused_files
from loradeploy.lora.base.formats import BITSANDBYTES
from loradeploy.lora.inject import Injection, copy_into, inject, load
from loradeploy.lora.layers.quantized import quantize
from loradeploy.lora.quiet import quiet
from loradeploy.printable import logger_of
from loradeploy.train.config import QUANTIZED, TrainConfig
from loradeploy.train.config_file import to_yaml
from loradeploy.train.data.packing import PackingCollator, enable_packing
from loradeploy.train.fusion.modules import fuse
from loradeploy.train.initial import initial_adapter
from loradeploy.train.loop.checkpoints import Checkpoints
from loradeploy.train.loop.processes import (
    Stop,
    StopAfterStep,
    is_main_process,
    process_count,
    stoppable,
)
from loradeploy.train.loop.trainer import AdapterTrainer, arguments
from loradeploy.train.model import Checkpoint, load_base, open_checkpoint
from loradeploy.train.prepared import Prepared, prepare
from loradeploy.train.reporting.callbacks import Progress, TensorBoard
from loradeploy.train.reporting.card import CARD_NAME, card
from loradeploy.train.reporting.curve import write_curve
from loradeploy.train.result import TrainResult
from loradeploy.train.tasks.embedding.vectors import Vectors
from loradeploy.train.tasks.table import Collate, Task, task_of

logger = logger_of(__name__)

# Settings that do not affect the adapter: a resumed run may change them.
_FREE: Final = ("save_steps", "tensorboard")
# Tasks in which the loss of an example does not depend on the others of its batch, and an example
# is not much larger than its tokens.
_REGROUPED: Final = (CAUSAL_LM, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION)
# Fields of the base's config.json that do not affect the model.
_IGNORED_FIELDS: Final = ("_name_or_path", "transformers_version")


def run(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: TrainConfig,
    *,
    resume: bool,
) -> TrainResult:
    """See `loradeploy.train.api.train`."""
    begin = time.perf_counter()
    target, main = Path(output), is_main_process()
    checkpoints = Checkpoints(target)
    if main:
        _check_output(target)
        checkpoints.check(resume=resume)
    checkpoint_directory = find_checkpoint(model, quantized=[BITSANDBYTES])
    if main:
        warn_of_unused_files(checkpoint_directory, "training starts from the base only")
    with quiet(), _explained():
        texts = config.task != IMAGE_CLASSIFICATION
        opened = open_checkpoint(checkpoint_directory, texts=texts)
        opened.check_exportable(config.task)
        begun = Path(config.init_adapter) if config.init_adapter else None
        task = task_of(config, checkpoint_directory, begun)
        config = opened.within(config)
        prepared = prepare(data, task, opened, config)
        set_seed(config.seed)
        with ThreadPoolExecutor(1) as hashing:  # in this time the weights are loaded
            digest = hashing.submit(base_digest, checkpoint_directory)
            base = load_base(opened, task, prepared.labels, config.precision)
            digest_of_base = digest.result()
        if task.vectors is not None and task.vectors.source is None and main:
            logger.warning(
                "%s has no %s: the embedder is trained with mean pooling", model, MODULES_NAME
            )
        initial = initial_adapter(config, task, prepared.labels, base.heads, digest_of_base)
        if initial is None:
            adapter_config = _adapter_config(model, config, task, base.heads)
        else:
            initial = _continued(initial, config, task)
            adapter_config = initial.config
        injection = _injected(base.model, adapter_config, initial, config)
        describe = functools.partial(
            injection.adapter,
            base_digest=digest_of_base,
            labels=prepared.labels,
            problem_type=task.problem_type,
        )
        record = _record(config, digest_of_base, prepared, opened)
        if initial is not None:
            record["init_adapter_digest"] = initial.digest
        if task.vectors is not None:
            record["sentence"] = task.vectors.recipe.digest
        newest: Path | None = None
        callbacks: list[Any] = []
        with ExitStack() as closing:
            if main:
                newest = closing.enter_context(checkpoints.begun(record, resume=resume))
                callbacks.append(closing.enter_context(contextlib.closing(Progress())))
            if main and config.tensorboard:
                board = TensorBoard(target.with_name(f"{target.name}-tensorboard"))
                callbacks.append(closing.enter_context(contextlib.closing(board)))
            stop = closing.enter_context(stoppable())
            trainer = AdapterTrainer(
                injection=injection,
                loss=task.loss,
                adapter=describe,
                checkpoint=functools.partial(checkpoints.writing, record=record),
                args=arguments(config, checkpoints.directory, examples=len(prepared.training)),
                train_dataset=prepared.training,
                data_collator=_collator(base.model, opened, task, packing=config.packing),
                evaluation=prepared.evaluation,
                patience=config.early_stopping,
                keep_best=config.keep_best,
                ratio=config.lora_plus_ratio,
                regroup=task.name in _REGROUPED,
                callbacks=[*callbacks, StopAfterStep(stop)],
            )
            before = trainer.mean_loss(prepared.evaluation)
            _train(trainer, checkpoints, newest)
            state = trainer.state
            if stop.signal and state.global_step < state.max_steps:
                raise _interrupted(stop, state.global_step, checkpoints)
            adapter, kept = describe(), state.global_step
            if trainer.best is not None:
                adapter, kept = trainer.best, state.best_global_step
                copy_into(injection, adapter)
            after = trainer.mean_loss(prepared.evaluation)
            result = TrainResult(
                adapter=target,
                digest=adapter.digest,
                base_digest=digest_of_base,
                parameters=adapter.parameter_count,
                examples=len(prepared.training),
                truncated=prepared.truncated,
                steps=state.global_step,
                kept_step=kept,
                tokens=int(state.num_input_tokens_seen),
                seconds=round(time.perf_counter() - begin, 2),
                evaluated_on=prepared.evaluated_on,
                loss_before=before[0],
                loss_after=after[0],
                accuracy_before=before[1] if task.has_accuracy else None,
                accuracy_after=after[1] if task.has_accuracy else None,
            )
            if main:
                write_adapter = functools.partial(_write_adapter, adapter, task.vectors)
                with (
                    _naming_the_checkpoint(checkpoints),
                    _saved_elsewhere(target, write_adapter, checkpoints),
                ):
                    _write(result, adapter, trainer, config, prepared.digest, write_adapter)
            trainer.accelerator.wait_for_everyone()
            if main:
                checkpoints.remove()
    return result


def _train(trainer: AdapterTrainer, checkpoints: Checkpoints, newest: Path | None) -> None:
    """Train, from the checkpoint `newest` if given; errors name the last good checkpoint."""
    with _naming_the_checkpoint(checkpoints):
        begin = trainer.broadcast_path(newest)
        if begin is None or not trainer.restore_finished(begin):
            trainer.train(resume_from_checkpoint=begin)


@contextmanager
def _naming_the_checkpoint(checkpoints: Checkpoints) -> Iterator[None]:
    try:
        yield
    except (TrainingError, OutputError) as problem:
        newest = checkpoints.newest()
        if isinstance(problem, OutputError):
            advice = f"; {newest} is intact: continue from it with `resume`" if newest else ""
            raise TrainingError(f"{problem}{advice}") from problem
        if newest is None:
            raise
        raise TrainingError(f"{problem}; the last good checkpoint is {newest}") from None


def _interrupted(stop: Stop, step: int, checkpoints: Checkpoints) -> TrainingInterruptedError:
    return TrainingInterruptedError(
        f"stopped after step {step}, with the checkpoint {checkpoints.newest()}: repeat the call"
        " with `resume` to continue",
        status=128 + stop.signal,
    )


def _check_output(target: Path) -> None:
    """Raise UsageError before the training if the adapter cannot be written."""
    check_replaceable(target, marker=CONFIG_NAME, own_files=own_files)
    parent = next(path for path in target.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{target} cannot be written: {parent} is not a writable directory")


def _collator(model: PreTrainedModel, opened: Checkpoint, task: Task, *, packing: bool) -> Collate:
    if packing and task.name == CAUSAL_LM and enable_packing(model):
        return PackingCollator()
    return task.collate(opened.pad_id)


def _adapter_config(
    model: str | os.PathLike[str], config: TrainConfig, task: Task, heads: tuple[str, ...]
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
        base_model_name_or_path=os.fspath(model),
    )


def _injected(
    model: PreTrainedModel,
    adapter_config: AdapterConfig,
    initial: Adapter | None,
    config: TrainConfig,
) -> Injection:
    """Fuse and quantize the base as the run does, and inject `initial`, or else a new adapter."""
    fuse(model)
    if config.precision in QUANTIZED:
        quantize(model, config.precision, keep=adapter_config.modules_to_save)
    if initial is not None:
        return load(model, initial)
    injection = inject(model, adapter_config, seed=config.seed)
    if unused := adapter_config.unused_patterns(injection.layers):
        raise UsageError(
            f"{listed_names(unused)}: applies to none of the target modules, or an earlier entry"
            " does"
        )
    return injection


def _continued(adapter: Adapter, config: TrainConfig, task: Task) -> Adapter:
    """`adapter` with the dropout and the task of this run."""
    own = dataclasses.replace(
        adapter.config, lora_dropout=config.dropout, task_type=task.peft, init_lora_weights=True
    )
    return dataclasses.replace(adapter, config=own)


def _record(
    config: TrainConfig, digest_of_base: str, prepared: Prepared, opened: Checkpoint
) -> dict[str, Any]:
    """Everything that affects the adapter, for comparison when a run is resumed."""
    settings = {name: value for name, value in asdict(config).items() if name not in _FREE}
    base_config = read_json(opened.directory / "config.json", error=ModelError)
    described = json.dumps(
        {n: v for n, v in base_config.items() if n not in _IGNORED_FIELDS}, sort_keys=True
    )
    return {
        **settings,
        "base": digest_of_base,
        "base_config": hashlib.sha256(described.encode()).hexdigest(),
        "data": prepared.digest,
        "processes": process_count(),  # a step has one batch per process
    }


def _write(
    result: TrainResult,
    adapter: Adapter,
    trainer: AdapterTrainer,
    config: TrainConfig,
    data: str,
    write_adapter: Callable[[Path], None],
) -> None:
    target = result.adapter
    with atomic_directory(target, marker=CONFIG_NAME, own_files=own_files) as directory:
        write_adapter(directory)
        write_curve(trainer.curve(), directory)
        (directory / "train.yaml").write_text(to_yaml(config), encoding="utf-8")
        text = card(result, adapter.config, config, data)
        (directory / CARD_NAME).write_text(text, encoding="utf-8")


def _write_adapter(adapter: Adapter, vectors: Vectors | None, directory: Path) -> None:
    save_adapter(adapter, directory)
    if vectors is not None and vectors.own:
        vectors.write(directory)


@contextmanager
def _saved_elsewhere(
    target: Path, write_adapter: Callable[[Path], None], checkpoints: Checkpoints
) -> Iterator[None]:
    """If `target` cannot be written and there is no checkpoint, save the adapter elsewhere.

    Raises:
        TrainingError: in this case; it names the other directory.
    """
    try:
        yield
    except Exception as problem:
        if checkpoints.newest() is not None:
            raise
        try:
            directory = Path(tempfile.mkdtemp(prefix=f"{target.name}-"))
        except OSError:
            raise problem from None
        try:
            write_adapter(directory)
        except Exception:
            shutil.rmtree(directory, ignore_errors=True)
            raise problem from None
        known = isinstance(problem, LoraDeployError)
        reason = problem if known else f"{target} cannot be written: {kind_and_line(problem)}"
        raise TrainingError(
            f"{reason}; the trained adapter is in {directory}: move it to a permanent location"
        ) from problem


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as problem:
        raise _out_of_memory() from problem
    except RuntimeError as problem:
        if "can't allocate memory" in str(problem):  # torch's CPU allocator has no class for it
            raise _out_of_memory() from problem
        if process_count() > 1 and ("gloo" in str(problem) or "NCCL" in str(problem)):
            raise TrainingError(
                f"another process of this run has ended or cannot be reached: {first_line(problem)}"
            ) from problem
        raise


def _out_of_memory() -> TrainingError:
    return TrainingError(
        "out of memory: lower `batch_size` (and raise `gradient_accumulation`), `max_length` or"
        " `rank`"
    )
