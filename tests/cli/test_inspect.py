"""`inspect` describes adapters, bundles and models, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import onnxruntime
import pytest

from loradeploy.adapter import load_adapter, save_adapter
from tests.cli.calling import call, without_extras
from tests.conftest import MakeAdapter


def test_inspect_describes_an_adapter(tiny_llama: Path, make_adapter: MakeAdapter) -> None:
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


def test_inspect_reports_a_base_model_in_the_directory_of_an_adapter(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama, r=4, alpha=8)
    shutil.copytree(adapter, tmp_path / "both")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_llama / name, tmp_path / "both")
    assert "beside" not in json.loads(call("inspect", adapter, "--json"))
    result = json.loads(call("inspect", tmp_path / "both", "--json"))["beside"]
    assert result == "a base model (model.safetensors), which is loaded without the adapter"


def test_inspect_shows_the_whole_adapter_of_a_part(certified: Path, tmp_path: Path) -> None:
    part = dataclasses.replace(load_adapter(certified / "adapters/one"), part_of="sha256:11")
    save_adapter(part, tmp_path / "part")
    assert json.loads(call("inspect", tmp_path / "part", "--json"))["part_of"] == "sha256:11"
    (entry,) = json.loads(call("inspect", certified, "--json"))["adapters"]
    assert "part_of" not in entry
    manifest = json.loads((certified / "loradeploy.json").read_text())
    manifest["adapters"]["one"] |= {"whole_digest": "sha256:11", "split": True}
    (certified / "loradeploy.json").write_text(json.dumps(manifest))
    (entry,) = json.loads(call("inspect", certified, "--json"))["adapters"]
    assert entry["part_of"] == "sha256:11"
    # Beside an adapter that is not split over several bundles.
    shutil.copytree(certified / "adapters/one", certified / "adapters/alone")
    alone = {**manifest["adapters"]["one"], "split": False}
    manifest["adapters"] = {"alone": alone, **manifest["adapters"]}
    (certified / "loradeploy.json").write_text(json.dumps(manifest))
    lines = call("inspect", certified).partition("\nadapters\n")[2].splitlines()[:3]
    assert lines[0].split() == ["name", "digest", "files", "part", "of"]
    assert [line.split()[0] for line in lines[1:]] == ["alone", "one"]
    assert [line.endswith("sha256:11") for line in lines[1:]] == [False, True]


def test_inspect_describes_a_bundle(tiny_llama_bundle: Path) -> None:
    facts = json.loads(call("inspect", tiny_llama_bundle, "--json"))
    assert (facts["kind"], facts["task"], facts["mode"]) == ("bundle", "causal-lm", "side-inputs")
    assert (facts["graph"], facts["parity"]) == ("as exported", "unchecked")
    assert {row["name"] for row in facts["inputs"]} >= {"input_ids", "past_key_values.1.key"}
    assert len(facts["targets"]) == 14
    table = call("inspect", tiny_llama_bundle)
    assert "past_key_values.N.key" in table
    assert "model.layers.N.self_attn.q_proj" in table


def spoil(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


def test_a_certificate_is_valid_as_long_as_the_checked_files_are_unchanged(certified: Path) -> None:
    def verdict() -> tuple[str, str, str]:
        facts = json.loads(call("inspect", certified, "--json"))
        (adapter,) = facts["adapters"]
        return facts["graph"], facts["parity"], adapter["files"]

    assert verdict() == ("as exported", "passed", "as exported")
    certificate = json.loads((certified / "parity.json").read_text())
    (certified / "parity.json").write_text(json.dumps({**certificate, "passed": False}))
    assert verdict()[1] == "failed"
    (certified / "parity.json").write_text(json.dumps({**certificate, "adapters": []}))
    assert verdict()[1] == "stale"
    (certified / "parity.json").write_text("{")
    assert verdict()[1] == "unreadable"
    (certified / "parity.json").write_text(json.dumps({**certificate, "schema_version": 1}))
    assert verdict()[1] == "unreadable"
    (certified / "parity.json").unlink()
    assert verdict()[1] == "unchecked"
    (certified / "parity.json").write_text(json.dumps(certificate))
    spoil(certified / "model.onnx")
    assert verdict()[:2] == ("changed since the export: model.onnx", "stale")
    spoil(certified / "adapters/one/adapter_model.safetensors")
    assert "not a valid safetensors" in verdict()[2]


def test_the_certificate_is_shown_with_the_scope_of_the_check(certified: Path) -> None:
    certificate = json.loads((certified / "parity.json").read_text())
    facts = json.loads(call("inspect", certified, "--json"))
    assert facts["parity_created"] == certificate["created"]
    torch = certificate["environment"]["versions"]["torch"]
    assert f"torch {torch}" in facts["parity_versions"]
    (on,) = (line for line in facts["parity_hardware"] if line.startswith("cpu: "))
    assert on.startswith(f"cpu: CPU, version {onnxruntime.__version__}, CPU ")
    (adapter,) = facts["parity_adapters"]
    assert (adapter["name"], adapter["digest"]) == ("one", facts["adapters"][0]["digest"])
    assert 0 < adapter["largest_error"] < 1e-3 < adapter["effect"]
    table = call("inspect", certified)
    assert "  parity           passed" in table
    assert f"{adapter['effect']:g}" in table


def test_a_certificate_of_a_changed_graph_is_shown_as_stale(certified: Path) -> None:
    spoil(certified / "model.onnx.data")
    table = call("inspect", certified)
    assert "stale" in table
    assert "model.onnx.data has changed since it was checked: run `loradeploy parity" in table


def test_inspect_shows_the_inputs_of_an_onnx_file(tiny_llama_bundle: Path) -> None:
    facts = json.loads(call("inspect", tiny_llama_bundle / "model.onnx", "--json"))
    assert facts["kind"] == "ONNX file"
    assert facts["opsets"] == ["ai.onnx 23"]
    assert {"operator": "Attention", "nodes": 2} in facts["operators"]
    factors = "model.layers.0.self_attn.q_proj.lora_A"
    assert factors in {row["name"] for row in facts["side_inputs"]}
    assert factors not in {row["name"] for row in facts["inputs"]}


def test_inspect_shows_the_contents_of_a_checkpoint(tiny_llama: Path) -> None:
    facts = json.loads(call("inspect", tiny_llama / "model.safetensors", "--json"))
    assert facts["kind"] == "safetensors file"
    assert {"name": "lm_head.weight", "dtype": "F32", "shape": [512, 64]} in facts["tensors"]
    table = call("inspect", tiny_llama / "model.safetensors")
    assert "model.layers.N.self_attn.k_proj.weight" in table
    assert "model.norm.weight " in table


def test_inspect_works_without_the_extras(
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


@pytest.mark.parametrize(
    ("options", "method", "layers"),
    [
        ({}, "LoRA", ["linear"]),
        ({"use_rslora": True, "use_dora": True}, "rsLoRA + DoRA", ["linear"]),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "LoRA", ["embedding", "linear"]),
        ({"init_lora_weights": "olora"}, "LoRA, on a base that olora changed", ["linear"]),
    ],
    ids=["lora", "dora", "embedding", "olora"],
)
def test_inspect_shows_the_method_of_an_adapter(
    options: dict[str, object],
    method: str,
    layers: list[str],
    tiny_llama: Path,
    make_adapter: MakeAdapter,
) -> None:
    facts = json.loads(call("inspect", make_adapter(tiny_llama, **options), "--json"))
    assert (facts["method"], facts["layers"], facts["bias"]) == (method, layers, "none")


def test_inspect_shows_which_biases_were_trained(
    tiny_gpt2: Path, make_adapter: MakeAdapter
) -> None:
    place = make_adapter(tiny_gpt2, target_modules=["c_attn"], bias="lora_only")
    facts = json.loads(call("inspect", place, "--json"))
    assert facts["bias"] == "lora_only"
    assert [row["name"] for row in facts["saved"]] == [
        f"transformer.h.{layer}.attn.c_attn.bias" for layer in (0, 1)
    ]
