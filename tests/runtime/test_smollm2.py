"""The real model: the text that PyTorch with PEFT writes, from ONNX Runtime alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.runtime.feeds import feeds, rows_of
from tests.tolerances import tolerance

pytestmark = pytest.mark.slow

QUESTIONS = ["What is the capital of France?", "Write one sentence about the sea.", "Why?"]
NEW = 24


@pytest.fixture(scope="module")
def session(smollm2_bundle: Path, smollm2_adapters: dict[str, Path]) -> AdapterSession:
    session = AdapterSession(smollm2_bundle)
    for name, path in smollm2_adapters.items():
        session.load(name, path)
    return session


@pytest.fixture(scope="module")
def written_by_peft(smollm2: Path, smollm2_adapters: dict[str, Path]) -> dict[str | None, Any]:
    """Greedy tokens of each question, by adapter, with PyTorch, transformers and PEFT."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    base = AutoModelForCausalLM.from_pretrained(smollm2)
    first, second = smollm2_adapters
    model = peft.PeftModel.from_pretrained(base, smollm2_adapters[first], adapter_name=first)
    model.load_adapter(smollm2_adapters[second], adapter_name=second)
    model.eval()

    def answers() -> list[list[int]]:
        result = []
        for question in QUESTIONS:
            encoded = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_tensors="pt",
            )
            with torch.no_grad():
                out = model.generate(**encoded, max_new_tokens=NEW, do_sample=False)
            tokens = out[0, encoded["input_ids"].shape[1] :].tolist()
            result.append([token for token in tokens if token != tokenizer.eos_token_id])
        return result

    written: dict[str | None, Any] = {}
    for name in smollm2_adapters:
        model.set_adapter(name)
        written[name] = answers()
    with model.disable_adapter():
        written[None] = answers()
    return written


@pytest.mark.parametrize("adapter", [None, "first", "second"])
def test_smollm2_writes_what_it_writes_in_pytorch(
    session: AdapterSession, written_by_peft: dict[str | None, Any], adapter: str | None
) -> None:
    results = TextGenerator(session).generate(QUESTIONS, adapter, chat=True, max_new_tokens=NEW)
    assert [list(result.token_ids) for result in results] == written_by_peft[adapter]
    if adapter is None:
        assert "Paris" in results[0].text
    else:
        assert written_by_peft[adapter] != written_by_peft[None]


def test_smollm2_writes_the_same_in_a_batch_of_different_adapters(
    session: AdapterSession, written_by_peft: dict[str | None, Any]
) -> None:
    rows = [(q, a) for q in range(len(QUESTIONS)) for a in (None, "first", "second")]
    results = TextGenerator(session).generate(
        [QUESTIONS[q] for q, _ in rows], [a for _, a in rows], chat=True, max_new_tokens=NEW
    )
    for (question, adapter), result in zip(rows, results, strict=True):
        assert list(result.token_ids) == written_by_peft[adapter][question]


def test_rows_of_smollm2_equal_their_solo_runs(session: AdapterSession) -> None:
    ids = np.random.default_rng(0).integers(3, 49152, (3, 12))
    batch = feeds(session.manifest, ids)
    adapters = ["second", None, "first"]
    (mixed,) = session.run(["logits"], batch, adapters)
    for row, adapter in enumerate(adapters):
        (solo,) = session.run(["logits"], rows_of(batch, row), adapter)
        worst = np.abs(mixed[row] - solo[0]).max()
        assert worst <= tolerance("torch-onnx-smollm2"), f"row {row} differs by {worst}"


# What glibc still held of freed memory, beside what the process has, in kB.
OPENED = """
import ctypes, sys
import loradeploy
session = loradeploy.AdapterSession(sys.argv[1])
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
before = resident()
ctypes.CDLL(None).malloc_trim(0)
print(before, before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc has the memory of a process")
def test_an_opened_session_holds_no_memory_that_was_freed(smollm2_bundle: Path) -> None:
    command = [sys.executable, "-c", OPENED, str(smollm2_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    resident, freed = map(int, done.stdout.split())
    assert freed < 0.02 * resident
