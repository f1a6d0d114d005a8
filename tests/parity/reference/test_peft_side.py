"""PEFT as an independent reference: it reads the adapter's own files, so reader bugs are found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loradeploy as ld
from loradeploy.adapter import load_adapter, save_adapter
from loradeploy.adapter.files import peft as reader
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import AdapterError
from loradeploy.parity.context import AdapterUnderTest, find_adapters
from loradeploy.parity.reference.peft import with_peft
from tests.conftest import MakeAdapter
from tests.inputs.architectures import ARCHITECTURES, make_model
from tests.parity.conftest import Check

FILES = ("adapter_config.json", "adapter_model.safetensors")
DROPPED = "model.layers.1.mlp.up_proj.lora_B.weight"
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def peft_adapter(place: Path) -> AdapterUnderTest:
    adapter = load_adapter(place)
    return AdapterUnderTest("one", place, adapter, adapter.digest)


def llama(place: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(place).eval()


@pytest.fixture
def adapter(tiny_llama: Path, make_adapter: MakeAdapter) -> Path:
    return make_adapter(tiny_llama, seed=1)


@pytest.fixture
def dropping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break loradeploy's reader: it replaces one tensor of every adapter by zeros."""
    read = reader.read_arrays

    def drop(*given: Any, **options: Any) -> Any:
        arrays, metadata = read(*given, **options)
        return {k: v * 0 if k.endswith(DROPPED) else v for k, v in arrays.items()}, metadata

    monkeypatch.setattr(reader, "read_arrays", drop)


# -- errors that a check finds ---------------------------------------------------------------------


@pytest.mark.usefixtures("dropping")
def test_a_tensor_that_the_reader_omits_fails_the_check(
    adapter: Path, tiny_llama_bundle: Path, tmp_path: Path, check: Check
) -> None:
    ld.export(tiny_llama_bundle, tmp_path / "bundle", adapters={"one": adapter})
    backends = ["peft", "torch-merged", "onnx-side-inputs", "onnx-native"]
    report = check(tmp_path / "bundle", backends=backends, phases=["prefill"], localize=False)
    assert not report.passed
    failed = {result.backend for result in report.results if result.outcome == "failed"}
    assert failed == {"peft"}  # the other backends use the broken reader too
    assert any(result.outcome == "passed" for result in report.results)


def test_a_graph_that_lacks_a_tensor_of_the_adapter_fails_the_check(
    adapter: Path, tiny_llama_bundle: Path, tmp_path: Path, check: Check
) -> None:
    less = tmp_path / "less"
    shutil.copytree(adapter, less)
    tensors = load_file(less / FILES[1])
    (key,) = (key for key in tensors if key.endswith(DROPPED))
    save_file({**tensors, key: tensors[key] * 0}, less / FILES[1], {"format": "pt"})
    ld.export(tiny_llama_bundle, tmp_path / "merged", adapters=[less], merge=True)
    options: dict[str, Any] = {"phases": ["prefill"], "localize": False}
    assert not check(tmp_path / "merged", adapters=[adapter], **options).passed
    assert check(tmp_path / "merged", adapters=[less], **options).passed


def test_peft_is_compared_unless_it_is_not_installed(
    llama_with_adapter: Path, check: Check
) -> None:
    report = check(llama_with_adapter, phases=["prefill"])
    outcomes = {r.outcome for r in report.results if r.backend == "peft"}
    assert outcomes == {"passed"}


@pytest.mark.parametrize("backends", [None, ["onnx-side-inputs", "peft"]])
def test_peft_is_not_run_on_names_that_only_loradeploy_understands(
    backends: list[str] | None,
    adapter: Path,
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    check: Check,
) -> None:
    """PEFT only warns of the factors that it misses, and computes with the base."""
    renamed = tmp_path / "renamed"
    shutil.copytree(adapter, renamed)
    tensors = load_file(renamed / FILES[1])
    changed = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    save_file(changed, renamed / FILES[1], {"format": "pt"})
    other = make_adapter(tiny_llama, seed=3)
    adapters = {"renamed": renamed, "other": other}
    options: dict[str, Any] = {"phases": ["prefill"], "localize": False, "backends": backends}
    report = check(tiny_llama_bundle, adapters=adapters, **options)
    assert report.passed, report.failures
    of_peft = {(r.adapter, r.outcome) for r in report.results if r.backend == "peft"}
    assert of_peft == {("other", "passed"), (None, "not run")}
    (reason,) = [r.message for r in report.results if r.backend == "peft" and r.adapter is None]
    assert reason is not None and reason.startswith("PEFT does not read ")


