"""The config.json that a trainer saved beside an adapter, compared with the base's."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from loradeploy.bundle import trained_config
from loradeploy.bundle.trained_config import changed_settings
from loradeploy.export.api import export
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter

OLD = {"rope_theta": 10000.0, "rope_scaling": None, "rms_norm_eps": 1e-6}
NEW = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rms_norm_eps": 1e-6}
LINEAR = {"type": "linear", "factor": 8.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("own", "base", "changes"),
    [
        ({}, NEW, []),
        (OLD, NEW, []),
        (NEW, OLD, []),
        (OLD, {**OLD, "hidden_act": "silu"}, []),
        ({"text_config": OLD}, NEW, []),
        ({**OLD, "rope_scaling": LINEAR}, {**OLD, "rope_scaling": {**LINEAR}}, []),
        (
            {**OLD, "rope_scaling": LINEAR},
            NEW,
            ["factor is 8.0, the base's None", "rope_type is 'linear', the base's 'default'"],
        ),
        (
            {**OLD, "rope_scaling": LINEAR},
            {**OLD, "rope_scaling": {**LINEAR, "factor": 2.0}},
            ["factor is 8.0, the base's 2.0"],
        ),
        (
            {"rope_parameters": YARN},
            NEW,
            ["factor is 4.0, the base's None", "rope_type is 'yarn', the base's 'default'"],
        ),
        ({"rope_parameters": YARN}, {"rope_parameters": {**YARN, "beta_fast": 32}}, []),
        ({**OLD, "rope_theta": 5e5}, NEW, ["rope_theta is 500000.0, the base's 10000.0"]),
        ({"rms_norm_eps": 1e-5}, NEW, ["rms_norm_eps is 1e-05, the base's 1e-06"]),
        ({"text_config": {"rms_norm_eps": 1}}, OLD, ["rms_norm_eps is 1, the base's 1e-06"]),
        ({"rope_parameters": {"full_attention": YARN, "sliding_attention": {}}}, NEW, []),
        ({"rope_theta": None, "rope_scaling": None}, NEW, []),
    ],
)
def test_settings_that_both_files_state_are_compared(
    own: Mapping[str, Any], base: Mapping[str, Any], changes: list[str]
) -> None:
    assert changed_settings(own, base) == changes


@pytest.mark.parametrize("merge", [False, True], ids=["side inputs", "merged"])
def test_a_rotary_scaling_of_the_training_is_named(
    merge: bool,
    tiny_llama: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    adapter = make_adapter(tiny_llama, out=tmp_path / "long")
    config = AutoConfig.from_pretrained(tiny_llama).to_dict()
    rotary = {**config["rope_parameters"], "rope_type": "linear", "factor": 8.0}
    (adapter / "config.json").write_text(json.dumps({**config, "rope_parameters": rotary}))
    trained_config._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        export(tiny_llama, tmp_path / "bundle", adapters={"trained": adapter}, merge=merge)
    assert "trained: the config.json beside it states other settings" in caplog.text
    assert "rope_type is 'linear', the base's 'default'" in caplog.text
    if not merge:
        AdapterSession(tmp_path / "bundle").load("loaded", adapter)
        assert "loaded: the config.json beside it states other settings" in caplog.text


def test_a_config_that_is_not_json_is_ignored(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = make_adapter(tiny_llama, out=tmp_path / "a")
    (adapter / "config.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        export(tiny_llama, tmp_path / "bundle", adapters={"a": adapter})
    assert "states other settings" not in caplog.text
