"""Effects of a checkpoint's settings and weights on its trace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from loradeploy.errors import ExportError
from loradeploy.export.api import export
from loradeploy.export.trace import load_model, module
from tests.export.reference import difference, onnx_output, torch_output
from tests.tolerances import tolerance


@pytest.mark.parametrize(
    ("base", "task", "settings"),
    [
        ("tiny_bert", "feature-extraction", {"chunk_size_feed_forward": 3}),
        ("tiny_bert", "feature-extraction", {"return_dict": False}),
        ("tiny_llama", "causal-lm", {"return_dict": False}),
        ("tiny_llama", "causal-lm", {"use_cache": False, "output_hidden_states": True}),
    ],
)
def test_settings_that_do_not_affect_results_do_not_prevent_tracing(
    base: str, task: str, settings: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    plain = request.getfixturevalue(base)
    place = shutil.copytree(plain, tmp_path / "base")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, **settings}))
    export(place, tmp_path / "bundle", task=task)
    ids = np.arange(5, 17).reshape(2, 6)
    expected = torch_output(plain, ids, task=task)
    assert difference(onnx_output(tmp_path / "bundle", ids), expected) < tolerance(
        "torch-onnx-tiny"
    )


def test_a_graph_that_cannot_be_optimized_is_an_export_error(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Error during constant folding for node 'node_split'")

    monkeypatch.setattr(module, "tidy", fail)
    with pytest.raises(ExportError, match="cannot be optimized: Error during constant folding"):
        module.trace(load_model(tiny_llama, "causal-lm")[0], "causal-lm")


def test_a_checkpoint_whose_weights_overflow_to_nan_outputs_is_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    place = shutil.copytree(tiny_llama, tmp_path / "base")
    tensors = load_file(place / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="gives NaN as logits in PyTorch.*checkpoint are damaged"):
        export(place, tmp_path / "bundle")
