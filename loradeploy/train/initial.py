"""Load the adapter that training continues from, and check that it fits the run."""

from __future__ import annotations

from loradeploy.adapter import Adapter, load_adapter
from loradeploy.errors import UsageError, listed, listed_names
from loradeploy.train.config import TrainConfig
from loradeploy.train.tasks.table import Task


def initial_adapter(
    config: TrainConfig,
    task: Task,
    labels: tuple[str, ...] | None,
    heads: tuple[str, ...],
    digest_of_base: str,
) -> Adapter | None:
    """The adapter at `init_adapter`; None without one.

    `labels`, `heads`: the label names and the head modules of this run.

    Raises:
        AdapterError: it cannot be read, or applies to a base that its initialization changed.
        UsageError: its base, task or head differs; the message lists all differences.
    """
    if not config.init_adapter:
        return None
    adapter = load_adapter(config.init_adapter)
    adapter.check_plain()
    saved = {parameter.rpartition(".")[0] for parameter in adapter.saved}
    lacking = [head for head in heads if not any(_within(module, head) for module in saved)]
    problems = [
        problem
        for differs, problem in (
            (
                adapter.base_digest not in (None, digest_of_base),
                "it was trained on another base",
            ),
            (
                task.peft is not None and adapter.config.task_type not in (None, task.peft),
                f"its task_type is {adapter.config.task_type}, the task {task.name}",
            ),
            (
                bool(heads) and adapter.problem_type not in (None, task.problem_type),
                f"its problem_type is {adapter.problem_type}, that of the run {task.problem_type}",
            ),
            (
                bool(heads) and adapter.labels is not None and adapter.labels != labels,
                f"its labels are {_named(adapter.labels)}, those of the data {_named(labels)}",
            ),
            (
                any(pair.kind == "experts" for pair in adapter.factors.values())
                or bool(adapter.config.target_parameters),
                "it has factors of parameters (target_parameters), which cannot be trained here",
            ),
            (bool(lacking), f"it has no {listed_names(lacking)}"),
        )
        if differs
    ]
    if problems:
        raise UsageError(f"`init_adapter` {config.init_adapter} cannot be used: {listed(problems)}")
    return adapter


def _named(labels: tuple[str, ...] | None) -> str:
    return listed_names(labels or ())


def _within(module: str, head: str) -> bool:
    return module == head or module.startswith(f"{head}.")
