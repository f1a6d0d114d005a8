"""Trained token rows of a base whose output head is tied to the embedding and quantized."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.adapter import Adapter, load_adapter
from loradeploy.bundle.manifest import Manifest, read_manifest
from loradeploy.errors import AdapterMismatchError
from loradeploy.parity.backends.onnx_model import NotRunError
from loradeploy.parity.backends.ort import merged_bundle
from loradeploy.parity.reference.quantized import dequantize_into, quantized_weights
from loradeploy.parity.reference.tied import with_rows_of_tied
from tests.conftest import MakeAdapter
from tests.export.small import SMALL

TOKENS = [7, 8, 9]


def make_base(place: Path, tokens: int = 64) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SMALL, vocab_size=tokens, tie_word_embeddings=True, initializer_range=0.2
    )
    LlamaForCausalLM(config).eval().save_pretrained(place)
    return place


def make_quantized(make_adapter: MakeAdapter, place: Path) -> tuple[Path, Adapter, Manifest]:
    """Return a base, an adapter of it with trained rows, and the manifest of their int4 bundle."""
    base = make_base(place / "base")
    adapter = make_adapter(base, out=place / "a", trainable_token_indices=TOKENS)
    ld.export(base, place / "bundle", adapters={"a": adapter}, precision="int4")
    return base, load_adapter(adapter), read_manifest(place / "bundle")


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_parity_compares_the_rows_of_a_quantized_head_that_is_tied(
    precision: str, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, out=tmp_path / "a", scale=0.1, trainable_token_indices=TOKENS)
    bundle = tmp_path / "bundle"
    ld.export(base, bundle, adapters={"a": adapter}, precision=precision)

    report = ld.parity(bundle, model=base, tokens=3, controls=True, certificate=False)
    assert report.passed, report.failures
    assert report.adapters[0].effect > 1, "the adapter did nothing"
    assert report.controls and all(control.caught for control in report.controls)
    skipped = {r.backend: r.message for r in report.results if r.outcome == "not run"}
    assert "replaces the trained rows of lm_head.weight" in str(skipped["peft"])
    assert "is quantized in the graph" in str(skipped["onnx-merged"])


def test_the_reference_adds_the_trained_change_to_the_rounded_rows(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    base, given, manifest = make_quantized(make_adapter, tmp_path)
    model = LlamaForCausalLM.from_pretrained(base).eval()
    dequantize_into(model, quantized_weights(tmp_path / "bundle", manifest), manifest)
    weights = {"embedding": model.model.embed_tokens.weight, "head": model.lm_head.weight}
    before = {name: weight.detach().numpy().copy() for name, weight in weights.items()}
    rounding = before["head"] - before["embedding"]
    assert np.abs(rounding[TOKENS]).max() > 1e-3, "the head is not quantized"

    (trained,) = given.rows.values()
    with with_rows_of_tied(model, given, manifest) as left:
        assert not left.rows
        inside = {name: weight.detach().numpy().copy() for name, weight in weights.items()}
    expected = {name: values.copy() for name, values in before.items()}
    expected["embedding"][TOKENS] = trained.values
    expected["head"][TOKENS] = trained.values + rounding[TOKENS]
    for name, weight in weights.items():
        np.testing.assert_array_equal(inside[name], expected[name])
        np.testing.assert_array_equal(weight.detach().numpy(), before[name])
        assert np.abs(inside[name] - before[name]).max() > 0.1


def test_only_the_trained_rows_of_the_tables_are_read(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """The difference of whole tables would be another table: gigabytes for a large vocabulary."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import LlamaForCausalLM

    base, given, manifest = make_quantized(make_adapter, tmp_path)
    model = LlamaForCausalLM.from_pretrained(base).eval()
    subtracted = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            if "sub" in str(func):
                subtracted.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Recording(), with_rows_of_tied(model, given, manifest):
        pass
    assert subtracted == [(len(TOKENS), SMALL["hidden_size"])]


def test_only_a_merge_that_the_quantized_head_bars_is_not_run(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """Any other adapter that cannot be merged is a failure, even if it has trained rows."""
    base = make_base(tmp_path / "base")
    larger = make_base(tmp_path / "larger", tokens=80)
    ld.export(base, tmp_path / "bundle", precision="int8", side_inputs=["tokens"])
    context: Any = SimpleNamespace(merged=False, bundle=tmp_path / "bundle", scratch=tmp_path)
    for model, tokens, expected in (
        (base, TOKENS, NotRunError),
        (larger, [7, 75], AdapterMismatchError),
    ):
        path = make_adapter(
            model, out=tmp_path / f"of-{model.name}", trainable_token_indices=tokens
        )
        tested: Any = SimpleNamespace(name=model.name, path=path)
        with pytest.raises(expected), merged_bundle(context, tested):
            raise AssertionError("it was merged")
