"""Adapters of models that are exported in parts (decoder and vision tower)."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.algebra.combine import combine
from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.files.peft import load_adapter, save_adapter
from loradeploy.adapter.fitting.parts import has_part, own_part
from loradeploy.adapter.modules.renamings import Renaming
from loradeploy.errors import AdapterMismatchError

TOWER = ("model.vision_tower", "model.projector")


def _adapter(*modules: str, value: float = 1.0) -> Adapter:
    config = AdapterConfig.from_peft({"peft_type": "LORA", "r": 2, "target_modules": ["q", "v"]})
    pair = Factors(np.ones((2, 4), np.float32), np.full((4, 2), value, np.float32))
    return Adapter(config, dict.fromkeys(modules, pair))


def test_each_part_keeps_its_own_modules_and_logs_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = _adapter("model.text.q", "model.vision_tower.q", "model.projector.v")
    with caplog.at_level(logging.WARNING, "loradeploy"):
        kept = own_part(given, TOWER)
    assert kept.modules == ("model.text.q",)
    assert "2 tensors of the adapter are of model.vision_tower, model.projector" in caplog.text
    assert set(kept.config.exclude_modules or ()) == {"model.vision_tower.q", "model.projector.v"}
    assert (given.part_of, kept.part_of) == (None, given.digest)
    assert own_part(kept, TOWER).part_of == given.digest, "a part stays one of the same whole"


def test_a_part_is_recorded_in_its_files_and_in_derived_adapters(tmp_path: Path) -> None:
    given = _adapter("model.text.q", "model.projector.v")
    kept = own_part(given, TOWER)
    save_adapter(kept, tmp_path)
    assert load_adapter(tmp_path).part_of == load_adapter(tmp_path).whole_digest == given.digest
    other = own_part(given, ("model.text",))
    halves = [combine({part: 0.5}).part_of for part in (kept, other)]
    assert halves[0] == halves[1] not in (None, given.digest)
    assert combine({given: 0.5}).part_of is None


def test_a_module_name_with_the_same_prefix_is_kept() -> None:
    assert own_part(_adapter("model.vision_tower_2.q"), TOWER).modules


def test_older_module_names_of_the_other_part_are_recognized() -> None:
    rules = (Renaming(("vision_tower",), ("model.vision_tower",)),)
    given = _adapter("model.text.q", "vision_tower.q")
    assert own_part(given, TOWER, lambda: rules).modules == ("model.text.q",)
    assert own_part(given, TOWER).modules == ("model.text.q", "vision_tower.q")
    assert not has_part(_adapter("vision_tower.q"), TOWER, lambda: rules)


def test_a_trained_projector_belongs_to_the_other_part() -> None:
    given = _adapter("model.text.q")
    config = dataclasses.replace(given.config, modules_to_save=("projector", "head"))
    saved = {
        f"{name}.weight": np.ones((4, 4), np.float32) for name in ("model.projector.up", "head")
    }
    given = dataclasses.replace(given, config=config, saved=saved)
    kept = own_part(given, TOWER)
    assert kept.config.modules_to_save == ("head",)
    assert set(kept.saved) == {"head.weight"}


def test_zero_factors_of_the_other_part_are_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pairs = {**_adapter("model.text.q").factors, **_adapter("model.projector.q", value=0).factors}
    given = Adapter(_adapter("model.text.q").config, pairs)
    kept = own_part(given, TOWER)
    assert (kept.modules, kept.part_of) == (("model.text.q",), None)
    assert not caplog.records


def test_an_adapter_of_only_the_other_part_is_refused() -> None:
    with pytest.raises(AdapterMismatchError, match=r"all of its tensors are of model\.projector"):
        own_part(_adapter("model.projector.q"), TOWER)
