"""Heads of several layers, classifiers on decoders, and poolers: merged and as side inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.export.api import export
from tests.conftest import MakeAdapter
from tests.export.reference import difference, factors, mixed_batch, onnx_output, torch_output
from tests.tolerances import tolerance

TASK = "sequence-classification"
_SIZES: dict[str, dict[str, Any]] = {
    "DistilBertConfig": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "LlamaConfig": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "BertConfig": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}


def _make(place: Path, config_class: str, auto: str = "AutoModelForSequenceClassification") -> Path:
    import torch
    import transformers

    tokens = {"vocab_size": 120, "bos_token_id": 1, "eos_token_id": 2}
    if config_class == "DistilBertConfig":
        tokens = {"vocab_size": 120, "pad_token_id": 0}
    config = getattr(transformers, config_class)(
        **_SIZES[config_class], **tokens, initializer_range=0.2
    )
    torch.manual_seed(0)
    getattr(transformers, auto).from_config(config).eval().save_pretrained(place)
    return place


def _agree(bundles: Path, adapter: Path, base: Any, adapted: Any, ids: Any, mask: Any) -> None:
    """Assert that the merged graph, the side inputs and a mixed batch compute what PyTorch does."""
    allowed = tolerance("torch-onnx-tiny")
    side = factors(bundles / "side", adapter)
    both = mixed_batch(bundles / "side", [{}, side], np.array([1, 0]))
    mixed = onnx_output(bundles / "side", ids, mask, side=both)
    assert difference(onnx_output(bundles / "merged", ids, mask), adapted) <= allowed
    assert difference(onnx_output(bundles / "side", ids, mask, side=side), adapted) <= allowed
    assert difference(mixed[0], adapted[0]) <= allowed
    assert difference(mixed[1], base[1]) <= allowed
    assert difference(base, adapted) > 0.05


@pytest.mark.parametrize("targets", [["q_lin", "v_lin"], r".*\.(k_lin|lin1)"])
def test_the_layers_of_a_two_layer_head_are_distinguished(
    targets: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model = _make(tmp_path / "m", "DistilBertConfig", "AutoModel")
    adapter = make_adapter(
        model,
        out=tmp_path / "a",
        task=TASK,
        num_labels=3,
        target_modules=targets,
        modules_to_save=["pre_classifier", "classifier"],
    )
    export(model, tmp_path / "side", adapters={"a": adapter})
    export(model, tmp_path / "merged", adapters={"a": adapter}, merge=True)
    ids = np.random.default_rng(0).integers(5, 110, (2, 9))
    mask = np.ones_like(ids)
    mask[0, 6:] = 0
    adapted = torch_output(model, ids, mask, task=TASK, adapter=adapter, labels=3)
    side = factors(tmp_path / "side", adapter)
    allowed = tolerance("torch-onnx-tiny")
    assert difference(onnx_output(tmp_path / "merged", ids, mask), adapted) <= allowed
    assert difference(onnx_output(tmp_path / "side", ids, mask, side=side), adapted) <= allowed
    assert {name for name in side if "classifier" in name} == {
        f"{module}.{part}"
        for module in ("classifier", "pre_classifier")
        for part in ("weight", "bias")
    }
    assert np.abs(adapted).max() > 0.05


@pytest.mark.breadth(3)
@pytest.mark.parametrize("config_class", ["LlamaConfig", "GPT2Config"])
@pytest.mark.parametrize("defined_by", ["tokenizer", "nothing"])
def test_a_classifier_on_a_decoder_pads_as_in_training_if_the_config_has_no_pad_token(
    config_class: str,
    defined_by: str,
    tiny_llama: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    import transformers

    model = _make(tmp_path / "m", config_class)
    pad = 0
    if defined_by == "tokenizer":
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
        tokenizer.pad_token = None
        tokenizer.save_pretrained(model)
        pad = tokenizer.eos_token_id
    assert json.loads((model / "config.json").read_text()).get("pad_token_id") is None
    adapter = make_adapter(model, out=tmp_path / "a", task=TASK, modules_to_save=["score"])
    export(model, tmp_path / "side", adapters={"a": adapter})
    export(model, tmp_path / "merged", adapters={"a": adapter}, merge=True)
    written = json.loads((tmp_path / "side" / "config.json").read_text())
    assert written["pad_token_id"] == pad

    ids = np.random.default_rng(0).integers(5, 110, (2, 9))
    mask = np.ones_like(ids)
    ids[0, 6:], mask[0, 6:] = pad, 0
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
    base = torch_output(model, ids, mask, task=TASK)
    adapted = torch_output(model, ids, mask, task=TASK, adapter=adapter)
    _agree(tmp_path, adapter, base, adapted, ids, mask)


def _make_without_pooler(place: Path) -> None:
    """Write an encoder to `place`/m whose checkpoint has no pooler."""
    import transformers

    whole = _make(place / "whole", "BertConfig")
    encoder = transformers.BertModel.from_pretrained(whole, add_pooling_layer=False)
    encoder.save_pretrained(place / "m")


def test_a_pooler_of_an_encoder_that_lacks_its_own_comes_with_the_adapter(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    task = "feature-extraction"
    _make_without_pooler(tmp_path)
    adapter = make_adapter(
        tmp_path / "m",
        out=tmp_path / "a",
        task=task,
        target_modules=["query", "value"],
        modules_to_save=["pooler"],
    )
    for place, merge in (("side", False), ("merged", True)):
        given = {"a": adapter}
        manifest = export(tmp_path / "m", tmp_path / place, adapters=given, merge=merge, task=task)
        outputs = [spec.name for spec in manifest.outputs]
        assert outputs == ["last_hidden_state", "pooler_output"]
    report = ld.parity(tmp_path / "side", model=tmp_path / "m", certificate=False)
    assert report.passed, report.failures


def test_a_pooler_that_the_checkpoint_lacks_comes_with_the_adapter(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _make_without_pooler(tmp_path)
    adapter = make_adapter(
        tmp_path / "m",
        out=tmp_path / "a",
        task=TASK,
        target_modules=["query", "value"],
        modules_to_save=["pooler", "classifier"],
    )
    export(tmp_path / "m", tmp_path / "side", adapters={"a": adapter})
    export(tmp_path / "m", tmp_path / "merged", adapters={"a": adapter}, merge=True)
    ids = np.random.default_rng(0).integers(5, 110, (2, 9))
    adapted = torch_output(tmp_path / "m", ids, task=TASK, adapter=adapter)
    side = factors(tmp_path / "side", adapter)
    allowed = tolerance("torch-onnx-tiny")
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} <= set(side)
    assert difference(onnx_output(tmp_path / "merged", ids), adapted) <= allowed
    assert difference(onnx_output(tmp_path / "side", ids, side=side), adapted) <= allowed
    np.testing.assert_array_equal(onnx_output(tmp_path / "side", ids), np.zeros((2, 2)))
    assert np.abs(adapted).max() > 0.05
