"""Triton model repositories: the declared inputs and dynamic batching give correct results."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file

import loradeploy as ld
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import UsageError
from loradeploy.export.triton import MAX_BATCH, model_config, write_repository
from tests.conftest import MakeAdapter
from tests.tolerances import tolerance

IDS = np.array([[2, 7, 9, 3], [2, 5, 3, 8]], np.int64)
FEEDS = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "token_type_ids": 0 * IDS}
NAMES = ("sport", "topic")
Arrays = Mapping[str, Any]


@pytest.fixture(scope="module")
def adapters(tiny_bert: Path, make_adapter: MakeAdapter) -> dict[str, Path]:
    made = {"task": "sequence-classification", "scale": 0.3, "r": 4}
    return {name: make_adapter(tiny_bert, seed=seed, **made) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def repository(
    tiny_bert_bundle: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A merged model, one with one slot per row, and two with adapter_ids per row."""
    place, models = tmp_path_factory.mktemp("bundles"), tmp_path_factory.mktemp("models")
    forms: dict[str, dict[str, Any]] = {
        "merged": {"adapters": {"sport": adapters["sport"]}, "merge": True},
        "rows": {"adapters": adapters, "required_inputs": True, "layout": "rows"},
        "slots": {"adapters": adapters, "required_inputs": True, "layout": "slots"},
        "calls": {"adapters": adapters, "required_inputs": True, "operator": True},
    }
    for name, form in forms.items():
        ld.export(tiny_bert_bundle, place / name, **form, triton=models)
    return models


@pytest.fixture(scope="module")
def expected(tiny_bert_bundle: Path, adapters: dict[str, Path]) -> dict[str, Any]:
    """The logits with each adapter and of the base."""
    with ld.AdapterSession(tiny_bert_bundle) as session:
        for name, path in adapters.items():
            session.load(name, path)
        found = {name: session.run(["logits"], FEEDS, name)[0] for name in NAMES}
        return {**found, "base": session.run(["logits"], FEEDS)[0]}


class Triton:
    """A simulated server that feeds the inputs of config.pbtxt and batches along the first axis."""

    def __init__(self, model: Path) -> None:
        text = (model / "config.pbtxt").read_text()
        self.max_batch = int(re.findall(r"max_batch_size: (\d+)", text)[0])
        self.dynamic = "dynamic_batching" in text
        pattern = r"input \{\n  name: \"(.*)\"\n  data_type: TYPE_(\w+)\n  dims: \[ (.*) \]"
        self.inputs = {
            name: (kind, [int(size) for size in dims.split(", ")])
            for name, kind, dims in re.findall(pattern, text)
        }
        self._graph = onnxruntime.InferenceSession(model / "1" / "model.onnx")
        assert {value.name for value in self._graph.get_inputs()} == set(self.inputs)
        assert not self._graph.get_overridable_initializers()

    def run(self, requests: Sequence[Arrays]) -> list[Any]:
        """Run requests as one batch, if the model allows batches, and return their logits."""
        assert len(requests) == 1 or (self.dynamic and self.max_batch)
        for request in requests:
            for name, (kind, dims) in self.inputs.items():
                array = request[name]
                shape = array.shape[1:] if self.max_batch else array.shape
                assert len(shape) == len(dims), name
                assert all(d in (-1, size) for d, size in zip(dims, shape, strict=True)), name
                assert array.size > 0, name
                assert kind == {"int64": "INT64", "float32": "FP32"}[array.dtype.name]
        feeds = {name: np.concatenate([one[name] for one in requests]) for name in self.inputs}
        (logits,) = self._graph.run(["logits"], feeds)
        return np.split(logits, np.cumsum([len(one["input_ids"]) for one in requests])[:-1])


def test_a_merged_model_computes_its_adapter(repository: Path, expected: dict[str, Any]) -> None:
    triton = Triton(repository / "merged")
    assert (triton.max_batch, triton.dynamic) == (MAX_BATCH, True)
    assert not (repository / "merged" / "side_inputs").exists()
    first, second = triton.run([FEEDS, {name: array[:1] for name, array in FEEDS.items()}])
    assert np.abs(first - expected["sport"]).max() <= tolerance("merged-torch")
    assert np.abs(second - expected["sport"][:1]).max() <= tolerance("merged-torch")
    assert np.abs(first - expected["base"]).max() > 0.01


def test_requests_of_different_adapters_share_a_batch_of_rows(
    repository: Path, expected: dict[str, Any]
) -> None:
    triton = Triton(repository / "rows")
    assert (triton.max_batch, triton.dynamic) == (MAX_BATCH, True)
    sides = {
        name: load_file(repository / "rows" / "side_inputs" / f"{name}.safetensors")
        for name in (*NAMES, "base")
    }
    # One slot per row: Triton batches all inputs, for requests of the same shapes.
    requests = [
        {**FEEDS, **{key: np.repeat(array, 2, axis=0) for key, array in sides[name].items()}}
        for name in NAMES
    ]
    for name, logits in zip(NAMES, triton.run(requests), strict=True):
        assert np.abs(logits - expected[name]).max() <= tolerance("rows")
    base = {key: np.repeat(array, 2, axis=0) for key, array in sides["base"].items()}
    (logits,) = triton.run([{**FEEDS, **base}])
    assert np.abs(logits - expected["base"]).max() <= tolerance("rows")
    effects = [np.abs(expected[name] - expected["base"]).max() for name in NAMES]
    assert min(effects) > 0.01


