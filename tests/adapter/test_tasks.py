"""The table of tasks used by training, export and parity."""

from __future__ import annotations

import pytest

from loradeploy.adapter.tasks import CLASSIFICATIONS, PEFT_TASKS, TASK_TABLE, TASKS, task_of_peft


@pytest.mark.parametrize("name", TASK_TABLE)
def test_transformers_and_peft_have_the_classes_of_each_row(name: str) -> None:
    import peft
    import transformers

    task = TASK_TABLE[name]
    assert isinstance(getattr(transformers, task.auto_class), type)
    assert task.peft is None or task.peft in peft.TaskType.__members__


@pytest.mark.parametrize("name", [n for n, task in TASK_TABLE.items() if task.peft])
def test_a_task_is_found_by_the_task_type_of_an_adapter(name: str) -> None:
    assert task_of_peft(TASK_TABLE[name].peft) is TASK_TABLE[name]


@pytest.mark.parametrize("task_type", [None, "CAUSAL", ""])
def test_an_unknown_task_type_has_no_task(task_type: str | None) -> None:
    assert task_of_peft(task_type) is None


def test_classifications_are_the_tasks_with_labels() -> None:
    assert set(PEFT_TASKS) <= set(TASKS)
    assert set(CLASSIFICATIONS) == {name for name in TASKS if name.endswith("-classification")}
