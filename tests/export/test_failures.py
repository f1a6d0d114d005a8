"""Failing exports: errors are one line, raised early, and existing files are kept."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from loradeploy.adapter import Adapter, AdapterConfig, Factors
from loradeploy.bundle.manifest import read_manifest
from loradeploy.cli.export import command
from loradeploy.errors import (
    AdapterError,
    AdapterMismatchError,
    ExportError,
    LoraDeployError,
    ModelError,
    UsageError,
)
from loradeploy.export import trace, write
from loradeploy.export.api import export
from loradeploy.export.graph.edit import constant_of, set_constant
from loradeploy.export.tasks import choose_task
from loradeploy.runtime.session import AdapterSession
from tests.conftest import ROOT, MakeAdapter
from tests.export import others
from tests.export.graphs import IN, OUT, Builder, linear, numbers
from tests.export.reference import difference
from tests.tolerances import tolerance


@pytest.fixture
def no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a model is traced: the refusals here come before that."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was traced")

    monkeypatch.setattr(trace, "trace", refuse)


def _fingerprint(directory: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()
    }


def _copy(bundle: Path, place: Path) -> Path:
    shutil.copytree(bundle, place)
    return place


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 2])
def test_merge_takes_exactly_one_adapter(
    count: int, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapters = {f"a{i}": make_adapter(tiny_llama, seed=i) for i in range(count)}
    with pytest.raises(UsageError, match=f"exactly one adapter, {count} are given"):
        export(tiny_llama, tmp_path / "b", adapters=adapters, merge=True)


def test_two_adapters_cannot_share_a_name(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama)
    with pytest.raises(UsageError, match="two adapters are named 'sport'"):
        export(tiny_llama, tmp_path / "b", adapters=[f"sport={adapter}", f"sport={adapter}"])


@pytest.mark.parametrize("name", ["../up", "", ".hidden", "a b"])
def test_the_name_of_an_adapter_must_be_a_valid_file_name(
    name: str, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a file"):
        export(tiny_llama, tmp_path / "b", adapters={name: make_adapter(tiny_llama)})


def test_a_directory_that_is_not_a_bundle_is_not_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is not empty and has no"):
        export(tiny_llama, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_a_bundle_is_replaced_only_with_permission(
    tiny_llama: Path, tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    bundle = _copy(tiny_llama_bundle, tmp_path / "b")
    with pytest.raises(UsageError, match="exists: choose another directory"):
        export(tiny_llama, bundle, overwrite=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "poetry"}, "the task 'poetry' is unknown"),
        ({"precision": "fp7"}, "`precision='fp7'`: expected one of fp32"),
    ],
)
def test_unknown_options_are_refused_by_name(
    options: dict[str, str], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(LoraDeployError, match=message):
        export(tiny_llama, tmp_path / "b", **options)


# -- models ------------------------------------------------------------------------------------


def test_a_model_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        export(tmp_path / "gone", tmp_path / "b")


def test_a_hub_model_that_cannot_be_downloaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match="nobody/nothing .* cannot be fetched from the Hugging Face"
    ):
        export("nobody/nothing", tmp_path / "b")


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(ModelError, match=r"has neither \.safetensors nor \.onnx files"):
        export(tmp_path / "m", tmp_path / "b")


def test_an_adapter_given_as_the_model_is_refused(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="is an adapter: give its base as the model"):
        export(make_adapter(tiny_llama), tmp_path / "b")


def test_a_file_that_is_not_a_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"hello, I am no protobuf")
    with pytest.raises(ModelError, match="is not a readable ONNX model"):
        export(tmp_path / "m.onnx", tmp_path / "b")


@pytest.mark.parametrize("place", ["initializer", "Constant"])
def test_sparse_weights_are_refused_by_name(place: str, tmp_path: Path) -> None:
    values = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [1.0])
    at = onnx.helper.make_tensor("at", onnx.TensorProto.INT64, [1, 2], [0, 0])
    sparse = onnx.helper.make_sparse_tensor(values, at, [6, 4])
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])]
    if place == "Constant":
        nodes.insert(0, onnx.helper.make_node("Constant", [], ["w"], sparse_value=sparse))
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", size])
        for name, size in (("x", 6), ("y", 4))
    )
    stored = [sparse] if place == "initializer" else []
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], sparse_initializer=stored)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="the weight w is stored as a sparse tensor"):
        export(tmp_path / "m.onnx", tmp_path / "b", task="feature-extraction")


@pytest.mark.parametrize("what", ["input", "output"])
def test_strings_are_refused_by_name(what: str, tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", 6])
    y = b.node("MatMul", [x, b.weight("w", 6, 4)], ["batch", "sequence", 4], module="m")
    texts = b.input("texts", ["batch"], ir.DataType.STRING)
    if what == "output":
        b.inputs.remove(texts)
        labels = ir.StringTensor([b"yes", b"no"], shape=ir.Shape([2]), name="labels")
        texts = ir.Value(name="labels", type=ir.TensorType(labels.dtype), const_value=labels)
        b.constants.append(texts)
    same = b.node("Identity", [texts], ["batch"], name="same")
    same.type = ir.TensorType(ir.DataType.STRING)
    ir.save(b.model(y, *([same] if what == "output" else [])), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=f"the {what} \\w+ of the graph is of strings"):
        export(tmp_path / "m.onnx", tmp_path / "b", task="feature-extraction")


def test_several_graphs_in_a_directory_are_refused(tmp_path: Path) -> None:
    for name in ("encoder.onnx", "decoder.onnx"):
        ir.save(linear(), tmp_path / name)
    with pytest.raises(UsageError, match=r"give one of them: decoder\.onnx, encoder\.onnx"):
        export(tmp_path, tmp_path / "b")


def test_a_graph_of_unknown_task_is_refused(tmp_path: Path) -> None:
    ir.save(linear(), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="do not show its task: give `task`"):
        export(tmp_path / "m.onnx", tmp_path / "b")


def test_logits_of_audio_are_not_a_language_models(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("input_values", ["batch", "frames", IN])
    made = b.node("MatMul", [x, b.weight("w", IN, OUT)], ["batch", "frames", OUT], module="lm_head")
    made.name = "logits"
    ir.save(b.model(made), tmp_path / "m.onnx")
    for task in (None, "causal-lm"):
        with pytest.raises(UsageError, match=r"takes no tokens, .* give `task='feature-extr"):
            export(tmp_path / "m.onnx", tmp_path / "b", task=task)
    export(tmp_path / "m.onnx", tmp_path / "b", task="feature-extraction")
    frames = numbers(2, 3, IN)
    logits = AdapterSession(tmp_path / "b").run(["logits"], {"input_values": frames})[0]
    weight = constant_of(next(value for value in b.constants if value.name == "w"))
    assert difference(logits, frames @ weight) < tolerance("torch-onnx-tiny")


def test_a_graph_with_a_weight_that_is_nan_is_refused(tmp_path: Path) -> None:
    model = linear()
    weight = next(iter(model.graph.initializers.values()))
    values = constant_of(weight).copy()
    values[0, 0] = np.nan
    set_constant(weight, values)
    ir.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"1 of the 24 values of w is NaN or infinite"):
        export(tmp_path / "m.onnx", tmp_path / "b", task="feature-extraction")


def test_the_file_of_broken_settings_is_named(tiny_bert: Path, tmp_path: Path) -> None:
    base = others.copy_of(tiny_bert, tmp_path / "base")
    (base / "generation_config.json").write_text('{"a":')
    with pytest.raises(ModelError, match=re.escape(f"{base / 'generation_config.json'} is not")):
        export(base, tmp_path / "b", task="feature-extraction")


def test_a_graph_without_a_known_module_is_refused(tmp_path: Path) -> None:
    ir.save(linear(module=None), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="no linear layer of the graph was identified"):
        export(tmp_path / "m.onnx", tmp_path / "b", task="feature-extraction")


def test_a_graph_that_already_has_side_inputs_is_refused(
    tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    graph = tiny_llama_bundle / "model.onnx"
    with pytest.raises(ExportError, match=r"already takes the side input .*lora_A"):
        export(graph, tmp_path / "b")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd"])
def test_external_data_elsewhere_is_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(96))
    model = linear()
    weight = model.graph.initializers["w"]
    weight.const_value = ir.ExternalTensor(
        location, 0, 96, ir.DataType.FLOAT, shape=ir.Shape([6, 4]), name="w"
    )
    import onnx

    onnx.save(ir.to_proto(model), tmp_path / "m" / "m.onnx")
    with pytest.raises(ModelError, match="is outside"):
        export(tmp_path / "m" / "m.onnx", tmp_path / "b", task="feature-extraction")


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"offset": -8}, "is not a readable ONNX model"),
        ({"offset": "x"}, "is not a readable ONNX model"),
        ({"offset": 8}, "is not in w.bin, which is too short"),
        ({"offset": 1 << 70}, "is not in w.bin, which is too short"),
        ({"length": -1}, "is not a readable ONNX model"),
        ({"length": 40}, "is declared to be 40 bytes long, its shape takes 96"),
        ({"location": "none.bin"}, "is not in none.bin, which is missing"),
        ({"location": "link.bin"}, "'link.bin' is outside"),
    ],
    ids=str,
)
def test_external_data_at_a_bad_place_is_refused(
    expected: dict[str, object], message: str, tmp_path: Path
) -> None:
    import onnx

    place = tmp_path / "m"
    place.mkdir()
    (place / "w.bin").write_bytes(bytes(96))
    (tmp_path / "out.bin").write_bytes(bytes(96))
    (place / "link.bin").symlink_to(tmp_path / "out.bin")
    model = ir.to_proto(linear())
    (weight,) = model.graph.initializer
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", "offset": 0, "length": 96, **expected}.items():
        weight.external_data.add(key=key, value=str(value))
    onnx.save(model, place / "m.onnx")
    with pytest.raises(ModelError, match=message):
        export(place / "m.onnx", tmp_path / "b", task="feature-extraction")


def test_external_data_that_is_too_short_is_refused(
    tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    bundle = _copy(tiny_llama_bundle, tmp_path / "b")
    os.truncate(bundle / "model.onnx.data", 1000)
    with pytest.raises(ModelError, match="too short"):
        export(bundle, tmp_path / "out")


def test_a_merged_bundle_refuses_more_adapters(
    tiny_llama: Path, make_adapter: MakeAdapter, tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama)
    export(tiny_llama_bundle, tmp_path / "m", adapters=[adapter], merge=True)
    with pytest.raises(UsageError, match="is a merged bundle"):
        export(tmp_path / "m", tmp_path / "again", adapters=[adapter], merge=True)


def test_an_incomplete_checkpoint_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(tiny_llama, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights of .*layers\.1\.mlp\.up_proj"):
        export(tmp_path / "m", tmp_path / "b")


def test_a_language_model_without_its_head_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(tiny_llama, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights of LlamaForCausalLM: lm_head\.weight"):
        export(tmp_path / "m", tmp_path / "b")


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    (tmp_path / "m" / "config.json").write_text(
        '{"architectures": ["T5ForSequenceClassification"], "is_encoder_decoder": true}'
    )
    with pytest.raises(ExportError, match="T5ForSequenceClassification is an encoder-decoder"):
        export(tmp_path / "m", tmp_path / "b")


# -- adapters ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_tracing")
def test_an_adapter_with_an_unknown_target_is_refused_before_tracing(
    tiny_llama: Path, tiny_gpt2: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_gpt2)
    for merge in (False, True):
        with pytest.raises(AdapterMismatchError, match=r"wrong: .*transformer\.h\.0\.attn"):
            export(tiny_llama, tmp_path / "b", adapters={"wrong": adapter}, merge=merge)
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("no_tracing")
def test_an_adapter_of_another_size_is_refused_before_tracing(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(make_adapter(tiny_llama), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    key = next(name for name in sorted(tensors) if name.endswith("lora_A.weight"))
    tensors[key] = np.ones((4, 99), np.float32)
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatchError, match=r"lora_A is \[4, 99\], the base takes"):
        export(tiny_llama, tmp_path / "b", adapters=[tmp_path / "a"])


@pytest.mark.usefixtures("no_tracing")
def test_an_adapter_of_another_base_is_refused_before_tracing(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    import dataclasses

    from loradeploy.adapter.files.peft import load_adapter, save_adapter

    adapter = load_adapter(make_adapter(tiny_llama))
    save_adapter(dataclasses.replace(adapter, base_digest="sha256:" + "0" * 64), tmp_path / "a")
    with pytest.raises(AdapterMismatchError, match="trained on another base"):
        export(tiny_llama, tmp_path / "b", adapters=[tmp_path / "a"])


def test_merging_an_adapter_of_another_base_into_a_bundle_is_refused(
    tiny_llama: Path, make_adapter: MakeAdapter, tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    import dataclasses

    from loradeploy.adapter.files.peft import load_adapter, save_adapter

    adapter = load_adapter(make_adapter(tiny_llama))
    save_adapter(dataclasses.replace(adapter, base_digest="sha256:" + "0" * 64), tmp_path / "a")
    with pytest.raises(AdapterMismatchError, match="trained on another base"):
        export(tiny_llama_bundle, tmp_path / "b", adapters=[tmp_path / "a"], merge=True)


@pytest.mark.usefixtures("no_tracing")
def test_heads_without_a_bias_that_differ_in_labels_are_refused(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapters = {
        f"n{count}": make_adapter(tiny_llama, task="sequence-classification", num_labels=count)
        for count in (2, 3)
    }
    with pytest.raises(UsageError, match=r"number of labels \(n2 2, n3 3\) and have no bias"):
        export(tiny_llama, tmp_path / "b", adapters=adapters)


@pytest.mark.usefixtures("no_tracing")
def test_a_broken_adapter_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="gone"):
        export(tmp_path / "nowhere", tmp_path / "b", adapters=[tmp_path / "gone"])


# -- the old bundle survives -------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_bundle(
    tiny_llama_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = _copy(tiny_llama_bundle, tmp_path / "b")
    before = _fingerprint(bundle)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write, "file_digest", full)
    with pytest.raises(ExportError, match="No space left on device: .*; nothing was changed"):
        export(tiny_llama_bundle, bundle)
    assert _fingerprint(bundle) == before
    assert os.listdir(tmp_path) == ["b"]


_LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from loradeploy.errors import ExportError
from loradeploy.export.api import export
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    export(sys.argv[1], sys.argv[2])
except ExportError as problem:
    sys.exit(f"refused: {problem}")
"""

