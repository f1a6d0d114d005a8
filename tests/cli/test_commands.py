"""The commands do what their --help says, for people and for programs."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from loradeploy.adapter import load_adapter
from loradeploy.cli.main import VERBS, commands
from loradeploy.export.api import export
from loradeploy.train.api import train
from loradeploy.train.config import TrainConfig
from tests.conftest import MakeAdapter

HEAVY = ("numpy", "onnxruntime", "torch", "transformers", "onnx", "onnx_ir", "rich", "tokenizers")


def call(*arguments: object) -> str:
    done = CliRunner().invoke(commands, [str(a) for a in arguments], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def command(verb: str) -> click.Command:
    found = commands.get_command(click.Context(commands), verb)
    assert found is not None
    return found


def test_help_imports_no_verb() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "loradeploy", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()
    }
    assert imported.isdisjoint(HEAVY), imported.intersection(HEAVY)
    for verb in VERBS:
        assert f"\n  {verb} " in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb: str) -> None:
    text = call(verb, "--help")
    assert f"Example: loradeploy {verb}" in " ".join(text.split())
    assert command(verb).short_help == VERBS[verb], "the list of verbs tells another story"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_json(verb: str) -> None:
    assert any("--json" in parameter.opts for parameter in command(verb).params)


def names(verb: str) -> set[str]:
    return {p.name for p in command(verb).params if p.name is not None} - {"as_json", "help"}


def test_every_flag_of_train_is_a_setting_and_every_setting_a_flag() -> None:
    settings = {field.name for field in dataclasses.fields(TrainConfig)}
    own = set(inspect.signature(train).parameters) - {"flags"}
    assert names("train") == settings | own


def test_every_flag_of_export_reaches_the_function() -> None:
    assert names("export") <= set(inspect.signature(export).parameters)


def test_inspect_tells_what_an_adapter_is(tiny_llama: Path, make_adapter: MakeAdapter) -> None:
    place = make_adapter(tiny_llama, r=4, alpha=8)
    facts = json.loads(call("inspect", place, "--json"))
    assert facts["kind"] == "LoRA adapter"
    assert facts["digest"] == load_adapter(place).digest
    assert (facts["rank"], facts["alpha"]) == (4, 8)
    assert {row["scaling"] for row in facts["targets"]} == {2.0}
    assert sum(row["count"] for row in facts["targets"]) == 14
    table = call("inspect", place)
    assert "LoRA adapter" in table
    assert "q_proj" in table


def test_inspect_tells_what_a_bundle_is(tiny_llama_bundle: Path) -> None:
    facts = json.loads(call("inspect", tiny_llama_bundle, "--json"))
    assert (facts["kind"], facts["task"], facts["mode"]) == ("bundle", "causal-lm", "side-inputs")
    assert facts["parity"].startswith("never checked")
    assert {row["name"] for row in facts["inputs"]} >= {"input_ids", "past_key_values.N.key"}
    assert "q_proj" in call("inspect", tiny_llama_bundle)


def test_inspect_tells_what_an_onnx_file_takes(tiny_llama_bundle: Path) -> None:
    facts = json.loads(call("inspect", tiny_llama_bundle / "model.onnx", "--json"))
    assert facts["kind"] == "ONNX file"
    assert "adapter_ids" in {row["name"] for row in facts["side inputs"]}
    assert "adapter_ids" not in {row["name"] for row in facts["inputs"]}


@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"q_proj": 2}}], ids=["plain", "pattern"])
def test_an_adapter_survives_the_way_to_onnx_adapter_and_back(
    options: dict[str, object],
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source = make_adapter(tiny_llama, r=4, alpha=12, **options)
    native, back = tmp_path / "a.onnx_adapter", tmp_path / "back"
    call("convert", source, "--bundle", tiny_llama_bundle, "--output", native)
    said = json.loads(
        call("convert", native, "--bundle", tiny_llama_bundle, "--output", back, "--json")
    )
    assert said["targets"] == 14
    assert json.loads(call("inspect", native, "--json"))["kind"] == "ONNX Runtime adapter"

    logits = []
    for place in (source, back):
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        with torch.no_grad():
            adapted = PeftModel.from_pretrained(base, place).eval()
            logits.append(adapted(torch.arange(3, 15)[None]).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)


def test_bench_times_every_side(
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
    assert set(facts["load_ms"]) == {"a0", "a1"}
    assert "mixed batch" in call("bench", tiny_llama_bundle, *given, *sizes)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory of installed distributions, to be filled."""
    return tmp_path / "site"


def install(site: Path, name: str, version: str = "1.0") -> None:
    place = site / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def doctor(site: Path) -> tuple[int, list[dict[str, str]]]:
    done = subprocess.run(
        [sys.executable, "-m", "loradeploy", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    return done.returncode, json.loads(done.stdout)


def test_the_doctor_is_content_here(site: Path) -> None:
    status, findings = doctor(site)
    assert status == 0
    assert {finding["name"] for finding in findings} >= {"python", "numpy", "one onnxruntime"}


def test_the_doctor_sees_two_onnxruntimes(site: Path) -> None:
    install(site, "onnxruntime")
    install(site, "onnxruntime-gpu")
    status, findings = doctor(site)
    (problem,) = [finding for finding in findings if finding["status"] == "problem"]
    assert status == 1
    assert "overwrite each other" in problem["detail"]
    assert "pip uninstall onnxruntime onnxruntime-gpu" in problem["advice"]
