"""DoRA, trained biases and embeddings: every path agrees, and graphs without them fail."""

from __future__ import annotations

from pathlib import Path

import pytest

import loradeploy as ld
from loradeploy.adapter.files.peft import load_adapter, save_adapter
from loradeploy.bundle.adapter_inputs.base import BundleBase
from loradeploy.bundle.adapter_inputs.native import write_onnx_adapter
from loradeploy.bundle.manifest import read_manifest
from loradeploy.lora.inject import adapted
from loradeploy.parity.checks.mistakes import MISTAKES, AdapterMistake
from loradeploy.parity.reference.rounding import DTYPES, in_dtype
from tests.conftest import MakeAdapter, once

PROMPTS = ["The capital of France is", "Hi", "Shares fell as 日本"]
# Parts that a mistake can omit, and the adapter fixture that has them.
IGNORED = [
    (mistake, "tokens" if mistake.name == "ignored tokens" else "whole")
    for mistake in MISTAKES
    if mistake.name.startswith("ignored")
]


@pytest.fixture(scope="session")
def adapter(tiny_gpt2: Path, make_adapter: MakeAdapter) -> Path:
    """A DoRA adapter with all biases and the embedding, for the tiny GPT-2."""
    return make_adapter(
        tiny_gpt2,
        use_dora=True,
        bias="all",
        scale=0.2,
        target_modules=["c_attn", "mlp.c_proj", "wte"],
    )


@pytest.fixture(scope="session")
def plain(tiny_gpt2: Path, make_adapter: MakeAdapter) -> Path:
    return make_adapter(tiny_gpt2, seed=4, target_modules=["c_attn"])


@pytest.fixture(scope="session")
def tokens(tiny_gpt2: Path, make_adapter: MakeAdapter) -> Path:
    """An adapter of two trained tokens that occur in no prompt, and of a projection."""
    indices = {"target_modules": ["c_attn"], "trainable_token_indices": [301, 17]}
    return make_adapter(tiny_gpt2, seed=5, **indices)


@pytest.fixture(scope="session")
def shared_bundle(tiny_gpt2: Path, adapter: Path, plain: Path, tokens: Path, shared: Path) -> Path:
    given = {"whole": adapter, "plain": plain, "tokens": tokens}
    return once(
        shared / "bundle-gpt2-methods", lambda place: ld.export(tiny_gpt2, place, adapters=given)
    )


@pytest.fixture
def bundle(shared_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may modify."""
    import shutil

    shutil.copytree(shared_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_every_path_agrees_and_every_mistake_is_caught(
    tiny_gpt2: Path, shared_bundle: Path
) -> None:
    report = ld.parity(
        shared_bundle,
        model=tiny_gpt2,
        prompts=PROMPTS,
        tokens=4,
        certificate=False,
        controls=True,
    )
    assert report.passed, report.failures
    paths = {result.backend for result in report.results if result.outcome == "passed"}
    assert paths == {
        "torch-merged",
        "peft",
        "onnx-merged",
        "onnx-native",
        "onnx-side-inputs",
        "onnx-mixed",
        "onnx-reference",
    }
    assert all(facts.effect > 0.1 for facts in report.adapters)
    caught = {(control.name, control.adapter) for control in report.controls if control.caught}
    assert {(mistake.name, of) for mistake, of in IGNORED} <= caught
    assert ("swapped tokens", "tokens") in caught
    assert all(control.caught for control in report.controls)
    assert not [note for note in report.notes if note.startswith("the limits are assumed")]


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("method", ["adapter", "plain", "tokens"])
def test_every_method_can_be_computed_in_the_dtypes_of_the_limits(
    method: str, dtype: str, tiny_gpt2: Path, request: pytest.FixtureRequest
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2).eval()
    ids = torch.tensor([[17, 3, 44, 9, 17, 120]])

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=ids).logits

    base = logits()
    with adapted(model, load_adapter(request.getfixturevalue(method))):
        expected = logits()
        with in_dtype(model, dtype):
            found = logits()
        assert torch.equal(logits(), expected)
    assert found.dtype == getattr(torch, dtype)
    error, effect = (found - expected).abs().max(), (expected - base).abs().max()
    assert effect > 0.1
    assert 0 < error < effect / 4, f"{error:.2g} of {effect:.2g}"


@pytest.mark.parametrize(("mistake", "of"), IGNORED, ids=[mistake.name for mistake, _ in IGNORED])
def test_a_merge_that_omits_a_part_of_the_adapter_fails(
    mistake: AdapterMistake, of: str, tiny_gpt2: Path, bundle: Path, tmp_path: Path
) -> None:
    right = bundle / "adapters" / of
    wrong = mistake.make(load_adapter(right))
    assert wrong is not None
    save_adapter(wrong, tmp_path / "wrong")
    ld.export(bundle, tmp_path / "merged", adapters={"it": tmp_path / "wrong"}, merge=True)
    report = ld.parity(
        tmp_path / "merged",
        model=tiny_gpt2,
        adapters={"it": right},
        prompts=PROMPTS,
        tokens=2,
        certificate=False,
        shrink=False,
        backends=["onnx-merged"],
    )
    outcomes = {result.outcome for result in report.results if result.phase != "repeat"}
    assert outcomes == {"failed"}


@pytest.mark.parametrize(("mistake", "of"), IGNORED, ids=[mistake.name for mistake, _ in IGNORED])
def test_side_inputs_that_omit_a_part_of_the_adapter_fail(
    mistake: AdapterMistake, of: str, tiny_gpt2: Path, bundle: Path
) -> None:
    wrong = mistake.make(load_adapter(bundle / "adapters" / of))
    assert wrong is not None
    manifest = read_manifest(bundle)
    native = bundle / "adapters" / f"{of}.onnx_adapter"
    write_onnx_adapter(wrong, manifest, native, BundleBase(bundle, manifest))
    report = ld.parity(
        bundle,
        model=tiny_gpt2,
        prompts=PROMPTS,
        tokens=2,
        certificate=False,
        shrink=False,
        backends=["onnx-native"],
    )
    held = [result for result in report.results if result.phase != "repeat"]
    outcomes = {(result.adapter, result.outcome) for result in held}
    right = {"whole", "plain", "tokens"} - {of}
    assert outcomes == {(of, "failed"), *((name, "passed") for name in right)}
