"""Adapters of masked language models on encoders: the head is left out, and named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

import numpy as np
import peft
import pytest
import torch
import transformers

import loradeploy as ld
from loradeploy.adapter.fitting.parts import _warn_of_head
from loradeploy.errors import AdapterMismatchError
from tests.export.reference import difference, onnx_output, session, token_feeds
from tests.export.small import SMALL
from tests.tolerances import tolerance

IDS: Final = np.array([[5, 17, 3, 101, 44, 60], [7, 9, 11, 13, 15, 17]])
_SIZES: Final = {**SMALL, "vocab_size": 112}
# By the config's class: its values, the targets of the adapter, and a module of the head.
HEADS: Final[dict[str, tuple[dict[str, Any], list[str], str]]] = {
    "BertConfig": (_SIZES, ["query", "transform.dense"], "cls.predictions.transform.dense"),
    "RobertaConfig": (_SIZES, ["query", "lm_head.dense"], "lm_head.dense"),
    "DistilBertConfig": (
        {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "vocab_size": 112},
        ["q_lin", "vocab_transform"],
        "vocab_transform",
    ),
}


def _made(config_class: str, place: Path) -> tuple[Path, Path, list[np.ndarray]]:
    """Write a masked language model and an adapter; return its hidden states without and with."""
    values, targets, _ = HEADS[config_class]
    config = getattr(transformers, config_class)(**values)
    config.initializer_range = 0.15
    torch.manual_seed(0)
    base = transformers.AutoModelForMaskedLM.from_config(config).eval()
    base.save_pretrained(place / "model")

    def states(model: Any) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = model.base_model(torch.from_numpy(IDS)).last_hidden_state.numpy()
        return found

    before = states(base)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets)).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(place / "a")
    return place / "model", place / "a", [before, states(adapted.base_model.model)]


@pytest.mark.parametrize("config_class", HEADS)
def test_hidden_states_are_those_of_peft_without_the_head(
    config_class: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, adapter, (before, after) = _made(config_class, tmp_path)
    head, allowed = HEADS[config_class][2], tolerance("torch-onnx-tiny")
    assert difference(before, after) > 0.1, "the adapter does nothing"
    _warn_of_head.cache_clear()
    with caplog.at_level(logging.WARNING, logger="loradeploy"):
        ld.export(model, tmp_path / "side", adapters={"a": adapter}, task="feature-extraction")
    told = [message for message in caplog.messages if "masked language model's head" in message]
    assert len(told) == 1 and told[0].startswith(head)
    opened = ld.AdapterSession(tmp_path / "side")
    opened.load("later", adapter)
    feeds = token_feeds(session(tmp_path / "side"), IDS)
    for rows, expected in (
        (["a", None], (after[0], before[1])),
        ([None, "later"], (before[0], after[1])),
    ):
        found = opened.run(["last_hidden_state"], feeds, rows)[0]
        for row, states in zip(found, expected, strict=True):
            assert difference(row, states) <= allowed
    ld.export(model, tmp_path / "merged", adapters=[adapter], task="feature-extraction", merge=True)
    assert difference(onnx_output(tmp_path / "merged", IDS), after) <= allowed
    ld.export(tmp_path / "side", tmp_path / "again", adapters={"a": adapter}, merge=True)
    assert difference(onnx_output(tmp_path / "again", IDS), after) <= allowed
    report = ld.parity(tmp_path / "side", model=model, backends=["onnx-side-inputs"])
    assert report.passed, report.failures


def test_an_adapter_of_the_head_alone_is_refused(tmp_path: Path) -> None:
    model, _, _ = _made("BertConfig", tmp_path)
    base = transformers.AutoModelForMaskedLM.from_pretrained(model)
    made = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["transform.dense"]))
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = torch.ones_like(parameter)
    made.save_pretrained(tmp_path / "head")
    with pytest.raises(AdapterMismatchError, match=r"cls\.predictions\.transform\.dense is not a"):
        ld.export(model, tmp_path / "b", adapters=[tmp_path / "head"], task="feature-extraction")
