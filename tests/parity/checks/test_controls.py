"""Negative controls (deliberate mistakes) are judged only on rows that both sides were fed."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import AdapterConfig
from loradeploy.parity.checks import controls
from loradeploy.parity.checks.controls import judge_mistake, run_controls
from loradeploy.parity.checks.mistakes import (
    OFF_BY_ONE,
    doubled_alpha,
    missing_target,
    other_missing_targets,
    swapped_factors,
    swapped_labels,
    wrong_adapter,
)
from loradeploy.parity.figures.tolerances import assumed
from loradeploy.parity.phases.rows import Row
from loradeploy.parity.reference.pytorch import Effect, Reference

CONTEXT: Any = SimpleNamespace(
    manifest=SimpleNamespace(task="causal-lm", mode="side-inputs"),
    adapters=[SimpleNamespace(name="a", adapter=None)],
)


def row(adapter: str | None, prompt: tuple[int, ...], value: float) -> Row:
    return Row(0, adapter, prompt, (), np.full((len(prompt), 4), value, np.float32))


def reference(*prompts: tuple[int, ...]) -> Reference:
    """A reference whose base rows differ from the adapter's for prompts that end in 9."""
    known = [p if p[-1] != 9 else (*p[:-1], 1) for p in prompts]
    return Reference(
        rows={
            None: tuple(row(None, prompt, 0.0) for prompt in known),
            "a": tuple(row("a", prompt, 1.0) for prompt in prompts),
        },
        scale={None: 1.0, "a": 1.0},
        effect={"a": Effect(1.0, 1.0)},
        limits={"a": assumed("fp32", scale=1.0)},
    )


def test_a_control_is_judged_only_on_rows_with_the_same_inputs() -> None:
    given = reference((1, 2), (3, 9))
    control = judge_mistake(OFF_BY_ONE, "a", given.rows[None], CONTEXT, given)
    assert control is not None and control.caught
    right = judge_mistake(OFF_BY_ONE, "a", given.rows["a"], CONTEXT, given)
    assert right is not None and not right.caught


def test_a_control_with_nothing_to_compare_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(controls, "MISTAKES", ())
    found = run_controls(CONTEXT, reference((1, 9), (3, 9)), base=None)  # type: ignore[arg-type]
    assert found.made == ()
    (note,) = found.notes
    assert note.startswith("the control 'off-by-one row' of a was left out")
    found = run_controls(CONTEXT, reference((1, 9), (3, 2)), base=None)  # type: ignore[arg-type]
    assert [control.caught for control in found.made] == [True]
    assert found.notes == ()


def adapter_of(updates: dict[str, float]) -> Adapter:
    """Return an adapter whose modules have updates of this size; 0 is no update."""
    factors = {
        module: Factors(np.full((2, 4), number + 1.0), np.full((4, 2), size))
        for number, (module, size) in enumerate(updates.items())
    }
    return Adapter(AdapterConfig(r=2, target_modules=tuple(updates)), factors)


def test_a_mistake_uses_modules_that_have_an_update() -> None:
    adapter = adapter_of({"a": 0.0, "b": 0.0, "c": 1.0, "d": 2.0, "e": 0.0})
    swapped, lacking = swapped_factors(adapter), missing_target(adapter)
    assert swapped is not None and lacking is not None
    assert {m for m in "abcde" if swapped.factors[m] is not adapter.factors[m]} == {"a", "c"}
    assert not lacking.factors["d"].B.any() and lacking.factors["c"].B.any()
    for mistake in (wrong_adapter, doubled_alpha):
        assert mistake(adapter) is not None
        assert mistake(adapter_of({"a": 0.0, "b": 0.0})) is None
    for nothing in ({"a": 0.0, "b": 0.0}, {"a": 1.0}):
        assert swapped_factors(adapter_of(nothing)) is None
        assert missing_target(adapter_of(nothing)) is None


def test_the_other_missing_targets_are_the_last_of_each_other_kind() -> None:
    adapter = adapter_of({"0.down": 1.0, "0.q": 1.0, "1.down": 1.0, "1.q": 1.0, "1.up": 0.0})
    lacking = [missing_target(adapter), *other_missing_targets(adapter)]
    left_out = [
        [m for m in adapter.modules if one is not None and not one.factors[m].B.any()]
        for one in lacking
    ]
    assert left_out == [["1.q", "1.up"], ["1.down", "1.up"]]


@pytest.mark.parametrize("shown", [True, False])
def test_a_missing_target_that_the_inputs_do_not_show_is_noted_and_another_is_tried(
    shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outputs are twice the sum of the updates of "down" modules only, if they are shown."""
    right = adapter_of({"0.down": 0.5, "1.q": 1.0})

    def rows_with(context: Any, base: Any, wrong: Adapter) -> Any:
        value = 2 * wrong.factors["0.down"].B.flat[0] if shown else 1.0
        return nullcontext((row("a", (1, 2), value),))

    monkeypatch.setattr(controls, "as_reference_with", rows_with)
    monkeypatch.setattr(controls, "reference_rows", lambda context, model, name, seed: model)
    only = [mistake for mistake in controls.MISTAKES if mistake.name == "missing target"]
    monkeypatch.setattr(controls, "MISTAKES", only)
    tested = SimpleNamespace(name="a", adapter=right)
    context: Any = SimpleNamespace(manifest=CONTEXT.manifest, adapters=[tested])
    found = run_controls(context, reference((1, 2)), base=None)  # type: ignore[arg-type]
    control, _ = found.made
    assert (control.name, control.caught) == ("missing target", shown)
    assert control.error == (1.0 if shown else 0.0)
    notes = [note for note in found.notes if "do not show a mistake with 1.q: its error" in note]
    assert len(notes) == len(found.notes) == (1 if shown else 0)


def test_labels_are_swapped_in_the_weights_and_the_bias_of_a_head() -> None:
    saved = {
        "classifier.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
        "classifier.bias": np.arange(3, dtype=np.float32),
        "pooler.bias": np.arange(3, dtype=np.float32),
    }
    wrong = swapped_labels(dataclasses.replace(adapter_of({"a": 1.0}), saved=saved))
    assert wrong is not None
    assert wrong.saved["classifier.weight"][:, 0].tolist() == [4, 0, 2]
    assert wrong.saved["classifier.bias"].tolist() == [2, 0, 1]
    assert wrong.saved["pooler.bias"] is saved["pooler.bias"]
    one = {"score.weight": np.ones((1, 2), np.float32)}
    assert swapped_labels(dataclasses.replace(adapter_of({"a": 1.0}), saved=one)) is None
