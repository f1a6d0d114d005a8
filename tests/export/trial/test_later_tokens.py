"""A masked language model in ONNX has the outputs of a decoder, and is not taken for one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import loradeploy as ld
from loradeploy.bundle.manifest import TensorSpec
from loradeploy.bundle.sample import Sample
from loradeploy.errors import ExportError, UsageError
from loradeploy.export.trial.padding import sees_later_tokens
from tests.bundle.manifests import a_manifest
from tests.export.others import IDS, export_as_optimum
from tests.export.reference import difference, session, token_feeds
from tests.tolerances import tolerance

CONFIG = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Return the graph of a masked language model, an adapter, and its logits with it."""
    place = tmp_path_factory.mktemp("masked")
    torch.manual_seed(0)
    config = transformers.BertConfig(**CONFIG, num_hidden_layers=1, initializer_range=0.15)
    base = transformers.AutoModelForMaskedLM.from_config(config).eval()
    base.save_pretrained(place / "model")
    export_as_optimum(place / "model", place / "graph" / "model.onnx", masked=True)
    (place / "graph" / "config.json").write_bytes((place / "model" / "config.json").read_bytes())
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query", "value"]))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(place / "a")
    with torch.no_grad():
        logits = adapted.eval()(torch.from_numpy(IDS)).logits.numpy()
    return SimpleNamespace(graph=place / "graph", adapter=place / "a", logits=logits)


@pytest.mark.parametrize("task", [None, "causal-lm"])
def test_logits_that_change_with_later_tokens_are_no_decoders(
    masked: SimpleNamespace, task: str | None, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"is no decoder: its logits change .*feature-extraction"):
        ld.export(masked.graph, tmp_path / "b", adapters={"a": masked.adapter}, task=task)
    assert not (tmp_path / "b").exists()


def test_its_logits_with_an_adapter_are_those_of_peft_as_feature_extraction(
    masked: SimpleNamespace, tmp_path: Path
) -> None:
    ld.export(
        masked.graph, tmp_path / "b", adapters={"a": masked.adapter}, task="feature-extraction"
    )
    opened = ld.AdapterSession(tmp_path / "b")
    feeds = token_feeds(session(tmp_path / "b"), IDS)
    found, base = (opened.run(["logits"], feeds, adapters=name)[0] for name in ("a", None))
    assert difference(base, masked.logits) > 0.1, "the adapter does nothing"
    assert difference(found, masked.logits) <= tolerance("torch-onnx-tiny")
    with pytest.raises(UsageError, match="is logits, not hidden states"):
        ld.TextEmbedder(opened)


@pytest.mark.parametrize(
    ("kind", "precision", "expected"),
    [
        ("causal", "fp32", False),
        ("bidirectional", "fp32", True),
        ("bidirectional", "int8", True),
        ("scaled together", "int8", False),
        ("last", "fp32", None),
    ],
)
def test_later_tokens_are_changed_in_a_trial(
    kind: str, precision: str, expected: bool | None
) -> None:
    outputs = (TensorSpec("logits", "float32", ("batch", "sequence", 2)),)
    manifest = a_manifest(outputs=outputs, targets=(), saved=(), adapters={}, precision=precision)

    def run(feeds: dict[str, Any], side_inputs: Any) -> dict[str, Any]:
        tokens = feeds["input_ids"].astype(np.float32)
        sums = tokens.cumsum(axis=1)
        if kind == "bidirectional":
            sums = np.broadcast_to(sums[:, -1:], sums.shape)
        if kind == "scaled together":  # activations are rounded in the range of all tokens
            sums = sums * (1 + tokens.max() / 5000)
        if kind == "last":
            sums = sums[:, -1:]
        return {"logits": np.stack([sums, -sums], axis=-1)}

    trial: Any = SimpleNamespace(manifest=manifest, random_side_inputs=dict, run=run)
    sample = Sample(manifest.inputs, {"vocab_size": 50}, pad=0)
    assert sees_later_tokens(trial, sample, 0) is expected
