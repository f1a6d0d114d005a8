"""Each way to run adapters computes the same as PyTorch with PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter
from tests.runtime.feeds import feeds, logits, random_ids, rows_of
from tests.tolerances import tolerance

MIXES: dict[str, list[str | None]] = {
    "r4-r64-base": ["small", "large", None],
    "all-base": [None, None, None],
    "all-one": ["large", "large", "large"],
    "one-and-base": [None, "small", None],
    "partial-r64": ["partial", "large", "partial"],
    "twice-and-base": ["small", None, "small", "partial", "large", None, "large"],
}


@pytest.mark.parametrize("rows", MIXES.values(), ids=MIXES.keys())
def test_each_row_of_a_mixed_batch_equals_its_solo_run(
    llama_session: AdapterSession, rows: list[str | None]
) -> None:
    batch = feeds(llama_session.manifest, random_ids(len(rows), 9))
    mixed = llama_session.run(None, batch, rows)
    for row, adapter in enumerate(rows):
        solo = llama_session.run(None, rows_of(batch, row), adapter)
        for together, alone in zip(mixed, solo, strict=True):
            worst = np.abs(together[row] - alone[0]).max()
            assert worst <= tolerance("rows"), f"row {row} ({adapter}) differs by {worst}"


def test_the_adapters_of_a_batch_change_something(llama_session: AdapterSession) -> None:
    ids = np.repeat(random_ids(1, 9), 4, axis=0)
    rows = logits(llama_session, ids, ["small", "large", "partial", None])
    for one in range(4):
        for other in range(one):
            assert np.abs(rows[one] - rows[other]).max() > 0.05


@pytest.mark.parametrize("name", ["small", "large", "partial"])
def test_a_decoders_adapter_computes_what_peft_computes(
    llama_session: AdapterSession,
    tiny_llama: Path,
    llama_adapters: dict[str, Path],
    name: str,
) -> None:
    ids = random_ids(2, 9)
    expected = _peft_logits("causal-lm", tiny_llama, llama_adapters[name], ids)
    worst = np.abs(logits(llama_session, ids, name) - expected).max()
    assert worst <= tolerance("torch-onnx-tiny"), f"differs by {worst}"


def test_gpt2_rows_compute_what_peft_computes(
    tiny_gpt2_bundle: Path, tiny_gpt2: Path, make_adapter: MakeAdapter
) -> None:
    adapters = {f"r{r}": make_adapter(tiny_gpt2, r=r, seed=r) for r in (2, 12)}
    session = AdapterSession(tiny_gpt2_bundle)
    for name, path in adapters.items():
        session.load(name, path)
    ids = random_ids(2, 7)
    mixed = logits(session, ids, list(adapters))
    for row, path in enumerate(adapters.values()):
        expected = _peft_logits("causal-lm", tiny_gpt2, path, ids[row : row + 1])
        worst = np.abs(mixed[row] - expected[0]).max()
        assert worst <= tolerance("torch-onnx-tiny"), f"row {row} differs by {worst}"


def test_heads_of_several_adapters_share_a_batch(
    tiny_bert_bundle: Path, tiny_bert: Path, bert_adapters: dict[str, Path]
) -> None:
    session = AdapterSession(tiny_bert_bundle)
    for name in ("small", "large"):
        session.load(name, bert_adapters[name])
    ids = random_ids(3, 8)
    mixed = logits(session, ids, ["small", None, "large"])
    for row, name in ((0, "small"), (2, "large")):
        expected = _peft_logits(
            "sequence-classification", tiny_bert, bert_adapters[name], ids[row : row + 1]
        )
        worst = np.abs(mixed[row] - expected[0]).max()
        assert worst <= tolerance("torch-onnx-tiny"), f"row {row} differs by {worst}"
    np.testing.assert_array_equal(mixed[1], np.zeros(2))  # the checkpoint has no head


def test_prefill_and_decode_equal_one_full_forward(llama_session: AdapterSession) -> None:
    ids = random_ids(2, 10)
    adapters = ["large", None]
    whole = logits(llama_session, ids, adapters)
    past = [s.name for s in llama_session.manifest.inputs if s.name.startswith("past_key")]
    step = feeds(llama_session.manifest, ids[:, :6])
    for end in range(6, 11):
        outputs = llama_session.run(None, step, adapters)
        worst = np.abs(outputs[0][:, -1] - whole[:, end - 1]).max()
        assert worst <= tolerance("rows"), f"position {end - 1} differs by {worst}"
        step = {
            "input_ids": ids[:, end : end + 1],
            "attention_mask": np.ones((2, end + 1), np.int64),
            "position_ids": np.full((2, 1), end),
            **dict(zip(past, outputs[1:], strict=True)),
        }


def test_a_left_padded_row_equals_its_solo_run(llama_session: AdapterSession) -> None:
    ids = random_ids(2, 9)
    mask = np.ones_like(ids)
    mask[0, :5] = 0
    padded = llama_session.run(["logits"], feeds(llama_session.manifest, ids, mask), "large")[0]
    alone = logits(llama_session, ids[:1, 5:], "large")
    assert np.abs(padded[0, 5:] - alone[0]).max() <= tolerance("rows")


def test_ort_values_give_the_same_results_as_arrays(llama_session: AdapterSession) -> None:
    batch = feeds(llama_session.manifest, random_ids(2, 5))
    arrays = llama_session.run(None, batch, ["small", None])
    values = llama_session.run_with_ort_values(None, batch, ["small", None])
    for array, value in zip(arrays, values, strict=True):
        np.testing.assert_array_equal(array, value.numpy())


def test_results_are_not_changed_by_later_runs(llama_session: AdapterSession) -> None:
    ids = random_ids(1, 5)
    first = logits(llama_session, ids, "small")
    kept = first.copy()
    for name in ("large", "small", None):
        logits(llama_session, random_ids(1, 5, seed=1), name)
    np.testing.assert_array_equal(first, kept)


def _peft_logits(task: str, model: Path, adapter: Path, ids: NDArray[np.int64]) -> NDArray[Any]:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kinds = {
        "causal-lm": AutoModelForCausalLM,
        "sequence-classification": AutoModelForSequenceClassification,
    }
    base = kinds[task].from_pretrained(model)
    adapted = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        result: NDArray[Any] = adapted(input_ids=torch.from_numpy(ids)).logits.numpy()
    return result
