"""`bench` measures all variants."""

from __future__ import annotations

import json
import re
import shutil
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


def test_the_default_length_fits_into_the_positions_of_a_small_model(
    tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_llama_bundle, tmp_path / "bundle")
    config = json.loads((bundle / "config.json").read_text())
    for positions, length in ((64, 63), (4096, 128)):
        config["max_position_embeddings"] = positions
        (bundle / "config.json").write_text(json.dumps(config))
        assert json.loads(call("bench", bundle, "--rounds", 1, "--json"))["length"] == length
