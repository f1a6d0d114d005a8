"""`convert`: .onnx_adapter files and back, rank reduction, and conversion to standard LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from loradeploy.adapter import base_digest, load_adapter
from loradeploy.adapter.algebra.reduce import reduce_rank
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import LoraDeployError
from tests.cli.calling import call
from tests.conftest import MakeAdapter
from tests.tolerances import tolerance

if TYPE_CHECKING:
    from torch import Tensor


def logits(model: Path, adapter: Path | None, kind: str) -> Tensor:
    """Return PEFT's logits with the adapter for fixed tokens."""
    import torch
    import transformers
    from peft import PeftModel

    options = {"num_labels": 2} if kind == "AutoModelForSequenceClassification" else {}
    torch.manual_seed(0)  # for a head that the checkpoint lacks
    base = getattr(transformers, kind).from_pretrained(model, **options).eval()
    adapted = base if adapter is None else PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        found: Tensor = adapted(torch.arange(3, 15)[None]).logits
    return found


CAUSAL = "AutoModelForCausalLM"
CLASSIFIER = "AutoModelForSequenceClassification"
CASES: dict[str, tuple[str, str, dict[str, object]]] = {
    "llama": ("llama", CAUSAL, {}),
    "a rank of its own": ("llama", CAUSAL, {"rank_pattern": {"q_proj": 2, "1.mlp.up_proj": 7}}),
    "an alpha of its own": ("llama", CAUSAL, {"alpha_pattern": {"q_proj": 30}}),
    "rsLoRA": ("llama", CAUSAL, {"use_rslora": True}),
    "some modules": ("llama", CAUSAL, {"target_modules": ["q_proj", "down_proj"]}),
    "Conv1D": ("gpt2", CAUSAL, {}),
    "a head": (
        "bert",
        CLASSIFIER,
        {"task": "sequence-classification", "modules_to_save": ["classifier"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_unchanged_by_a_conversion_to_onnx_adapter_and_back(
    case: str, request: pytest.FixtureRequest, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    import torch

    name, kind, options = CASES[case]
    model: Path = request.getfixturevalue(f"tiny_{name}")
    bundle: Path = request.getfixturevalue(f"tiny_{name}_bundle")
    source = make_adapter(model, r=4, alpha=12, **options)
    native, back = tmp_path / "a.onnx_adapter", tmp_path / "back"
    call("convert", source, "--bundle", bundle, "--output", native)
    result = json.loads(call("convert", native, "--bundle", bundle, "--output", back, "--json"))
    assert result["digest"] == load_adapter(back).digest
    assert result["targets"] == len(load_adapter(source).factors)
    assert json.loads(call("inspect", native, "--json"))["kind"] == "ONNX Runtime adapter"

    before, after = logits(model, source, kind), logits(model, back, kind)
    torch.testing.assert_close(before, after, atol=1e-5, rtol=0)
    effect = (before - logits(model, None, kind)).abs().max()
    assert effect > 1e-3, f"the adapter changes {effect} at most: the test would see nothing"


def test_the_conversion_back_restores_base_and_task(
    tiny_llama: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    native, back = tmp_path / "a.onnx_adapter", tmp_path / "back"
    source = make_adapter(tiny_llama, r=4, alpha=12)
    call("convert", source, "--bundle", tiny_llama_bundle, "--output", native)
    call("convert", native, "--bundle", tiny_llama_bundle, "--output", back)
    config = load_adapter(back).config
    assert (config.r, config.lora_alpha) == (4, 4), "the scaling stays in the factors"
    assert config.task_type == "CAUSAL_LM"
    assert load_adapter(back).base_digest == read_manifest(tiny_llama_bundle).base.digest


def test_a_lower_rank_is_written_with_its_error(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    source, lower = make_adapter(tiny_llama, r=8), tmp_path / "lower"
    result = json.loads(call("convert", source, "--rank", 3, "--output", lower, "--json"))
    reduced, report = reduce_rank(load_adapter(source), 3)
    written = load_adapter(lower)
    assert {pair.rank for pair in written.factors.values()} == {3}
    assert result["digest"] == written.digest == reduced.digest
    assert result["error"] == pytest.approx(report.total)
    assert (
        result["worst_error"]
        == result["errors"][result["worst_module"]]
        == max(result["errors"].values())
    )
    assert 0 < result["error"] < 1
    message = call("convert", source, "--rank", 3, "--output", lower)
    assert f"relative error of the update: {report.total:.3g} in total" in message


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["q", "head too"])
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_an_adapter_trained_on_a_modified_base_is_converted_to_a_plain_one(
    method: str, targets: list[str], tiny_llama: Path, tmp_path: Path
) -> None:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = LoraConfig(
        r=4, target_modules=targets, init_lora_weights=method, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    trained = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        theirs = trained(torch.arange(3, 15)[None]).logits
    trained.save_pretrained(tmp_path / method)

    call("convert", tmp_path / method, "--model", tiny_llama, "--output", tmp_path / "plain")
    assert load_adapter(tmp_path / "plain").base_digest == base_digest(tiny_llama)
    plain = logits(tiny_llama, tmp_path / "plain", CAUSAL)
    torch.testing.assert_close(plain, theirs, atol=tolerance("merged-torch"), rtol=0)
    assert (theirs - logits(tiny_llama, None, CAUSAL)).abs().max() > 1e-3
    with pytest.raises(LoraDeployError, match="is for the unchanged base"):
        call("convert", tmp_path / "plain", "--model", tiny_llama, "--output", tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of `bundle`, `rank` and `model`"),
        (["--rank", "2", "--model", "m"], "give only one of `bundle`, `rank` and `model`"),
        (["--rank", "8"], "no module with a rank above 8"),
        (["--model", "nowhere/at all"], "is for the unchanged base"),
    ],
)
def test_invalid_options_are_refused(
    options: list[str], message: str, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    source = make_adapter(tiny_llama, r=8)
    with pytest.raises(LoraDeployError, match=message):
        call("convert", source, *options, "--output", tmp_path / "o")
    with pytest.raises(LoraDeployError, match="is for a bundle, give `bundle`"):
        call("convert", source, "--rank", 2, "--output", tmp_path / "o.onnx_adapter")
    assert list(tmp_path.iterdir()) == []
