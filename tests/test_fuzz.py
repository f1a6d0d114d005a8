"""Whatever is broken ends in one typed line, or works: a fixed number of tries of each reader.

`python -m tools.fuzz` tries more, and one of these again by its index.
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
    """The tiny Llama's bundle with its certificate, an adapter for it, an encoder in ONNX."""
    native = certified_bundle / "adapters" / "one.onnx_adapter"
    adapter = make_adapter(tiny_llama)
    return Seeds(adapter, certified_bundle, native, make_graph(shared / "fuzzed-graph"))


@pytest.mark.parametrize("name", READERS)
def test_what_is_broken_is_refused_in_one_typed_line(
    name: str, seeds: Seeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUST_BACKTRACE", "0")  # of a panic of the tokenizers library
    reader = READERS[name](seeds, tmp_path)
    found = [f for index in range(TRIES[name]) if (f := attempt(reader, name, 0, index))]
    told = "\n".join(f"--index {f.index}: {f.what}: {f.ended}" for f in found)
    assert not found, f"python -m tools.fuzz --reader {name} --seed 0 finds\n{told}"


class Careless(Reader):
    """Raises what no reader should."""

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


def test_a_try_depends_on_its_seed_alone(seeds: Seeds) -> None:
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