# -- which files PEFT reads ------------------------------------------------------------------------


def test_peft_reads_the_adapters_own_files_in_the_bundle(
    llama_with_adapter: Path, tiny_llama: Path, make_adapter: MakeAdapter
) -> None:
    own = make_adapter(tiny_llama, seed=1)
    for name in FILES:
        held = llama_with_adapter / "adapters" / "one" / name
        assert held.read_bytes() == (own / name).read_bytes()


def test_an_adapter_given_as_an_argument_is_read_from_its_directory(
    llama_with_adapter: Path, adapter: Path
) -> None:
    manifest = read_manifest(llama_with_adapter)
    (held,) = find_adapters(llama_with_adapter, manifest, None)
    (given,) = find_adapters(llama_with_adapter, manifest, {"one": adapter})
    assert held.path == llama_with_adapter / "adapters" / "one"
    assert given.path == adapter
    assert given.native == held.native is not None


def test_an_adapter_file_of_another_name_is_the_one_that_peft_reads(
    adapter: Path, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """The adapter_model.safetensors beside it is another adapter."""
    save_adapter(load_adapter(make_adapter(tiny_llama, seed=7)), tmp_path)
    shutil.copyfile(adapter / FILES[1], tmp_path / "best.safetensors")
    model = llama(tiny_llama)
    with with_peft(model, peft_adapter(tmp_path / "best.safetensors")):
        found = logits(model)
    with with_peft(model, peft_adapter(adapter)):
        assert torch.equal(found, logits(model))
    with with_peft(model, peft_adapter(tmp_path)):
        assert not torch.allclose(found, logits(model))


# -- the model after PEFT --------------------------------------------------------------------------


def biased(place: Path) -> None:
    """Change nothing: PEFT itself overwrites the base's biases with the adapter's."""


def with_embeddings(place: Path) -> None:
    """Add copies of the base's embedding and head to the adapter, with changed rows."""
    tensors = load_file(place / FILES[1])
    generator = torch.Generator().manual_seed(5)
    for module in ("model.embed_tokens", "lm_head"):
        values = torch.randn((512, 64), generator=generator)
        tensors[f"base_model.model.{module}.base_layer.weight"] = values
    save_file(tensors, place / FILES[1], {"format": "pt"})


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, with_embeddings),
        ({"modules_to_save": ["lm_head"]}, biased),
        ({"use_dora": True}, biased),
    ],
    ids=["embeddings", "head", "dora"],
)
def test_the_base_model_is_restored_after_peft(
    options: dict[str, Any],
    change: Callable[[Path], None],
    tiny_llama: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    place = make_adapter(tiny_llama, out=tmp_path / "adapter", **options)
    tested = peft_adapter(place)
    change(place)
    model = llama(tiny_llama)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    base = logits(model)
    with with_peft(model, tested):
        adapted = logits(model)
    import peft

    fresh = peft.PeftModel.from_pretrained(llama(tiny_llama), place).eval()
    assert torch.equal(adapted, logits(fresh))
    assert (adapted - base).abs().max() > 0.1
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], values) for name, values in before.items())
    assert torch.equal(logits(model), base)


def test_experts_that_peft_parametrizes_are_the_bases_afterwards(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """With `target_parameters`, PEFT sets each parameter of the experts to its own values."""
    place = make_model(tmp_path / "model", *ARCHITECTURES["mixtral: a mixture of experts"])
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = make_adapter(
        place, out=tmp_path / "adapter", target_modules=["q_proj"], target_parameters=names
    )
    model = llama(place)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    base = logits(model)
    with with_peft(model, peft_adapter(adapter)):
        assert (logits(model) - base).abs().max() > 0.01
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    assert torch.equal(logits(model), base)
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    with (
        pytest.raises(AdapterError, match=r"writes over the base's .*gate_up_proj"),
        with_peft(model, peft_adapter(adapter)),
        torch.no_grad(),
    ):
        experts.add_(1)


def test_a_base_model_that_was_not_restored_is_reported_by_name(
    tiny_llama: Path, adapter: Path
) -> None:
    model = llama(tiny_llama)
    with (
        pytest.raises(AdapterError, match=r"writes over the base's model\.norm\.weight"),
        with_peft(model, peft_adapter(adapter)),
        torch.no_grad(),
    ):
        model.model.norm.weight.add_(1)
