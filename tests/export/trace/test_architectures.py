"""Exports of architectures that differ in features that matter for tracing, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loradeploy.adapter import load_adapter
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import ModelError
from loradeploy.export.api import export
from tests.conftest import MakeAdapter
from tests.export.reference import (
    difference,
    factors,
    idle,
    mixed_batch,
    onnx_output,
    torch_output,
)
from tests.inputs.architectures import ARCHITECTURES, TARGETS, make_model
from tests.tolerances import tolerance

pytestmark = pytest.mark.slow


@pytest.fixture(params=ARCHITECTURES, ids=lambda name: name.partition(":")[0])
def architecture(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    task, config_class, values = ARCHITECTURES[request.param]
    return task, make_model(tmp_path_factory.mktemp("architecture"), task, config_class, values)


@pytest.mark.breadth(6)
def test_every_path_is_the_pytorch_model(
    architecture: tuple[str, Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    task, model = architecture
    (name,) = json.loads((model / "config.json").read_text())["architectures"]
    targets = TARGETS.get(name, "all-linear")
    out = tmp_path / "a"
    adapter = make_adapter(model, out=out, task=task, scale=0.1, target_modules=targets)
    export(model, tmp_path / "side", adapters={"a": adapter})
    export(tmp_path / "side", tmp_path / "merged", adapters={"a": adapter}, merge=True)
    ids = np.random.default_rng(0).integers(5, 110, (2, 9))
    base = torch_output(model, ids, task=task)
    adapted = torch_output(model, ids, task=task, adapter=adapter)
    if task != "causal-lm":
        modules = {target.module for target in read_manifest(tmp_path / "side").targets}
        assert set(load_adapter(adapter).factors) <= modules, "a projection is no side input"
    allowed = tolerance("torch-onnx-tiny")
    side = factors(tmp_path / "side", adapter)
    assert difference(onnx_output(tmp_path / "side", ids), base) <= allowed
    assert difference(onnx_output(tmp_path / "side", ids, side=side), adapted) <= allowed
    assert difference(onnx_output(tmp_path / "merged", ids), adapted) <= allowed
    assert difference(base, adapted) > 0.1
    base_slot = idle(tmp_path / "side")  # includes the routers of mixtures, which no adapter has
    both = mixed_batch(tmp_path / "side", [base_slot, {**base_slot, **side}], np.array([1, 0]))
    mixed = onnx_output(tmp_path / "side", ids, side=both)
    assert difference(mixed[0], adapted[0]) <= allowed
    assert difference(mixed[1], base[1]) <= allowed
    # Decoders are padded on the left, encoders on the right.
    mask = np.ones_like(ids)
    mask[0, slice(0, 4) if task == "causal-lm" else slice(5, 9)] = 0
    padded, expected = (
        onnx_output(tmp_path / "side", ids, mask),
        torch_output(model, ids, mask, task=task),
    )
    real = mask.astype(bool) if padded.ndim == 3 else slice(None)
    assert difference(padded[real], expected[real]) <= allowed


@pytest.mark.parametrize(
    ("config_class", "reason"),
    [
        ("XGLMConfig", "positions by the length"),
        ("Llama4TextConfig", "complex numbers"),
        ("DeepseekV2Config", "complex numbers"),
    ],
)
def test_models_that_cannot_be_traced_are_refused_before_their_weights_are_read(
    config_class: str, reason: str, tmp_path: Path
) -> None:
    import transformers

    config = getattr(transformers, config_class)()
    config.architectures = [config_class.removesuffix("Config") + "ForCausalLM"]
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match=f"cannot be exported from a checkpoint: .*{reason}"):
        export(tmp_path, tmp_path / "bundle", task="causal-lm")
