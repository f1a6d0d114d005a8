"""transformers' Trainer, with an adapter to train and to save."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler

from loradeploy.adapter import Adapter, load_adapter, save_adapter
from loradeploy.errors import LoraDeployError, TrainingError, UsageError, kind_and_line
from loradeploy.lora.inject import Injection, copy_into
from loradeploy.train.checkpoints import BEST
from loradeploy.train.config import TrainConfig
from loradeploy.train.losses import BatchLoss, LossFunction
from loradeploy.train.processes import process_count
from loradeploy.train.reporting.curve import COLUMNS

_ADVICE = "lower learning_rate, or look at the data"


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose checkpoints are adapters, and whose loss is checked at every step.

    `injection` is what it trains, `adapter` gives that as data. `checkpoint`: yields the directory
    for the checkpoint of a step, which counts when that is left; used by the main process.
    `evaluation`: the examples that it is judged by; `patience`: after how many evaluations without
    a lower loss it stops, 0 never; `keep_best`: whether `best` is the adapter of the lowest loss.
    `ratio`: how much faster B learns (LoRA+).
    """

    def __init__(
        self,
        *,
        injection: Injection,
        loss: LossFunction,
        adapter: Callable[[], Adapter],
        checkpoint: Callable[[int], AbstractContextManager[Path]],
        evaluation: Sequence[dict[str, Any]] = (),
        patience: int = 0,
        keep_best: bool = False,
        ratio: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(model=injection.model, eval_dataset=evaluation or None, **options)
        self._injection = injection
        self._loss = loss
        self._adapter = adapter
        self._checkpoint = checkpoint
        self._evaluation = evaluation
        self._patience = patience
        self._keep_best = keep_best
        self._ratio = ratio
        self.optimizer: Any
        self.control: Any
        self.state: Any
        self.best: Adapter | None = None
        # Gradients of several batches are summed: each loss is divided by the labels of all.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)

    def batch_loss(self, model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> BatchLoss:
        """The loss of a batch.

        Raises:
            TrainingError: it is not finite.
        """
        loss = self._loss(model, inputs)
        if not torch.isfinite(loss.total):
            step = self.state.global_step + 1
            raise TrainingError(f"the loss is {loss.total.item()} at step {step}: {_ADVICE}")
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """What Trainer differentiates: a mean over `num_items_in_batch`, or this batch's labels."""
        batch = self.batch_loss(model, inputs)
        items = batch.items if num_items_in_batch is None else num_items_in_batch
        loss = batch.total / torch.as_tensor(items).clamp(min=1)
        # The labels are those of all processes, whose gradients are averaged.
        loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    @torch.no_grad()
    def mean_loss(self, examples: Sequence[dict[str, Any]]) -> tuple[float, float]:
        """The mean loss over all labels of `examples`, and the share that came out on top.

        Each process takes its share of them. Neither the random state nor the order is touched.
        """
        training = self.model.training
        self.model.eval()
        # By length, so that little is padding: the mean does not know the order.
        ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
        count, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = self.args.per_device_eval_batch_size
        sums = torch.zeros(3, dtype=torch.float64)
        for start in range(0, len(ordered), size * count):
            share = ordered[start : start + size * count][rank::count]
            # Sharded models need every process at every batch: one without a share repeats one.
            batch = self._prepare_inputs(self.data_collator(share or ordered[:1]))
            loss = self.batch_loss(self.model, batch)
            if share:
                sums += torch.stack([loss.total.cpu(), loss.items.cpu(), loss.right.cpu()])
        total, items, right = self.accelerator.reduce(sums.to(self.args.device)).tolist()
        self.model.train(training)
        return total / max(items, 1), right / max(items, 1)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """What Trainer calls every eval_steps: the best is noted, and the patience held."""
        loss, right = self.mean_loss(self._evaluation)
        metrics = {"eval_loss": loss, "eval_accuracy": right}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if self.state.best_metric is None or loss < self.state.best_metric:
            self.state.best_metric, self.state.best_global_step = loss, self.state.global_step
            self.best = self._adapter() if self._keep_best else None
        elif self._is_out_of_patience():
            self.control.should_training_stop = True
        return metrics

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Any:
        """AdamW over what the adapter trains, and nothing else of the model."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = parameter_groups(
                self._injection, self.args.learning_rate, self._ratio, self.args.weight_decay
            )
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ByLength(self.train_dataset, size * process_count(), self.args.data_seed)

    def curve(self) -> list[dict[str, float]]:
        """The figures of each step, earlier sessions' included, and of the evaluation after it."""
        rows: dict[int, dict[str, float]] = {}
        for entry in self.state.log_history:
            row = rows.setdefault(entry["step"], {})
            row.update({name: entry[name] for name in COLUMNS if name in entry})
        return [row for row in rows.values() if len(row) > 1]

    def _is_out_of_patience(self) -> bool:
        if not self._patience or self.state.best_global_step is None:
            return False
        steps = [entry["step"] for entry in self.state.log_history if "eval_loss" in entry]
        best = self.state.best_global_step
        return sum(bool(step > best) for step in steps) >= self._patience

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> float:
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        # In fp16 an overflow now and then is expected: its step is left out, the scale lowered.
        if not math.isfinite(norm) and not self.args.fp16:
            step = self.state.global_step + 1
            raise TrainingError(f"the gradients' norm is {norm} at step {step}: {_ADVICE}")
        return norm

    def _track_num_input_tokens(self, inputs: Mapping[str, Tensor]) -> None:
        # The Trainer's own warns at every packed batch, which has no padding and no mask (5.23).
        mask = inputs.get("attention_mask")
        tokens = torch.tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
        counted = self.accelerator.reduce(tokens.to(self.args.device))
        self.state.num_input_tokens_seen += int(counted)

    # What Trainer calls to write a checkpoint and to read it: the adapter alone, not the base.

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        main = self.args.should_save
        with self._checkpoint(self.state.global_step) if main else nullcontext() as place:
            directory = self.agreed(place) or ""
            self.save_model(directory)
            self._save_optimizer_and_scheduler(directory)
            self._save_scaler(directory)
            self._save_rng_state(directory)
            if main:
                self.state.save_to_json(str(Path(directory, TRAINER_STATE_NAME)))
            self.accelerator.wait_for_everyone()

    def agreed(self, place: Path | None) -> str | None:
        """The main process's `place`, in every process."""
        box = [None if place is None else str(place)]
        if process_count() > 1:
            broadcast_object_list(box)
        return box[0]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, and the best one where it is another; the main process does."""
        place = Path(output_dir or self.args.output_dir)
        adapter = self._adapter()  # every process has a part in it where the model is sharded
        if self.args.should_save:
            save_adapter(adapter, place)
            if self.best is not None:
                save_adapter(self.best, place / BEST)

    def restore_finished(self, checkpoint: str) -> bool:
        """Whether no step is left to a run that wrote `checkpoint`; then it stands at its end.

        Trainer would take one more (5.23).
        """
        with _readable(checkpoint):
            state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
            fresh, self.state = self.state, state
            ended = bool(state.global_step >= state.max_steps) or self._is_out_of_patience()
        if not ended:
            self.state = fresh
            return False
        self._load_from_checkpoint(checkpoint)
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        place = Path(resume_from_checkpoint)
        with _readable(place):
            copy_into(self._injection, load_adapter(place))
            if (place / BEST).is_dir():
                self.best = load_adapter(place / BEST)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)


@contextmanager
def _readable(checkpoint: str | Path | None) -> Iterator[None]:
    """What torch reads is read as data alone (weights_only), and refused in one line."""
    advice = "remove it, and go on from the one before it"
    try:
        yield
    except LoraDeployError:
        raise
    except UnpicklingError:  # its text tells how to load it all the same
        raise UsageError(
            f"{checkpoint} is broken, or holds code, which is not loaded: {advice}"
        ) from None
    except Exception as problem:  # torch and json raise whatever they do
        raise UsageError(
            f"{checkpoint} cannot be read ({kind_and_line(problem)}): {advice}"
        ) from None


def arguments(config: TrainConfig, checkpoints: Path, *, examples: int) -> TrainingArguments:
    """The Trainer's settings for `config` and a number of training examples.

    Raises:
        UsageError: a width that this machine has no products of.
    """
    if config.autocast == "fp16" and not torch.cuda.is_available():
        raise UsageError("autocast fp16 needs a GPU: use bf16, which CPUs have too")
    steps = steps_of(config, examples)
    schedules = {"constant": "constant_with_warmup"}
    settings = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=config.autocast == "bf16",
        fp16=config.autocast == "fp16",
        learning_rate=config.learning_rate,
        lr_scheduler_type=schedules.get(config.schedule, config.schedule),
        warmup_steps=min(config.warmup_steps, steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        max_steps=steps,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        # The loss is had from inside the model, where a search behind its results would miss it.
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # One device a process: Trainer would spread each batch over all with DataParallel.
    if settings.n_gpu > 1:
        settings._n_gpu = 1
    return settings


def steps_of(config: TrainConfig, examples: int) -> int:
    """How many optimizer steps the run has; a step is a batch of every process."""
    if config.max_steps:
        return config.max_steps
    batches = math.ceil(examples / (config.batch_size * process_count()))
    return max(1, math.ceil(math.ceil(batches / config.gradient_accumulation) * config.epochs))


class ByLength(LengthGroupedSampler):  # type: ignore[misc]
    """Batches of examples of like length, in an order that `seed` and the epoch decide.

    transformers' own draws from the global random state, so that a run that is taken up again in
    the middle of an epoch would go on in another order (5.23).
    """

    def __init__(self, examples: Sequence[dict[str, Any]], batch_size: int, seed: int) -> None:
        super().__init__(batch_size, lengths=[len(example["input_ids"]) for example in examples])
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begin the order of `epoch`; accelerate calls it."""
        self.generator = torch.Generator().manual_seed((self._seed << 20) + epoch)


def parameter_groups(
    injection: Injection, learning_rate: float, ratio: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The groups of an optimizer: B learns at `ratio` × `learning_rate`, all else as it says.

    As in the authors' code, a linear layer's or convolution's B and all vectors (biases, DoRA's
    magnitudes) are fast; both factors of an embedding and the other parameters of modules_to_save
    are not. Biases are not decayed. A group without parameters is left out.
    """
    fast = {id(layer.lora_B) for layer in injection.layers.values() if layer.kind != "embedding"}
    biases = {id(p) for name, p in injection.saved.items() if name.endswith("bias")}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in injection.parameters():
        quick = id(parameter) in fast or parameter.ndim == 1
        groups.setdefault((quick, id(parameter) not in biases), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * (ratio if quick else 1.0),
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (quick, decayed), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]
