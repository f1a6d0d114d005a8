"""Python files in a model directory run only with the user's permission."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from loradeploy.errors import ModelError, UsageError
from loradeploy.lora.base.loading import load_pretrained
from tests.cli.calling import Run, one_line
from tests.conftest import MakeAdapter

OWN_CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "own"

class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture
def with_code(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory whose config names Python files; when run, they create `tmp_path`/ran."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    # Any interactive question is answered with yes.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    place = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((place / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (place / "config.json").write_text(json.dumps({**config, "model_type": "own"}))
    (place / "own.py").write_text(OWN_CODE.format(marker=str(tmp_path / "ran")))
    return place


def test_custom_model_code_is_refused_by_every_command(
    with_code: Path,
    tiny_llama_bundle: Path,
    make_adapter: MakeAdapter,
    tiny_llama: Path,
    tmp_path: Path,
    run: Run,
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    pissa = Path(shutil.copytree(make_adapter(tiny_llama), tmp_path / "pissa"))
    config = json.loads((pissa / "adapter_config.json").read_text())
    (pissa / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    output = tmp_path / "out"
    for arguments in (
        ("train", "--model", with_code, "--data", data, "--output", output),
        ("train", "--model", with_code, "--data", data, "--dry-run"),
        ("export", "--model", with_code, "--output", output, "--task", "causal-lm"),
        ("parity", tiny_llama_bundle, "--model", with_code, "--phases", "prefill"),
        ("convert", pissa, "--model", with_code, "--output", output),
    ):
        status, _, message = run(*arguments)
        assert (status, "--trust-remote-code" in one_line(message)) == (2, True), arguments
        assert not (tmp_path / "ran").exists(), arguments


def test_custom_model_code_runs_if_it_is_trusted(with_code: Path, tmp_path: Path) -> None:
    import transformers

    from loradeploy.lora.base.loading import custom_code, from_pretrained, load_pretrained

    with custom_code(True):
        loaded = load_pretrained(transformers.AutoModelForCausalLM, with_code)
    assert (tmp_path / "ran").exists()
    assert type(loaded.model).__name__ == "Model"
    with pytest.raises(ModelError, match="`trust_remote_code=True`"):  # trust was for one call
        from_pretrained(transformers.AutoConfig, with_code)


def test_trust_remote_code_is_refused_without_a_model(
    tiny_llama_bundle: Path, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    import loradeploy as ld

    with pytest.raises(UsageError, match="`trust_remote_code` is for checkpoints"):
        ld.export(tiny_llama_bundle, tmp_path / "out", trust_remote_code=True)
    with pytest.raises(UsageError, match="`trust_remote_code` needs `model`"):
        ld.parity(tiny_llama_bundle, trust_remote_code=True)


def test_a_class_of_its_own_with_a_model_type_of_transformers_is_a_warning(
    with_code: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers loads its own class then, without a word."""
    config = json.loads((with_code / "config.json").read_text())
    for architecture, warned in (("LlamaForCausalLM", False), ("OwnForCausalLM", True)):
        changed = {**config, "model_type": "llama", "architectures": [architecture]}
        (with_code / "config.json").write_text(json.dumps(changed))
        caplog.clear()
        load_pretrained(AutoModelForCausalLM, with_code)
        assert ("its own class OwnForCausalLM" in caplog.text) == warned
    assert not (tmp_path / "ran").exists()
