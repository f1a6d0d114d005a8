"""AdapterSession: names, adapters, inputs and bundles, and their error messages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

from loradeploy.adapter.files.peft import load_adapter, save_adapter
from loradeploy.bundle.adapter_inputs.native import write_onnx_adapter
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import (
    AdapterError,
    AdapterMismatchError,
    BundleError,
    RunError,
    UnknownAdapterError,
    UsageError,
)
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.timing import sample_feeds
from tests.cli.calling import call
from tests.conftest import MakeAdapter
from tests.inputs.edits import edited_json
from tests.runtime.feeds import feeds, logits, random_ids

IDS = random_ids(2, 6)


# -- names -------------------------------------------------------------------------------------


def test_load_returns_the_digest_listed_by_adapters(
    tiny_llama_bundle: Path, llama_adapters: dict[str, Path]
) -> None:
    session = AdapterSession(tiny_llama_bundle)
    digest = session.load("small", llama_adapters["small"])
    assert session.adapters == {"small": digest}
    assert digest == load_adapter(llama_adapters["small"]).digest


def test_an_unknown_name_is_refused_with_the_list_of_loaded_ones(
    llama_session: AdapterSession,
) -> None:
    with pytest.raises(UnknownAdapterError, match="'ghost'.*large, partial, small"):
        logits(llama_session, IDS, ["small", "ghost"])


def test_an_unloaded_name_is_unknown(llama_session: AdapterSession) -> None:
    llama_session.unload("small")
    assert "small" not in llama_session.adapters
    with pytest.raises(UnknownAdapterError, match="'small'"):
        logits(llama_session, IDS, "small")
    with pytest.raises(UnknownAdapterError, match="'small'"):
        llama_session.unload("small")


def test_loading_the_same_adapter_again_changes_nothing(
    llama_session: AdapterSession, llama_adapters: dict[str, Path]
) -> None:
    before = llama_session.adapters
    assert llama_session.load("small", llama_adapters["small"]) == before["small"]
    assert llama_session.adapters == before


def test_another_adapter_replaces_a_name_only_on_request(
    llama_session: AdapterSession, llama_adapters: dict[str, Path]
) -> None:
    old, large = logits(llama_session, IDS, "small"), logits(llama_session, IDS, "large")
    with pytest.raises(UsageError, match="another adapter is loaded as 'small'.*replace"):
        llama_session.load("small", llama_adapters["large"])
    np.testing.assert_array_equal(logits(llama_session, IDS, "small"), old)
    llama_session.load("small", llama_adapters["large"], replace=True)
    np.testing.assert_array_equal(logits(llama_session, IDS, "small"), large)


@pytest.mark.parametrize("way", ["replace", "unload and load"])
def test_a_reloaded_name_never_uses_old_factors(
    llama_session: AdapterSession, llama_adapters: dict[str, Path], way: str
) -> None:
    rows = ["small", None]
    logits(llama_session, IDS, rows)  # the stack has the old factors now
    expected = logits(llama_session, IDS, ["large", None])
    if way == "replace":
        llama_session.load("small", llama_adapters["large"], replace=True)
    else:
        llama_session.unload("small")
        llama_session.load("small", llama_adapters["large"])
    np.testing.assert_allclose(logits(llama_session, IDS, rows), expected, atol=1e-6)


def test_a_run_in_progress_ends_with_the_replaced_adapter(
    llama_session: AdapterSession, llama_adapters: dict[str, Path]
) -> None:
    batch = feeds(llama_session.manifest, IDS)
    with llama_session.hold(["small", None]) as held:
        (old,) = held.run(["logits"], batch)
        llama_session.load("small", llama_adapters["large"], replace=True)
        np.testing.assert_array_equal(held.run(["logits"], batch)[0], old)
        (new,) = llama_session.run(["logits"], batch, ["small", None])
    assert np.abs(new[0] - old[0]).max() > 0.05
    np.testing.assert_allclose(new[1], old[1], atol=1e-5)


@pytest.mark.parametrize("name", ["small", "large"])
def test_an_unload_within_a_run_is_refused_instead_of_deadlocking(
    llama_session: AdapterSession, name: str
) -> None:
    """Unloading another adapter too: two such threads would wait for each other."""
    with llama_session.hold("small"), pytest.raises(UsageError, match="in the middle of a run"):
        llama_session.unload(name)
    llama_session.unload(name)


# -- adapters of the bundle --------------------------------------------------------------------


@pytest.fixture
def full_bundle(tiny_llama: Path, llama_adapters: dict[str, Path], tmp_path: Path) -> Path:
    """A bundle with the adapter `small`, as a PEFT directory and as .onnx_adapter."""
    from loradeploy.export.api import export

    export(tiny_llama, tmp_path / "bundle", adapters={"small": llama_adapters["small"]})
    return tmp_path / "bundle"


def test_the_adapters_of_the_bundle_are_listed_and_loaded_at_first_use(
    full_bundle: Path, llama_session: AdapterSession
) -> None:
    session = AdapterSession(full_bundle)
    assert session.adapters == {"small": llama_session.adapters["small"]}
    expected = logits(llama_session, IDS, ["small", None])
    np.testing.assert_array_equal(logits(session, IDS, ["small", None]), expected)


def test_an_unloaded_adapter_of_the_bundle_can_be_loaded_again(full_bundle: Path) -> None:
    session = AdapterSession(full_bundle)
    before = session.adapters
    session.unload("small")
    assert session.adapters == {}
    with pytest.raises(UnknownAdapterError, match="'small'"):
        logits(session, IDS, "small")
    assert {"small": session.load("small")} == before == session.adapters


def test_a_name_without_a_path_must_be_an_adapter_of_the_bundle(full_bundle: Path) -> None:
    with pytest.raises(UnknownAdapterError, match="has no adapter 'ghost', it has: small"):
        AdapterSession(full_bundle).load("ghost")


def test_an_adapter_that_changed_inside_the_bundle_is_refused(
    full_bundle: Path, llama_adapters: dict[str, Path]
) -> None:
    save_adapter(load_adapter(llama_adapters["large"]), full_bundle / "adapters" / "small")
    session = AdapterSession(full_bundle)
    with pytest.raises(BundleError, match="digest has changed"):
        logits(session, IDS, "small")


def test_adapter_paths_in_a_manifest_cannot_leave_the_bundle(full_bundle: Path) -> None:
    _edit(full_bundle, lambda m: m["adapters"]["small"].update(path="../../elsewhere"))
    with pytest.raises(BundleError, match="is outside"):
        logits(AdapterSession(full_bundle), IDS, "small")


# -- formats and refusals of adapters ----------------------------------------------------------


def test_every_format_of_an_adapter_gives_the_same_results(
    tiny_llama_bundle: Path, llama_adapters: dict[str, Path], tmp_path: Path
) -> None:
    native = tmp_path / "small.onnx_adapter"
    adapter = load_adapter(llama_adapters["small"])
    write_onnx_adapter(adapter, read_manifest(tiny_llama_bundle), native)
    session = AdapterSession(tiny_llama_bundle)
    session.load("directory", llama_adapters["small"])
    session.load("file", llama_adapters["small"] / "adapter_model.safetensors")
    session.load("native", native)
    expected = logits(session, IDS, "directory")
    for name in ("file", "native"):
        np.testing.assert_array_equal(logits(session, IDS, name), expected)
    # The same adapter under a name that already has it changes nothing.
    assert session.load("directory", native) == adapter.digest


def test_the_native_file_of_the_bundle_is_its_adapter(full_bundle: Path) -> None:
    session = AdapterSession(full_bundle)
    before = session.adapters
    native = full_bundle / "adapters" / "small.onnx_adapter"
    assert session.load("small", native) == before["small"]


def _other_base(make: MakeAdapter, model: Path, gpt2: Path, tmp: Path) -> Path:
    return make(gpt2)


def _swapped(make: MakeAdapter, model: Path, gpt2: Path, tmp: Path) -> Path:
    from safetensors.numpy import load_file, save_file

    place = make(model, out=tmp / "swapped")
    tensors = load_file(place / "adapter_model.safetensors")
    swapped = {
        name.replace("lora_A", "?").replace("lora_B", "lora_A").replace("?", "lora_B"): np.array(
            values.T, order="C"
        )
        for name, values in tensors.items()
    }
    save_file(swapped, place / "adapter_model.safetensors")
    return place


def _truncated(make: MakeAdapter, model: Path, gpt2: Path, tmp: Path) -> Path:
    place = make(model, out=tmp / "truncated")
    file = place / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    return place


def _truncated_native(make: MakeAdapter, model: Path, gpt2: Path, tmp: Path) -> Path:
    file = tmp / "broken.onnx_adapter"
    file.write_bytes(b"\x18\x00\x00\x00TORT")
    return file


def _missing(make: MakeAdapter, model: Path, gpt2: Path, tmp: Path) -> Path:
    return tmp / "nowhere"


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (_other_base, AdapterMismatchError, "c_attn is not a target module"),
        (_swapped, AdapterMismatchError, r"lora_A is \[4, 96\], the base takes 64"),
        (_truncated, AdapterError, "not a valid safetensors"),
        (_truncated_native, AdapterError, "not an .onnx_adapter file"),
        (_missing, AdapterError, "does not exist"),
    ],
)
def test_a_failed_load_reports_the_reason_and_does_not_change_the_session(
    llama_session: AdapterSession,
    make_adapter: MakeAdapter,
    tiny_llama: Path,
    tiny_gpt2: Path,
    tmp_path: Path,
    broken: Callable[..., Path],
    error: type[Exception],
    message: str,
) -> None:
    before = llama_session.adapters
    numbers = logits(llama_session, IDS, ["small", None])
    place = broken(make_adapter, tiny_llama, tiny_gpt2, tmp_path)
    for name in ("new", "small"):
        with pytest.raises(error, match=message):
            llama_session.load(name, place, replace=True)
    assert llama_session.adapters == before
    np.testing.assert_array_equal(logits(llama_session, IDS, ["small", None]), numbers)


def test_a_refused_adapter_is_named_by_its_path(
    llama_session: AdapterSession, make_adapter: MakeAdapter, tiny_gpt2: Path
) -> None:
    place = make_adapter(tiny_gpt2)
    with pytest.raises(AdapterMismatchError, match=str(place)):
        llama_session.load("new", place)


def test_an_adapter_needs_a_name(
    llama_session: AdapterSession, llama_adapters: dict[str, Path]
) -> None:
    with pytest.raises(UsageError, match="needs a name"):
        llama_session.load("", llama_adapters["small"])


# -- feeds -------------------------------------------------------------------------------------


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda batch: batch.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("position_ids"), "missing position_ids; unknown none"),
        (lambda b: b.update(adapter_ids=np.zeros(1, np.int64)), "unknown adapter_ids"),
        (
            lambda b: b.update(input_ids=b["input_ids"].astype(np.float32)),
            r"input_ids is float32 \[2, 6\], the graph takes int64 \[batch, sequence\]",
        ),
        (lambda b: b.update(input_ids=b["input_ids"][0]), r"input_ids is int64 \[6\]"),
        (
            lambda b: b.update({"past_key_values.0.key": np.zeros((2, 9, 0, 16), np.float32)}),
            r"past_key_values.0.key is float32 \[2, 9, 0, 16\]",
        ),
    ],
)
def test_a_wrong_feed_is_named(
    llama_session: AdapterSession, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    batch: dict[str, Any] = feeds(llama_session.manifest, IDS)
    change(batch)
    with pytest.raises(UsageError, match=message):
        llama_session.run(None, batch, "small")


def test_feeds_in_another_byte_order_are_converted(llama_session: AdapterSession) -> None:
    given = sample_feeds(llama_session, 2, past=3, new=2)
    random = np.random.default_rng(0)
    given |= {
        name: random.standard_normal(values.shape, np.float32)
        for name, values in given.items()
        if values.dtype.kind == "f"
    }
    swapped = {
        name: values.astype(values.dtype.newbyteorder("S")) for name, values in given.items()
    }
    expected, found = (llama_session.run(["logits"], feed)[0] for feed in (given, swapped))
    np.testing.assert_array_equal(found, expected)
    blank = {name: values * (values.dtype.kind != "f") for name, values in given.items()}
    assert not np.array_equal(llama_session.run(["logits"], blank)[0], expected)


def test_an_unknown_output_is_named(llama_session: AdapterSession) -> None:
    with pytest.raises(UsageError, match="no output is named 'logit'"):
        llama_session.run(["logit"], feeds(llama_session.manifest, IDS))


@pytest.mark.parametrize("rows", [[], ["small"], ["small", None, None]])
def test_a_batch_needs_one_adapter_for_each_row(
    llama_session: AdapterSession, rows: list[str | None]
) -> None:
    with pytest.raises(UsageError, match=f"{len(rows)} adapters for a batch of 2 rows"):
        logits(llama_session, IDS, rows)


def test_a_run_that_fails_leaves_the_session_usable(llama_session: AdapterSession) -> None:
    expected = logits(llama_session, IDS, "small")
    batch = feeds(llama_session.manifest, IDS)
    wrong = np.zeros((2, 2, 0, 16))
    batch["past_key_values.1.value"] = onnxruntime.OrtValue.ortvalue_from_numpy(wrong)
    with pytest.raises(RunError):
        llama_session.run(None, batch, "small")
    np.testing.assert_array_equal(logits(llama_session, IDS, "small"), expected)


# -- bundles -----------------------------------------------------------------------------------


@pytest.fixture
def a_copy(tiny_llama_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama_bundle, tmp_path / "copy")


def _edit(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    with edited_json(bundle / "loradeploy.json") as manifest:
        change(manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["inputs"].append({"name": "magic", "dtype": "int64", "shape": []}),
            "no input magic",
        ),
        (lambda m: m["inputs"].pop(0), "graph's input input_ids is not in the manifest"),
        (
            lambda m: m["inputs"][0].update(dtype="int32"),
            r"input_ids is tensor\(int64\) \[batch, sequence\], the manifest says int32",
        ),
        (
            lambda m: m["outputs"][0].update(shape=["batch", "sequence", 7]),
            r"output logits is tensor\(float\) \[batch, kept, 512\]",
        ),
        (
            lambda m: m["targets"][-1].update(
                module="elsewhere", lora_A="elsewhere.lora_A", lora_B="elsewhere.lora_B"
            ),
            r"no side input elsewhere\.lora_A",
        ),
        (lambda m: m["targets"][-1].update(lora_A="elsewhere"), "not named after it"),
        (
            lambda m: m["targets"][-1].update(in_features=97),
            r"down_proj.lora_A is .*\[adapters, 96, .*rank\].*float32 \[adapters, 97, rank\]",
        ),
        (
            lambda m: m["targets"][0].update(in_features=65),
            r"q_proj.lora_A is .*\[adapters, 64, .*rank\].*float32 \[adapters, 65, rank\]",
        ),
        (lambda m: m.update(factor_dtype="float16"), r"lora_A is tensor\(float\).*says float16"),
        (lambda m: m.update(graph_digest="sha256:0"), "its digest has changed"),
    ],
)
def test_a_manifest_that_contradicts_the_graph_is_refused(
    a_copy: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    _edit(a_copy, change)
    with pytest.raises(BundleError, match=message):
        AdapterSession(a_copy)


def test_a_bundle_without_its_graph_is_refused(a_copy: Path) -> None:
    (a_copy / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"has no model\.onnx"):
        AdapterSession(a_copy)


def test_a_graph_that_onnxruntime_cannot_read_is_refused_in_one_line(a_copy: Path) -> None:
    (a_copy / "model.onnx").write_bytes(b"no graph at all")
    manifest = json.loads((a_copy / "loradeploy.json").read_text())
    (a_copy / "loradeploy.json").write_text(json.dumps({**manifest, "graph_digest": None}))
    with pytest.raises(BundleError, match="onnxruntime cannot open") as refusal:
        AdapterSession(a_copy)
    assert "\n" not in str(refusal.value)


def test_missing_weights_are_refused(a_copy: Path) -> None:
    (a_copy / "model.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"has no model\.onnx\.data"):
        AdapterSession(a_copy)


def test_missing_defaults_are_refused(tiny_bert_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bert_bundle, tmp_path / "copy")
    (bundle / "defaults.safetensors").unlink()
    with pytest.raises(BundleError, match=r"defaults\.safetensors does not exist"):
        AdapterSession(bundle)


def test_defaults_of_inputs_that_no_adapter_replaces_are_refused(
    tiny_bert_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_bert_bundle, tmp_path / "copy")
    module = read_manifest(bundle).targets[0]
    defaults = load_file(bundle / "defaults.safetensors")
    defaults[module.lora_A] = np.ones((1, module.in_features, 1), np.float32)
    save_file(defaults, bundle / "defaults.safetensors")
    with pytest.raises(BundleError, match=r"contains .*lora_A, which no adapter replaces"):
        AdapterSession(bundle)


def test_a_merged_bundle_runs_and_refuses_adapters(
    tiny_llama: Path, llama_adapters: dict[str, Path], tmp_path: Path, llama_session: AdapterSession
) -> None:
    from loradeploy.export.api import export

    small = llama_adapters["small"]
    export(tiny_llama, tmp_path / "merged", adapters={"small": small}, merge=True)
    merged = AdapterSession(tmp_path / "merged")
    np.testing.assert_allclose(logits(merged, IDS), logits(llama_session, IDS, "small"), atol=1e-4)
    with pytest.raises(UsageError, match="merged and takes no adapters"):
        logits(merged, IDS, "small")
    with pytest.raises(AdapterMismatchError, match="merged and takes no adapters"):
        merged.load("small", small)
    with pytest.raises(UnknownAdapterError, match="which is merged and takes none"):
        call("run", tmp_path / "merged", "One", "--adapter", "small")


# -- providers ---------------------------------------------------------------------------------


def test_a_provider_that_is_not_installed_is_refused_with_a_list_of_installed_ones(
    tiny_llama_bundle: Path,
) -> None:
    with pytest.raises(
        UsageError, match="DmlExecutionProvider.*CPUExecution.*onnxruntime-directml"
    ):
        AdapterSession(tiny_llama_bundle, ["DmlExecutionProvider", "CPUExecutionProvider"])


def test_a_session_reports_which_provider_runs_which_nodes(tiny_llama_bundle: Path) -> None:
    placement = AdapterSession(tiny_llama_bundle).placement
    assert list(placement) == ["CPUExecutionProvider"]
    assert placement["CPUExecutionProvider"]["MatMul"] > 10


def test_providers_can_be_given_in_the_session_options(tiny_llama_bundle: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.add_provider_for_devices(onnxruntime.get_ep_devices()[:1], {})
    # With `providers` too, onnxruntime would warn and ignore those of the session options.
    session = AdapterSession(tiny_llama_bundle, session_options=options)
    assert session.providers == ("CPUExecutionProvider",)
    with pytest.raises(UsageError, match="both choose execution providers"):
        AdapterSession(tiny_llama_bundle, ["cpu"], session_options=options)


def test_a_provider_can_have_options(tiny_llama_bundle: Path) -> None:
    session = AdapterSession(tiny_llama_bundle, [("CPUExecutionProvider", {})])
    assert session.providers == ("CPUExecutionProvider",)


@pytest.mark.skipif(
    Path("/dev/nvidia0").exists(), reason="needs providers that do not start: no GPU"
)
@pytest.mark.parametrize(
    ("name", "provider"),
    [("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")],
)
def test_a_provider_that_does_not_start_is_replaced_only_by_the_cpu(
    name: str,
    provider: str,
    tiny_llama_bundle: Path,
    llama_session: AdapterSession,
    llama_adapters: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    if provider not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    with pytest.raises(UsageError, match=rf"{provider} is installed but does not start here: \w"):
        AdapterSession(tiny_llama_bundle, [name])
    session = AdapterSession(tiny_llama_bundle, [name, "cpu"])
    assert session.providers == ("CPUExecutionProvider",)
    assert f"{provider} is installed but does not start here" in caplog.text
    # It runs as if opened on the CPU, even where the other provider needs another graph.
    session.load("partial", llama_adapters["partial"])
    base = logits(llama_session, IDS)
    for adapters in (None, "partial", ["partial", None]):
        expected = logits(llama_session, IDS, adapters)
        assert np.abs(logits(session, IDS, adapters) - expected).max() < 1e-5
        assert adapters is None or np.abs(expected - base).max() > 0.1


def test_opening_a_bundle_prints_nothing(
    tiny_llama_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    AdapterSession(tiny_llama_bundle)
    AdapterSession(tiny_llama_bundle, session_options=options)
    assert capfd.readouterr() == ("", "")


@pytest.mark.gpu
def test_factors_and_caches_are_in_gpu_memory(
    tiny_llama_bundle: Path, llama_adapters: dict[str, Path], llama_session: AdapterSession
) -> None:
    session = AdapterSession(tiny_llama_bundle, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    for name, path in llama_adapters.items():
        session.load(name, path)
    rows = ["small", None]
    values = session.run_with_ort_values(None, feeds(session.manifest, IDS), rows)
    assert {value.device_name() for value in values} == {"cuda"}
    np.testing.assert_allclose(values[0].numpy(), logits(llama_session, IDS, rows), atol=1e-2)
