"""`bench` measures all variants."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.cli.calling import call
from tests.conftest import MakeAdapter


def test_bench_measures_all_variants(
    tiny_llama: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter
) -> None:
    adapters = [make_adapter(tiny_llama, r=4, seed=seed) for seed in (1, 2)]
    given = [f"--adapter=a{number}={place}" for number, place in enumerate(adapters)]
    sizes = ("--batch", 3, "--length", 8, "--rounds", 3)
    facts = json.loads(call("bench", tiny_llama_bundle, *given, *sizes, "--json"))
    sides = [timing["name"] for timing in facts["timings"]]
    assert sides == [
        "base",
        "base again (control)",
        "adapter a0",
        "adapter a1",
        "mixed batch",
        "swap at each call",
    ]
    assert all(timing["median"] > 0 for timing in facts["timings"])
    assert facts["placement"]["CPUExecutionProvider"]["MatMul"] > 10
    assert facts["off_device"] == {}
    assert facts["device"]["provider"] == "cpu"
    assert facts["device"]["device"]["kind"] == "CPU"
    assert set(facts["load_ms"]) == {"a0", "a1"}
    table = call("bench", tiny_llama_bundle, *given, *sizes)
    assert "mixed batch" in table
    assert re.search(r"ran on CPU, .*; 0 of \d+ nodes run on other providers", table)
