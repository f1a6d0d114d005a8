"""Run a training from start to finish."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import set_seed

from loradeploy.adapter import Adapter, base_digest
from loradeploy.adapter.tasks import (
    CAUSAL_LM,
    IMAGE_CLASSIFICATION,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)
from loradeploy.errors import (
    ModelError,
    OutputError,
    TrainingError,
    TrainingInterruptedError,
    first_line,
)
from loradeploy.files import read_json
from loradeploy.lora.base.checkpoint import find_checkpoint, warn_of_unused_files
from loradeploy.lora.base.formats import BITSANDBYTES
from loradeploy.lora.inject import copy_into
from loradeploy.lora.quiet import quiet
from loradeploy.names import MODEL_CONFIG_NAME, MODULES_NAME
from loradeploy.printable import logger_of
from loradeploy.train.config import TrainConfig
from loradeploy.train.data.packing import PackingCollator, enable_packing
from loradeploy.train.fusion.last_layer import shorten
from loradeploy.train.injected import Injected, inject_adapter
from loradeploy.train.loop.checkpoints import Checkpoints
from loradeploy.train.loop.processes import (
    Stop,
    StopAfterStep,
    is_main_process,
    process_count,
    stoppable,
)
from loradeploy.train.loop.trainer import AdapterTrainer, arguments
from loradeploy.train.model import Base, Checkpoint, load_base, open_checkpoint
from loradeploy.train.prepared import Prepared, prepare
from loradeploy.train.reporting.callbacks import Progress, TensorBoard
from loradeploy.train.result import TrainResult
from loradeploy.train.saving import check_output, save_run, saved_elsewhere, write_adapter
from loradeploy.train.tasks.table import Collate, Task, task_of

logger = logger_of(__name__)

# Settings that do not affect the adapter: a resumed run may change them.
_FREE: Final = ("save_steps", "tensorboard")
# Tasks in which the loss of an example does not depend on the others of its batch, and an example
# is not much larger than its tokens.
_REGROUPED: Final = (CAUSAL_LM, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION)
# Fields of the base's config.json that do not affect the model.
_IGNORED_FIELDS: Final = ("_name_or_path", "transformers_version")


@dataclass(frozen=True, eq=False)
class _Run:
    """What a run trains and on what, before its first step."""

    config: TrainConfig
    task: Task
    checkpoint: Checkpoint
    prepared: Prepared
    base: Base
    base_digest: str
    packed: bool
    injected: Injected

    def adapter(self) -> Adapter:
        """The adapter in its current state."""
        return self.injected.injection.adapter(
            base_digest=self.base_digest,
            labels=self.prepared.labels,
            problem_type=self.task.problem_type,
        )


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
        check_output(target)
        checkpoints.check(resume=resume)
    directory = find_checkpoint(model, quantized=[BITSANDBYTES])
    if main:
        warn_of_unused_files(directory, "training starts from the base only")
    with quiet(), _explained():
        run = _open(model, directory, data, config)
        record = _record(run)
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
            trainer = _trainer(run, checkpoints, record, [*callbacks, StopAfterStep(stop)])
            before = trainer.mean_loss(run.prepared.evaluation)
            _train(trainer, checkpoints, newest)
            state = trainer.state
            if stop.signal and state.global_step < state.max_steps:
                raise _interrupted(stop, state.global_step, checkpoints)
            adapter, kept = run.adapter(), state.global_step
            if trainer.best is not None:
                adapter, kept = trainer.best, state.best_global_step
                copy_into(run.injected.injection, adapter)
            after = trainer.mean_loss(run.prepared.evaluation)
            result = TrainResult(
                adapter=target,
                digest=adapter.digest,
                base_digest=run.base_digest,
                parameters=adapter.parameter_count,
                examples=len(run.prepared.training),
                truncated=run.prepared.truncated,
                steps=state.global_step,
                kept_step=kept,
                tokens=int(state.num_input_tokens_seen),
                seconds=round(time.perf_counter() - begin, 2),
                evaluated_on=run.prepared.evaluated_on,
                loss_before=before[0],
                loss_after=after[0],
                accuracy_before=before[1] if run.task.has_accuracy else None,
                accuracy_after=after[1] if run.task.has_accuracy else None,
            )
            if main:
                _save(run, result, adapter, trainer.curve(), checkpoints)
            trainer.accelerator.wait_for_everyone()
            if main:
                checkpoints.remove()
    return result


def _open(
    model: str | os.PathLike[str],
    directory: Path,
    data: str | os.PathLike[str],
    config: TrainConfig,
) -> _Run:
    """Read the data and the base model in `directory`, and inject the adapter."""
    checkpoint = open_checkpoint(directory, texts=config.task != IMAGE_CLASSIFICATION)
    checkpoint.check_exportable(config.task)
    begun = Path(config.init_adapter) if config.init_adapter else None
    task = task_of(config, directory, begun)
    config = checkpoint.within(config)
    prepared = prepare(data, task, checkpoint, config)
    set_seed(config.seed)
    with ThreadPoolExecutor(1) as hashing:  # in this time the weights are loaded
        hashed = hashing.submit(base_digest, directory)
        base = load_base(checkpoint, task, prepared.labels, config.precision)
        digest = hashed.result()
    if task.vectors is not None and task.vectors.source is None and is_main_process():
        logger.warning(
            "%s has no %s: the embedder is trained with mean pooling", model, MODULES_NAME
        )
    packed = config.packing and task.name == CAUSAL_LM and enable_packing(base.model)
    injected = inject_adapter(base, model, digest, task, prepared.labels, config)
    return _Run(config, task, checkpoint, prepared, base, digest, packed, injected)


def _trainer(
    run: _Run, checkpoints: Checkpoints, record: dict[str, Any], callbacks: list[Any]
) -> AdapterTrainer:
    config, task, prepared = run.config, run.task, run.prepared
    return AdapterTrainer(
        injection=run.injected.injection,
        loss=task.loss,
        adapter=run.adapter,
        checkpoint=functools.partial(checkpoints.writing, record=record),
        args=arguments(config, checkpoints.directory, examples=len(prepared.training)),
        train_dataset=prepared.training,
        data_collator=_collator(run),
        evaluation=prepared.evaluation,
        patience=config.early_stopping,
        keep_best=config.keep_best,
        ratio=config.lora_plus_ratio,
        regroup=task.name in _REGROUPED,
        callbacks=callbacks,
    )


def _train(trainer: AdapterTrainer, checkpoints: Checkpoints, newest: Path | None) -> None:
    """Train, from the checkpoint `newest` if given; errors name the last good checkpoint."""
    with _naming_the_checkpoint(checkpoints):
        begin = trainer.broadcast_path(newest)
        if begin is None or not trainer.restore_finished(begin):
            trainer.train(resume_from_checkpoint=begin)


def _save(
    run: _Run,
    result: TrainResult,
    adapter: Adapter,
    curve: list[dict[str, float]],
    checkpoints: Checkpoints,
) -> None:
    """Write the adapter and the record of its training, elsewhere if that fails."""
    vectors = run.task.vectors
    write = functools.partial(write_adapter, adapter, vectors)
    with _naming_the_checkpoint(checkpoints), saved_elsewhere(result.adapter, write, checkpoints):
        save_run(result, adapter, vectors, curve, run.config, run.prepared.digest)


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


def _collator(run: _Run) -> Collate:
    if run.packed:
        shorten(run.base.model)
        return PackingCollator()
    return run.task.collate(run.checkpoint.pad_id)


def _record(run: _Run) -> dict[str, Any]:
    """Everything that affects the adapter, for comparison when a run is resumed."""
    settings = {name: value for name, value in asdict(run.config).items() if name not in _FREE}
    base_config = read_json(run.checkpoint.directory / MODEL_CONFIG_NAME, error=ModelError)
    described = json.dumps(
        {n: v for n, v in base_config.items() if n not in _IGNORED_FIELDS}, sort_keys=True
    )
    record = {
        **settings,
        "max_steps": run.config.max_steps or 0,  # not set: 0, as earlier versions wrote it
        "base": run.base_digest,
        "base_config": hashlib.sha256(described.encode()).hexdigest(),
        "data": run.prepared.digest,
        "processes": process_count(),  # a step has one batch per process
    }
    if run.injected.initial is not None:
        record["init_adapter_digest"] = run.injected.initial.digest
    if run.task.vectors is not None:
        record["sentence"] = run.task.vectors.recipe.digest
    return record


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
