"""Fuzzing: whatever a broken file contains, each reader works or raises a typed one-line error.

A fixed number of tries of each reader; `python -m tools.fuzz` runs more, or repeats one by index.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.conftest import MakeAdapter
from tools.fuzzing import mutate
from tools.fuzzing.readers import READERS, Finding, Reader, Seeds, attempt
from tools.fuzzing.seeds import make_graph

# About five seconds each.
TRIES = {
    "adapter": 400,
    "native": 300,
    "bundle": 40,
    "tokenizer": 150,
    "recipe": 80,
    "graph": 60,
    "feeds": 800,
}


@pytest.fixture(scope="session")
def seeds(
    tiny_llama: Path, certified_bundle: Path, make_adapter: MakeAdapter, shared: Path
) -> Seeds:
    """The tiny Llama's bundle with its certificate, an adapter for it, and an ONNX encoder."""
    native = certified_bundle / "adapters" / "one.onnx_adapter"
    adapter = make_adapter(tiny_llama)
    return Seeds(adapter, certified_bundle, native, make_graph(shared / "fuzzed-graph"))


@pytest.mark.parametrize("name", READERS)
def test_broken_files_are_refused_with_a_typed_one_line_error(
    name: str, seeds: Seeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUST_BACKTRACE", "0")  # the tokenizers library may panic
    reader = READERS[name](seeds, tmp_path)
    found = [f for index in range(TRIES[name]) if (f := attempt(reader, name, 0, index))]
    message = "\n".join(f"--index {f.index}: {f.what}: {f.ended}" for f in found)
    assert not found, f"python -m tools.fuzz --reader {name} --seed 0 finds\n{message}"


class Careless(Reader):
    """A reader that raises an error that no reader should raise."""

    problem: BaseException = ValueError("invalid literal")

    def attempt(self, random: Random) -> None:
        raise self.problem


@pytest.mark.parametrize("problem", [ValueError("x"), AssertionError(), RecursionError("deep")])
def test_an_error_that_is_not_typed_is_a_finding(
    problem: BaseException, seeds: Seeds, tmp_path: Path
) -> None:
    reader = Careless(seeds, tmp_path)
    reader.problem = problem
    finding = attempt(reader, "adapter", 0, 7)
    assert isinstance(finding, Finding)
    assert finding.index == 7
    assert type(problem).__name__ in finding.ended


def test_a_try_depends_only_on_its_seed(seeds: Seeds) -> None:
    content = (seeds.adapter / "adapter_config.json").read_bytes()
    graph = seeds.graph.read_bytes()

    def made(seed: str) -> list[bytes]:
        tensors = (seeds.adapter / "adapter_model.safetensors").read_bytes()
        return [
            mutate.in_json(Random(seed), content),
            mutate.in_safetensors(Random(seed), tensors),
            mutate.in_onnx(Random(seed), graph),
        ]

    assert made("0/x/1") == made("0/x/1")
    assert made("0/x/1") != made("0/x/2")
