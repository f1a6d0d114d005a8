"""The table of tasks that training, export and parity read."""

from __future__ import annotations

import pytest

from loradeploy.adapter.tasks import CLASSIFICATIONS, PEFT_TASKS, TASK_TABLE, TASKS, task_of_peft


@pytest.mark.parametrize("name", TASK_TABLE)
def test_transformers_and_peft_know_what_a_row_names(name: str) -> None:
    import peft
    import transformers

    task = TASK_TABLE[name]
    assert isinstance(getattr(transformers, task.auto_class), type)
    assert task.peft is None or task.peft in peft.TaskType.__members__


@pytest.mark.parametrize("name", [n for n, task in TASK_TABLE.items() if task.peft])
def test_a_task_is_found_by_its_name_in_an_adapter(name: str) -> None:
    assert task_of_peft(TASK_TABLE[name].peft) is TASK_TABLE[name]


@pytest.mark.parametrize("task_type", [None, "CAUSAL", ""])
def test_another_task_type_names_no_task(task_type: str | None) -> None:
    assert task_of_peft(task_type) is None


def test_a_bundle_is_for_a_task_with_an_export() -> None:
    assert set(TASK_TABLE) - set(TASKS) == {"question-answering"}
    assert set(PEFT_TASKS) <= set(TASKS)
    assert set(CLASSIFICATIONS) == {name for name in TASKS if name.endswith("-classification")}
