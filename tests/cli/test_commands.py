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


# As on a machine where the extras were not installed.
WITHOUT_EXTRAS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "accelerate", "matplotlib", "onnx", "onnx_ir"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from loradeploy.cli.main import main
main(sys.argv[1:])
"""


def without_extras(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


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
    assert len(facts["targets"]) == 14
    assert facts["targets"][0]["lora_A"] == [4, 96]
    table = call("inspect", place)
    assert "LoRA adapter" in table
    assert "model.layers.N.self_attn.q_proj  4     2        [4, 64]  [64, 4]  2" in table


def test_inspect_tells_what_a_bundle_is(tiny_llama_bundle: Path) -> None:
    facts = json.loads(call("inspect", tiny_llama_bundle, "--json"))
    assert (facts["kind"], facts["task"], facts["mode"]) == ("bundle", "causal-lm", "side-inputs")
    assert (facts["graph"], facts["parity"]) == ("as exported", "unchecked")
    assert {row["name"] for row in facts["inputs"]} >= {"input_ids", "past_key_values.1.key"}
    assert len(facts["targets"]) == 14
    table = call("inspect", tiny_llama_bundle)
    assert "past_key_values.N.key" in table
    assert "model.layers.N.self_attn.q_proj" in table


@pytest.fixture
def checked(
    tiny_llama_bundle: Path, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> Path:
    """A bundle with an adapter inside, and a certificate for both."""
    bundle = tmp_path / "bundle"
    manifest = export(tiny_llama, bundle, adapters={"sport": make_adapter(tiny_llama)})
    certificate = {
        "passed": True,
        "created": "2030-01-02",
        "graph_digest": manifest.graph_digest,
        "data_digest": manifest.data_digest,
        "adapters": [{"name": "sport", "digest": manifest.adapters["sport"].digest}],
    }
    (bundle / "parity.json").write_text(json.dumps(certificate))
    return bundle


def spoil(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


def test_a_certificate_counts_while_the_files_are_those_that_were_checked(checked: Path) -> None:
    def verdict() -> tuple[str, str, str]:
        facts = json.loads(call("inspect", checked, "--json"))
        (adapter,) = facts["adapters"]
        return facts["graph"], facts["parity"], adapter["files"]

    assert verdict() == ("as exported", "passed", "as exported")
    certificate = json.loads((checked / "parity.json").read_text())
    (checked / "parity.json").write_text(json.dumps({**certificate, "passed": False}))
    assert verdict()[1] == "failed"
    (checked / "parity.json").write_text(json.dumps({**certificate, "adapters": []}))
    assert verdict()[1] == "stale"
    (checked / "parity.json").write_text("{")
    assert verdict()[1] == "unreadable"
    (checked / "parity.json").write_text(json.dumps(certificate))
    spoil(checked / "model.onnx")
    assert verdict()[:2] == ("changed since the export: model.onnx", "stale")
    spoil(checked / "adapters/sport/adapter_model.safetensors")
    assert "no valid safetensors" in verdict()[2]


def test_inspect_tells_what_an_onnx_file_takes(tiny_llama_bundle: Path) -> None:
    facts = json.loads(call("inspect", tiny_llama_bundle / "model.onnx", "--json"))
    assert facts["kind"] == "ONNX file"
    assert facts["opsets"] == ["ai.onnx 23"]
    assert {"operator": "Attention", "nodes": 2} in facts["operators"]
    assert "adapter_ids" in {row["name"] for row in facts["side_inputs"]}
    assert "adapter_ids" not in {row["name"] for row in facts["inputs"]}


def test_inspect_tells_what_a_checkpoint_holds(tiny_llama: Path) -> None:
    facts = json.loads(call("inspect", tiny_llama / "model.safetensors", "--json"))
    assert facts["kind"] == "safetensors file"
    assert {"name": "lm_head.weight", "dtype": "F32", "shape": [512, 64]} in facts["tensors"]
    table = call("inspect", tiny_llama / "model.safetensors")
    assert "model.layers.N.self_attn.k_proj.weight" in table
    assert "model.norm.weight " in table


def test_a_serving_machine_inspects_with_what_it_has(
    tiny_llama: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter
) -> None:
    with_all = json.loads(call("inspect", tiny_llama_bundle / "model.onnx", "--json"))
    places = [make_adapter(tiny_llama), tiny_llama_bundle, tiny_llama_bundle / "model.onnx"]
    for place in places:
        done = without_extras("inspect", place, "--json")
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout)
    assert "operators" not in facts
    for part in ("inputs", "outputs", "side_inputs"):
        assert sorted(map(str, facts[part])) == sorted(map(str, with_all[part]))


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
