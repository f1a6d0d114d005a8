"""Decoders whose cache has another layout than transformers' run step by step, with adapters."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.errors import UsageError
from tests.conftest import MakeAdapter
from tests.export.others import export_decoder
from tests.export.reference import difference, torch_output
from tests.tolerances import tolerance

IDS = np.random.default_rng(2).integers(3, 512, (2, 7))
BEFORE = 4  # tokens of the first step


@pytest.mark.parametrize("layout", ["tokens first", "stacked"])
def test_steps_with_another_cache_are_those_of_peft(
    layout: str,
    tiny_llama: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    export_decoder(tiny_llama, tmp_path / "graph", cache=True, layout=layout)
    adapter = make_adapter(tiny_llama, r=4, alpha=8, seed=4, target_modules="all-linear")
    with caplog.at_level(logging.WARNING, logger="loradeploy"):
        ld.export(
            tmp_path / "graph", tmp_path / "b", adapters={"small": adapter}, checkpoint=tiny_llama
        )
    assert not [message for message in caplog.messages if "not run" in message], "it was not tried"
    session = ld.AdapterSession(tmp_path / "b")
    caches = [spec for spec in session.manifest.inputs if spec.name.startswith("past")]
    sizes = {"batch": len(IDS), "past": 0}
    past = {
        spec.name: np.zeros([sizes.get(str(d), d) for d in spec.shape], np.float32)
        for spec in caches
    }
    expected = torch_output(tiny_llama, IDS, adapter=adapter)
    base = torch_output(tiny_llama, IDS)
    assert difference(expected, base) > 0.1, "the adapter does nothing"
    presents = [name.replace("past_key_values", "present") for name in past]
    for ids, mask, rows in (
        (IDS[:, :BEFORE], IDS[:, :BEFORE], slice(0, BEFORE)),
        (IDS[:, BEFORE:], IDS, slice(BEFORE, None)),
    ):
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(mask), **past}
        logits, *made = session.run(["logits", *presents], feeds, adapters=["small", None])
        past = dict(zip(past, made, strict=True))
        assert difference(logits[0], expected[0, rows]) <= tolerance("torch-onnx-tiny")
        assert difference(logits[1], base[1, rows]) <= tolerance("torch-onnx-tiny")
    with pytest.raises(UsageError, match=r"past_key_values"):
        ld.TextGenerator(session).generate(["a"])
