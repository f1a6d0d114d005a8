"""A weight of the graph that is not the base's is found, whether or not a prompt shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import BundleError
from loradeploy.parity.checks.files.graphs import read_graphs
from loradeploy.parity.checks.files.manifest import Facts
from loradeploy.parity.checks.files.weights import differing_weights
from loradeploy.parity.context import CheckContext, find_adapters
from loradeploy.parity.inputs.tokens import Cases
from loradeploy.parity.reference.loading import load_model
from loradeploy.parity.reference.quantized import dequantize_into, quantized_weights
from tests.conftest import MakeAdapter
from tests.parity.conftest import Check
from tests.parity.spoil import spoiled, weight
from tests.parity.tampering import change_embedding

QKV = "self_attn.q_proj+k_proj+v_proj"


def found(bundle: Path, model: Path, adapters: dict[str, Path] | None = None) -> list[str]:
    """Return the messages about weights that are not the model's."""
    manifest = read_manifest(bundle)
    cases = Cases(((1,),), 0, 0, "")
    tested = find_adapters(bundle, manifest, adapters)
    context = CheckContext(bundle, manifest, model, tested, cases, bundle)
    facts = Facts(context, read_graphs(context), load_model(context))
    return [message for _, message in differing_weights(facts)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"precision": "fp16"}),
        ("llama", {"precision": "int4"}),
        ("gpt2", {}),
        ("bert", {"task": "token-classification"}),
        ("t5", {}),
        ("t5", {"precision": "fp16"}),
        ("whisper", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()) or "fp32",
)
def test_the_weights_of_a_right_bundle_are_the_bases(
    name: str, options: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(f"tiny_{name}")
    ld.export(model, tmp_path / "bundle", **options)
    assert found(tmp_path / "bundle", model) == []


def test_one_value_of_a_fused_weight_is_found_with_its_module_and_place(
    tiny_llama: Path, llama_with_adapter: Path, tmp_path: Path
) -> None:
    def change(values: Any) -> None:
        weight(f"model.layers.1.{QKV}.weight", columns=slice(70, 71), by=1.01)(values)

    bundle = spoiled(llama_with_adapter, tmp_path / "bundle", change)
    (message,) = found(bundle, tiny_llama)
    assert message.startswith("model.layers.1.self_attn.k_proj.weight [6, 0] is")


def test_the_embedding_of_a_token_in_no_prompt_fails_the_check(
    tiny_llama: Path, llama_bundle: Path, check: Check
) -> None:
    options = {"prompts": ["Hi"], "tokens": 2, "backends": ["onnx-side-inputs"]}
    assert check(llama_bundle, **options).passed
    change_embedding(llama_bundle, 500)
    report = check(llama_bundle, **options)
    (failed,) = [result for result in report.results if result.outcome == "failed"]
    assert failed.aspect == "weights"
    assert "model.embed_tokens.weight [500, 0] is -1 in the graph" in str(failed.message)


def test_the_embedding_that_a_merged_adapter_leaves_as_it_is_is_compared(
    tiny_llama: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter, bundle = make_adapter(tiny_llama), tmp_path / "merged"
    ld.export(tiny_llama_bundle, bundle, adapters=[adapter], merge=True)
    assert found(bundle, tiny_llama, {"own": adapter}) == []
    change_embedding(bundle, 500)
    (message,) = found(bundle, tiny_llama, {"own": adapter})
    assert message.startswith("model.embed_tokens.weight [500, 0] is -1")


@pytest.mark.parametrize(
    ("name", "target", "changed", "column", "place"),
    [
        ("llama", "q_proj", "self_attn.o_proj", 3, "self_attn.o_proj.weight [3, 0]"),
        ("llama", "q_proj", QKV, 70, "self_attn.k_proj.weight [6, 0]"),
        ("gpt2", "c_attn", "attn.c_proj", 3, "attn.c_proj.weight [3, 0]"),
    ],
    ids=["square", "fused", "square-Conv1D"],
)
def test_a_product_that_a_merged_adapter_leaves_as_it_is_is_compared(
    name: str,
    target: str,
    changed: str,
    column: int,
    place: str,
    make_adapter: MakeAdapter,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    model: Path = request.getfixturevalue(f"tiny_{name}")
    adapter, bundle = make_adapter(model, target_modules=[target]), tmp_path / "merged"
    ld.export(model, bundle, adapters=[adapter], merge=True)
    assert found(bundle, model, {"own": adapter}) == []
    layer = {"llama": "model.layers.1", "gpt2": "transformer.h.1"}[name]
    change = weight(f"{layer}.{changed}.weight", columns=slice(column, column + 1), by=1.01)
    wrong = spoiled(bundle, tmp_path / "wrong", change)
    (message,) = found(wrong, model, {"own": adapter})
    assert message.startswith(f"{layer}.{place} is")


@pytest.mark.parametrize("field", ["weight", "slice"])
def test_a_weight_that_the_manifest_names_wrongly_is_found(
    field: str, tiny_llama: Path, llama_bundle: Path
) -> None:
    file = llama_bundle / "loradeploy.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    targets = {target["module"]: target for target in whole["targets"]}
    keys, values = (targets[f"model.layers.0.self_attn.{m}_proj"] for m in "kv")
    keys[field], values[field] = values[field], keys[field]
    if field == "weight":
        keys[field] = "another.weight"
    file.write_text(json.dumps(whole), encoding="utf-8")
    assert found(llama_bundle, tiny_llama) != []


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_one_value_of_a_quantized_weight_that_is_not_the_bases_is_found(
    precision: str, tiny_llama: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    manifest = ld.export(tiny_llama, bundle, precision=precision)
    context = CheckContext(bundle, manifest, tiny_llama, (), Cases(((1,),), 0, 0, ""), bundle)
    model, weights = load_model(context), quantized_weights(bundle, manifest)
    dequantize_into(model, weights, manifest)
    values = weights["model.layers.1.mlp.down_proj"].values
    place = np.unravel_index(np.abs(values).argmax(), values.shape)
    values[place] *= 0.7 if precision == "int4" else 0.97
    with pytest.raises(BundleError, match="down_proj is not the base's: a value is off by"):
        dequantize_into(load_model(context), weights, manifest)