@pytest.mark.parametrize("model", ["slots", "calls"])
def test_slots_selected_by_adapter_ids_are_not_batched_by_triton(
    repository: Path, expected: dict[str, Any], model: str
) -> None:
    triton = Triton(repository / model)
    assert (triton.max_batch, triton.dynamic) == (0, False)
    sides = [
        load_file(repository / model / "side_inputs" / f"{name}.safetensors") for name in NAMES
    ]
    both = {
        key: np.concatenate([one[key] for one in sides]) for key in sides[0] if key != "adapter_ids"
    }
    (logits,) = triton.run([{**FEEDS, **both, "adapter_ids": np.array([1, 0], np.int64)}])
    assert np.abs(logits[0] - expected["topic"][0]).max() <= tolerance("rows")
    assert np.abs(logits[1] - expected["sport"][1]).max() <= tolerance("rows")


@pytest.mark.parametrize("name", ["merged", "rows", "slots"])
def test_the_config_conforms_to_tritons_schema(repository: Path, name: str) -> None:
    pytest.importorskip("tritonclient", reason="tritonclient is not installed")
    pytest.importorskip("grpc", reason="tritonclient's schema needs grpcio")
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    text = (repository / name / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert (config.name, config.backend) == (name, "onnxruntime")
    assert config.HasField("dynamic_batching") == (config.max_batch_size > 0) == (name != "slots")
    side = [one.name for one in config.input if one.name.endswith(".lora_A")]
    assert bool(side) == (name != "merged")
    assert not any(one.optional for one in config.input)  # the graph requires all of them
    types = {one.name: model_config_pb2.DataType.Name(one.data_type) for one in config.input}
    assert types["input_ids"] == "TYPE_INT64"
    assert set(types.values()) <= {"TYPE_INT64", "TYPE_FP32"}
    logits = next(one for one in config.output if one.name == "logits")
    assert list(logits.dims) == ([2] if config.max_batch_size else [-1, 2])
    assert config.parameters["loradeploy.task"].string_value == "sequence-classification"


def test_forms_that_triton_would_run_wrongly_are_refused(
    tiny_bert_bundle: Path, tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="answer as the base: give `required_inputs` or `merge`"):
        ld.export(tiny_bert_bundle, tmp_path / "b", triton=tmp_path / "models")
    with pytest.raises(UsageError, match="in place is not bound by Triton"):
        ld.export(
            tiny_llama_bundle,
            tmp_path / "b",
            triton=tmp_path / "models",
            required_inputs=True,
            attention="gqa",
        )
    assert list(tmp_path.iterdir()) == []  # before anything is written
    with pytest.raises(UsageError, match="give `required_inputs`"):
        write_repository(tiny_bert_bundle, tmp_path, read_manifest(tiny_bert_bundle))


def test_an_adapter_cannot_have_the_name_of_the_base(repository: Path, tmp_path: Path) -> None:
    bundle = next(one.parent for one in repository.parent.glob("bundles*/*/required.onnx"))
    manifest = dataclasses.replace(read_manifest(bundle), adapters={"base": {}})
    with pytest.raises(UsageError, match="an adapter is named base"):
        write_repository(bundle, tmp_path / "models", manifest)


def test_a_scale_for_all_rows_is_never_batched(repository: Path, tmp_path: Path) -> None:
    source = repository / "merged" / "1" / "model.onnx"
    bundle = next(repository.parent.glob("bundles*/merged"))
    assert "dynamic_batching" in model_config("m", source, read_manifest(bundle))
    model = onnx.load(source, load_external_data=False)
    model.graph.node.append(
        onnx.helper.make_node("DynamicQuantizeLinear", ["logits"], ["q", "scale", "zero"])
    )
    onnx.save(model, tmp_path / "model.onnx")
    text = model_config("m", tmp_path / "model.onnx", read_manifest(bundle))
    assert "max_batch_size: 0" in text
    assert "dynamic_batching" not in text


def test_a_model_is_replaced_and_others_are_kept(repository: Path, tmp_path: Path) -> None:
    bundle = next(repository.parent.glob("bundles*/merged"))
    own = tmp_path / "models" / "own"
    own.mkdir(parents=True)
    for _ in range(2):
        model = write_repository(bundle, tmp_path / "models", read_manifest(bundle))
    assert sorted(one.name for one in model.parent.iterdir()) == ["merged", "own"]
    first = {file.name: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    again = repository / "merged"
    assert first == {f.name: f.read_bytes() for f in again.rglob("*") if f.is_file()}
    (model / "mine.txt").write_text("x")
    with pytest.raises(UsageError):
        write_repository(bundle, tmp_path / "models", read_manifest(bundle))
    shutil.rmtree(model)
