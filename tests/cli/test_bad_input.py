"""User errors: one line on stderr, exit status 2, and no partial output."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loradeploy.adapter.files.tensors import read_arrays, write_arrays
from loradeploy.errors import AdapterError
from tests.cli.calling import Run, one_line
from tests.conftest import MakeAdapter

WEIGHTS = "adapter_model.safetensors"


def edit_weights(directory: Path, change: Callable[[bytes], bytes]) -> None:
    file = directory / WEIGHTS
    file.write_bytes(change(file.read_bytes()))


def poison(directory: Path) -> None:
    arrays, metadata = read_arrays(directory / WEIGHTS, error=AdapterError)
    name = sorted(arrays)[0]
    arrays[name] = np.full_like(arrays[name], np.nan)
    write_arrays(directory / WEIGHTS, arrays, metadata)


def edit_config(directory: Path, **fields: object) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda d: edit_weights(d, lambda b: b[:-8]), "not a valid safetensors"),
    "lying header": (
        lambda d: edit_weights(d, lambda b: struct.pack("<Q", 1 << 50) + b[8:]),
        "not a valid safetensors",
    ),
    "not a number": (poison, "not finite"),
    "a pickle": (lambda d: (d / WEIGHTS).rename(d / "adapter_model.bin"), "is a pickle"),
    "a variant": (lambda d: edit_config(d, use_dora=True), "use_dora"),
    "an unknown field": (lambda d: edit_config(d, tomorrow=0.5), "tomorrow"),
    "another rank": (lambda d: edit_config(d, r=5), "the config has rank 5"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "does not exist"),
}


@pytest.fixture
def adapter(tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path) -> Path:
    """A copy of a valid adapter, to be broken."""
    return Path(shutil.copytree(make_adapter(tiny_llama), tmp_path / "adapter"))


@pytest.mark.parametrize("verb", ["inspect", "run", "export", "convert"])
@pytest.mark.parametrize("broken", SPOILT)
def test_a_broken_adapter_is_refused_by_every_command(
    broken: str,
    verb: str,
    adapter: Path,
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    tmp_path: Path,
    run: Run,
) -> None:
    spoil, message = SPOILT[broken]
    spoil(adapter)
    output = tmp_path / "output"
    arguments = {
        "inspect": (adapter,),
        "run": (tiny_llama_bundle, "Hello", "--adapter", adapter),
        "export": ("--model", tiny_llama, "--output", output, "--adapter", adapter),
        "convert": (adapter, "--bundle", tiny_llama_bundle, "--output", f"{output}.onnx_adapter"),
    }[verb]
    status, out, err = run(verb, *arguments)
    assert (status, out) == (2, "")
    assert message in one_line(err)
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{tmp}/nowhere"], "does not exist"),
        (["inspect", "{tmp}"], "is not an adapter, a bundle or an ONNX file"),
        (["run", "{tmp}/nowhere", "hi"], "does not exist"),
        (["run", "{tmp}", "hi"], "has no loradeploy.json: give a directory that loradeploy ex"),
        (["run", "{bundle}"], "give either a PROMPT or --input"),
        (["run", "{bundle}", "hi", "--input", "x"], "give either a PROMPT or --input"),
        (["run", "{bundle}", "hi", "--adapter", "unheard"], "unheard"),
        (["run", "{bundle}", "hi", "--max-new-tokens", "0"], "max_new_tokens"),
        (["run", "{bundle}", "--input", "{tmp}/nowhere.txt"], "does not exist"),
        (["run", "{bundle}", "hi", "--provider", "cuda"], "CUDAExecutionProvider"),
        (["bench", "{bundle}", "--rounds", "0"], "--rounds is 0"),
        (
            ["bench", "{bundle}", "--length", "100000"],
            "--length is 100000: the model has positions",
        ),
        (["convert", "{tmp}/nowhere", "--output", "b"], "nowhere does not exist"),
        (
            ["convert", "a", "--bundle", "{bundle}", "--output", "b"],
            "one of the adapter and --output",
        ),
        (["convert", "a.onnx_adapter", "--bundle", "{bundle}", "--output", "b"], "not exist"),
        (["export", "--model", "{tmp}/nowhere", "--output", "{tmp}/o"], "does not exist"),
        (["export", "--model", "{model}", "--output", "{tmp}/o", "--merge"], "exactly one adapter"),
        (
            ["train", "--model", "{model}", "--data", "{tmp}/no.jsonl", "--output", "{tmp}/o"],
            "no.jsonl",
        ),
        (["train", "--model", "{tmp}/no", "--data", "{tmp}/d.jsonl", "--output", "{tmp}/o"], "no"),
        (
            ["train", "--model", "{model}", "--data", "x", "--output", "y", "--rank", "0"],
            "rank is 0",
        ),
        (["train", "--model", "{model}", "--data", "x", "--output", "y", "--config", "z"], "z"),
        (["parity", "{tmp}/nowhere"], "does not exist"),
        (["parity", "{bundle}", "--model", "{tmp}/nowhere"], "nowhere"),
        (["parity", "{bundle}", "--report", "{tmp}/report.pdf"], ".pdf"),
        (["parity", "{bundle}", "--backends", "guess"], "guess"),
        (["parity", "{bundle}", "--model", "{model}", "--adapter", "{tmp}/no"], "does not exist"),
        (["export", "--model", "{model}", "--output", "{tmp}/o", "--precision", "fp8"], "fp8"),
        (["inspect", "{bundle}/config.json"], "is not an adapter, a bundle or an ONNX file"),
        (["export", "--model", "no.onnx", "--output", "{tmp}/o"], "no.onnx does not exist"),
        (
            ["convert", "{tmp}/no", "--bundle", "{tmp}", "--output", "b.onnx_adapter"],
            "loradeploy.json",
        ),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    tmp_path: Path,
    run: Run,
) -> None:
    places = {"tmp": tmp_path, "bundle": tiny_llama_bundle, "model": tiny_llama}
    if message == "CUDAExecutionProvider" and Path("/dev/nvidia0").exists():
        pytest.skip("there is a device here")
    status, out, err = run(*(argument.format(**places) for argument in arguments))
    assert (status, out) == (2, "")
    assert message in one_line(err)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no examples"), ('{"text": "a"}\n{"text"\n', "line 2")],
)
def test_broken_data_is_named_by_its_line(
    content: str, message: str, tiny_llama: Path, tmp_path: Path, run: Run
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    status, _, err = run(
        "train", "--model", tiny_llama, "--data", data, "--output", tmp_path / "adapter"
    )
    assert status == 2
    assert message in one_line(err)
    assert os.listdir(tmp_path) == ["data.jsonl"]


def test_an_adapter_of_another_model_is_refused(
    tiny_gpt2: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter, run: Run
) -> None:
    status, _, err = run("run", tiny_llama_bundle, "hi", "--adapter", make_adapter(tiny_gpt2))
    assert status == 2
    assert "is not a target module of this bundle" in one_line(err)


@pytest.mark.parametrize("suffix", [".onnx", ".onnx_adapter", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x08", b"not what its name says" * 9])
def test_inspect_reports_that_a_file_is_not_of_the_type_of_its_name(
    suffix: str, content: bytes, tmp_path: Path, run: Run
) -> None:
    file = tmp_path / f"broken{suffix}"
    file.write_bytes(content)
    status, out, err = run("inspect", file)
    assert (status, out) == (2, "")
    assert file.name in one_line(err)


def test_convert_does_not_replace_other_directories(
    adapter: Path, tiny_llama_bundle: Path, tmp_path: Path, run: Run
) -> None:
    native, thesis = tmp_path / "a.onnx_adapter", tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.txt").write_text("years of work")
    assert run("convert", adapter, "--bundle", tiny_llama_bundle, "--output", native)[0] == 0
    status, _, err = run("convert", native, "--bundle", tiny_llama_bundle, "--output", thesis)
    assert status == 2
    assert "choose another directory" in one_line(err)
    assert os.listdir(thesis) == ["thesis.txt"]


@pytest.mark.parametrize("suffix", [".onnx_adapter", ".json", ".xml", ".md", ".html"])
def test_no_command_replaces_a_file_of_another_kind(
    suffix: str, adapter: Path, tiny_llama_bundle: Path, tmp_path: Path, run: Run
) -> None:
    thesis = (tmp_path / "thesis").with_suffix(suffix)
    thesis.write_text("years of work")
    if suffix == ".onnx_adapter":
        said = run("convert", adapter, "--bundle", tiny_llama_bundle, "--output", thesis)
    else:
        said = run("parity", tiny_llama_bundle, "--report", thesis)
    assert said[0] == 2
    assert f"{thesis} exists and is not an" in one_line(said[2])
    assert thesis.read_text() == "years of work"


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", ""],
        ["run", "", "hi"],
        ["run", "{bundle}", "--input", ""],
        ["convert", "{adapter}", "--rank", "1", "--output", ""],
        ["export", "--model", "", "--output", "{tmp}/o"],
        ["export", "--model", "{bundle}", "--output", "", "--adapter", "{adapter}", "--merge"],
        ["export", "--model", "{bundle}", "--output", "{tmp}/o", "--adapter", ""],
        ["export", "--model", "{bundle}", "--output", "{tmp}/o", "--adapter", "name="],
        ["train", "--model", "", "--data", "x", "--output", "{tmp}/o"],
        ["parity", "{bundle}", "--model", ""],
        ["bench", ""],
        ["serve", ""],
    ],
)
def test_an_empty_path_is_not_the_current_directory(
    arguments: list[str],
    adapter: Path,
    tiny_llama_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    places = {"tmp": tmp_path, "bundle": tiny_llama_bundle, "adapter": adapter}
    status, out, err = run(*(argument.format(**places) for argument in arguments))
    assert (status, out) == (2, "")
    assert re.search("the path is empty|is empty: give a path|names no directory", one_line(err))
    assert sorted(os.listdir(tmp_path)) == ["adapter", "here"]
    assert os.listdir(tmp_path / "here") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "{loop}"],
        ["run", "{loop}", "hi"],
        ["run", "{bundle}", "hi", "--adapter", "{loop}"],
        ["convert", "{loop}", "--rank", "1", "--output", "{tmp}/o"],
        ["convert", "{adapter}", "--rank", "1", "--output", "{loop}"],
        ["convert", "{adapter}", "--bundle", "{bundle}", "--output", "{loop}/a.onnx_adapter"],
        ["export", "--model", "{loop}", "--output", "{tmp}/o"],
        ["export", "--model", "{bundle}", "--output", "{tmp}/o", "--adapter", "{loop}"],
        ["export", "--model", "~nobody-of-this-name/x", "--output", "{tmp}/o"],
        ["parity", "{bundle}", "--report", "{loop}.json"],
    ],
)
def test_a_path_that_leads_nowhere_is_one_line(
    arguments: list[str], adapter: Path, tiny_llama_bundle: Path, tmp_path: Path, run: Run
) -> None:
    for name in ("loop", "loop.json"):
        (tmp_path / name).symlink_to(tmp_path / name)
    places = {
        "tmp": tmp_path,
        "bundle": tiny_llama_bundle,
        "adapter": adapter,
        "loop": tmp_path / "loop",
    }
    status, out, err = run(*(argument.format(**places) for argument in arguments))
    assert (status, out) == (2, "")
    assert one_line(err)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "loop", "loop.json"]


def test_an_onnx_adapter_for_another_bundle_is_refused(
    adapter: Path, tiny_llama_bundle: Path, tiny_gpt2_bundle: Path, tmp_path: Path, run: Run
) -> None:
    native = tmp_path / "a.onnx_adapter"
    assert run("convert", adapter, "--bundle", tiny_llama_bundle, "--output", native)[0] == 0
    status, _, err = run(
        "convert", native, "--bundle", tiny_gpt2_bundle, "--output", tmp_path / "back"
    )
    assert status == 2
    assert "does not fit this bundle" in one_line(err)
    assert not (tmp_path / "back").exists()


def test_a_graph_that_does_not_match_the_manifest_is_refused(
    tiny_llama_bundle: Path, tmp_path: Path, run: Run
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_llama_bundle, bundle)
    manifest = json.loads((bundle / "loradeploy.json").read_text())
    manifest["targets"][-1]["in_features"] += 1
    (bundle / "loradeploy.json").write_text(json.dumps(manifest))
    status, _, err = run("run", bundle, "hi")
    assert status == 2
    assert "manifest" in one_line(err)


def test_a_directory_with_other_files_is_never_replaced(
    tiny_llama: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    status, _, err = run("export", "--model", tiny_llama, "--output", tmp_path)
    assert status == 2
    assert "choose another directory" in one_line(err)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_error_of_a_long_value_has_a_limited_length(run: Run) -> None:
    status, out, err = run("run", "bundle", "--top-k", "a" * 100_000)
    assert (status, out) == (2, "")
    assert len(one_line(err)) <= 4000