_KILLED = """
import os, signal, sys
from loradeploy.export import write
from loradeploy.export.api import export
write.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
export(sys.argv[1], sys.argv[2])
"""

_WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "onnxscript", "peft"):
    sys.modules[name] = None
from loradeploy.export.api import export
export(sys.argv[1], sys.argv[2] + "/side", adapters={"a": sys.argv[3]})
export(sys.argv[1], sys.argv[2] + "/merged", adapters=[sys.argv[3]], merge=True)
export(sys.argv[2] + "/side", sys.argv[2] + "/slots", adapters={"a": "a"}, layout="slots")
export(sys.argv[2] + "/slots", sys.argv[2] + "/rows", adapters={"a": "a"}, layout="rows")
"""


def _python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    # -B: with a file size limit, the compiled modules would be truncated too.
    return subprocess.run(
        [sys.executable, "-B", "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="limits and signals are POSIX's")
def test_a_write_that_fails_leaves_the_old_bundle(tiny_llama_bundle: Path, tmp_path: Path) -> None:
    bundle = _copy(tiny_llama_bundle, tmp_path / "b")
    before = _fingerprint(bundle)
    done = _python(_LIMITED, tiny_llama_bundle, bundle)
    assert "refused: " in done.stderr, done.stderr
    assert "cannot be written" in done.stderr
    assert _fingerprint(bundle) == before
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.skipif(sys.platform == "win32", reason="limits and signals are POSIX's")
def test_a_killed_export_leaves_the_old_bundle(tiny_llama_bundle: Path, tmp_path: Path) -> None:
    bundle = _copy(tiny_llama_bundle, tmp_path / "b")
    before = _fingerprint(bundle)
    done = _python(_KILLED, tiny_llama_bundle, bundle)
    assert done.returncode == -signal.SIGKILL
    assert _fingerprint(bundle) == before
    export(tiny_llama_bundle, bundle)  # the next export removes the temporary files
    assert os.listdir(tmp_path) == ["b"]
    read_manifest(bundle)


@pytest.mark.skipif(sys.platform == "win32", reason="limits and signals are POSIX's")
def test_a_killed_first_export_leaves_no_half_bundle(
    tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    _python(_KILLED, tiny_llama_bundle, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_surgery_merge_and_another_layout_need_no_torch(
    tiny_llama: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    done = _python(_WITHOUT_TORCH, tiny_llama_bundle, tmp_path, make_adapter(tiny_llama))
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "side").mode == "side-inputs"
    assert read_manifest(tmp_path / "merged").mode == "merged"
    assert read_manifest(tmp_path / "slots").layout == "slots"
    assert read_manifest(tmp_path / "rows").layout == "rows"
    rows, side = ((tmp_path / name / "model.onnx").read_bytes() for name in ("rows", "side"))
    assert rows == side


# -- the command -------------------------------------------------------------------------------


def test_the_command_prints_what_it_wrote(tiny_llama_bundle: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_llama_bundle), "--output", str(tmp_path / "b")]
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"Exported {tmp_path / 'b'}\n")
    assert "side-inputs" in done.stdout
    assert done.stderr == ""


def test_quantization_does_not_change_the_logging_of_the_program(
    tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    code = "import logging, sys; from loradeploy.export.api import export; "
    code += "export(*sys.argv[1:3], precision='int4'); sys.exit(len(logging.root.handlers))"
    done = _python(code, tiny_llama_bundle, tmp_path / "b")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_prints_json(tiny_llama_bundle: Path, tmp_path: Path) -> None:
    import json

    arguments = ["--model", str(tiny_llama_bundle), "--output", str(tmp_path / "b"), "--json"]
    result = json.loads(CliRunner().invoke(command, arguments).stdout)
    assert result["targets"] == 14
    assert result["task"] == "causal-lm"


def test_help_shows_an_example() -> None:
    assert "Example: loradeploy export --model" in CliRunner().invoke(command, ["--help"]).output


def test_nodes_without_a_module_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", 6])
    known = b.node("MatMul", [x, b.weight("w", 6, 4)], ["batch", "sequence", 4], module="m")
    unknown = b.node("MatMul", [known, b.weight("v", 4, 4)], name="odd_one")
    ir.save(b.model(unknown), tmp_path / "m.onnx")
    export(tmp_path / "m.onnx", tmp_path / "b", task="feature-extraction")
    assert "left as it is, its module is not known: odd_one [4 → 4]" in caplog.text


@pytest.mark.parametrize("peft_name", ["QUESTION_ANS"])
def test_an_adapter_for_a_task_that_cannot_be_exported_is_refused_by_name(peft_name: str) -> None:
    adapter = Adapter(
        AdapterConfig(r=1, target_modules=("q",), task_type=peft_name),
        {"q": Factors(np.ones((1, 2), np.float32), np.ones((2, 1), np.float32))},
    )
    message = (
        rf"task_type is .{peft_name}., and .* BertForTokenClassification: give `task=.token-cl"
    )
    with pytest.raises(UsageError, match=message):
        choose_task({"architectures": ["BertForTokenClassification"]}, None, [adapter])
