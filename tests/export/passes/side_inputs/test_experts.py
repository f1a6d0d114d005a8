"""LoRA on the experts of a mixture (PEFT's `target_parameters`), every path compared with PEFT."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import loradeploy as ld
from loradeploy.adapter import AdapterConfig, load_adapter, save_adapter
from loradeploy.adapter.algebra.experts import expert_factors
from loradeploy.errors import AdapterError, AdapterMismatchError
from loradeploy.export.passes.forms.required import of_least_rank
from loradeploy.runtime.adapters.filling import Filler
from loradeploy.runtime.adapters.resident import SideInputs
from loradeploy.runtime.adapters.stacks import neutral
from tests.cli.calling import call
from tests.conftest import once
from tests.export.reference import onnx_output, token_feeds, torch_output
from tests.export.reference import session as ort
from tests.export.small import SMALL
from tests.inputs.architectures import make_model
from tests.tolerances import tolerance

IDS: Final = np.array([[5, 17, 3, 101, 5, 44, 60]])
_SMALL: Final = {**SMALL, "vocab_size": 112}
_FEW: Final = {"num_experts_per_tok": 2}
MIXTURES: Final = {
    "MixtralConfig": {**_SMALL, **_FEW, "num_local_experts": 4},
    "Qwen2MoeConfig": {
        **_SMALL,
        **_FEW,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
    "Qwen3MoeConfig": {
        **_SMALL,
        **_FEW,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "head_dim": 8,
    },
    "OlmoeConfig": {**_SMALL, **_FEW, "num_experts": 4},
    # Its expert parameters are [experts, in, out], with biases.
    "GptOssConfig": {**_SMALL, **_FEW, "num_local_experts": 4, "head_dim": 8},
}
BOTH: Final = ["experts.gate_up_proj", "experts.down_proj"]
ADAPTERS: Final[dict[str, dict[str, Any]]] = {
    "both": {"r": 3, "target_modules": ["q_proj"], "target_parameters": BOTH},
    "down": {"r": 2, "target_modules": [], "target_parameters": BOTH[1:], "lora_alpha": 5},
    # Separate linear layers in transformers 4; PEFT converts them.
    "older": {"r": 2, "target_modules": ["w1", "w2", "w3"]},
    # Includes the routers, which are no linear layers.
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "routers": {
        "target_modules": ["v_proj"],
        "target_parameters": [*BOTH, "gate.weight", "router.weight"],
        "rank_pattern": {"gate.weight": 2},
        "alpha_pattern": {"router.weight": 3, "gate": 64, "gate.weight": 5},
    },
    "patterns": {
        "target_modules": [],
        "target_parameters": BOTH,
        "rank_pattern": {"gate_up_proj": 5},
        "alpha_pattern": {"down_proj": 3},
        "use_rslora": True,
    },
}

Logits = NDArray[np.float32]


def _made(model: Path, place: Path, options: dict[str, Any]) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model)
    made = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    made.save_pretrained(place)


def _logits(model: Path, adapter: Path | None) -> Logits:
    """Return PEFT's logits."""
    return torch_output(model, IDS, adapter=adapter)


@pytest.fixture(scope="module")
def mixture(shared: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        place = shared / f"mixture-{name}"
        return once(place, lambda partial: make_model(partial, "causal-lm", name, MIXTURES[name]))

    return make


@pytest.fixture(scope="module")
def given(shared: Path) -> Callable[[Path, str], Path]:
    """A function (model, name of the adapter) → PEFT directory."""

    def make(model: Path, which: str) -> Path:
        place = shared / "experts" / f"{model.name}-{which}"
        return once(place, lambda partial: _made(model, partial, ADAPTERS[which]))

    return make


@pytest.fixture(scope="module")
def bundle(mixture: Callable[[str], Path], shared: Path) -> Path:
    """A Mixtral bundle for adapters of experts loaded later."""
    model = mixture("MixtralConfig")
    place = shared / "bundle-mixture"
    return once(place, lambda p: ld.export(model, p, side_inputs=["experts"]))


def _mixed(directory: Path, adapters: dict[str, Path]) -> dict[str | None, Logits]:
    """Return the logits of a batch with one row for the base and one for each adapter."""
    session = ld.AdapterSession(directory)
    for name, place in adapters.items():
        session.load(name, place)
    rows = [None, *adapters]
    batch = np.repeat(IDS, len(rows), axis=0)
    found = session.run(["logits"], token_feeds(ort(directory), batch), rows)[0]
    return dict(zip(rows, found[:, np.newaxis], strict=True))


def test_each_row_of_a_batch_has_the_expert_factors_of_its_adapter(
    bundle: Path, mixture: Callable[[str], Path], given: Callable[[Path, str], Path]
) -> None:
    model = mixture("MixtralConfig")
    adapters = {which: given(model, which) for which in ADAPTERS}
    found = _mixed(bundle, adapters)
    for name, logits in found.items():
        expected = _logits(model, adapters.get(name or ""))
        assert np.abs(logits - expected).max() <= tolerance("torch-onnx-tiny"), name
        assert name is None or np.abs(logits - found[None]).max() > 0.1, "it does nothing"


@pytest.mark.parametrize(
    ("version", "outputs", "refused"),
    [("0.18.1", 6, True), (None, 6, True), ("0.19.0", 6, False), ("0.18.1", 8, False)],
)
def test_expert_factors_of_ambiguous_orientation_are_refused(
    version: str | None, outputs: int, refused: bool
) -> None:
    config = AdapterConfig(r=2, extra={"peft_version": version})
    found = expert_factors(np.ones((6, 6)), np.ones((outputs, 6)), 2, config)
    assert isinstance(found, str) == refused
    assert not refused or "before 0.19 it swapped the two" in str(found)


@pytest.mark.breadth(2)
@pytest.mark.parametrize("name", [name for name in MIXTURES if name != "MixtralConfig"])
def test_every_mixture_computes_what_peft_computes(
    name: str,
    mixture: Callable[[str], Path],
    given: Callable[[Path, str], Path],
    tmp_path: Path,
) -> None:
    model = mixture(name)
    adapter = given(model, "routers")
    expected, base = _logits(model, adapter), _logits(model, None)
    ld.export(model, tmp_path / "side", adapters={"a": adapter})
    found = _mixed(tmp_path / "side", {"a": adapter})
    assert np.abs(found["a"] - expected).max() <= tolerance("torch-onnx-tiny")
    assert np.abs(found[None] - base).max() <= tolerance("torch-onnx-tiny")
    ld.export(tmp_path / "side", tmp_path / "merged", adapters={"a": adapter}, merge=True)
    merged = onnx_output(tmp_path / "merged", IDS)
    assert np.abs(merged - expected).max() <= tolerance("torch-onnx-tiny")
    assert np.abs(expected - base).max() > 0.1, "it does nothing"


# Names of transformers 4: of the module that owns the experts, and of their gate, up and down.
OLDER: Final = {
    "MixtralConfig": ("block_sparse_moe", ("w1", "w3", "w2")),
    "Qwen3MoeConfig": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


def _made_with_separate_experts(model: Path, name: str, place: Path) -> Logits:
    """Write an adapter with the keys of transformers 4; return the logits of the merged weights."""
    import torch
    from transformers import AutoModelForCausalLM

    owner, names = OLDER[name]
    rng = np.random.default_rng(3)
    merged = AutoModelForCausalLM.from_pretrained(model).eval()
    layer = merged.model.layers[0]
    fused, down = layer.mlp.experts.gate_up_proj.data, layer.mlp.experts.down_proj.data
    height, width = fused.shape[1] // 2, fused.shape[2]
    tensors = {}

    def factors(key: str, weight: torch.Tensor, scaling: float) -> None:
        A = rng.standard_normal((2, weight.shape[1])).astype(np.float32) * 0.2
        B = rng.standard_normal((weight.shape[0], 2)).astype(np.float32) * 0.2
        tensors[f"base_model.model.model.layers.0.{key}.lora_A.weight"] = A
        tensors[f"base_model.model.model.layers.0.{key}.lora_B.weight"] = B
        weight += torch.from_numpy(scaling * (B @ A))

    factors("self_attn.q_proj", layer.self_attn.q_proj.weight.data, 3.0)
    for expert in range(len(fused)):
        inside = f"{owner}.experts.{expert}"
        assert fused[expert, :height].shape == (height, width)
        factors(f"{inside}.{names[0]}", fused[expert, :height], 3.0)
        factors(f"{inside}.{names[1]}", fused[expert, height:], 1.5)
        factors(f"{inside}.{names[2]}", down[expert], 3.0)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6}
    config |= {"target_modules": ["q_proj", *names], "alpha_pattern": {names[1]: 3}}
    place.mkdir(parents=True)
    (place / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, place / "adapter_model.safetensors")
    with torch.no_grad():
        logits: Logits = merged(torch.from_numpy(IDS)).logits.numpy()
    return logits


@pytest.mark.parametrize("name", OLDER)
def test_separate_experts_of_transformers_4_are_joined(
    name: str, mixture: Callable[[str], Path], tmp_path: Path
) -> None:
    model = mixture(name)
    expected = _made_with_separate_experts(model, name, tmp_path / "a")
    base = _logits(model, None)
    assert np.abs(expected - base).max() > 0.1, "it does nothing"
    ld.export(model, tmp_path / "side", adapters={"a": tmp_path / "a"})
    found = _mixed(tmp_path / "side", {"later": tmp_path / "a"})
    assert np.abs(found["later"] - expected).max() <= tolerance("torch-onnx-tiny")
    assert np.abs(found[None] - base).max() <= tolerance("torch-onnx-tiny")
    ld.export(model, tmp_path / "merged", adapters={"a": tmp_path / "a"}, merge=True)
    merged = onnx_output(tmp_path / "merged", IDS)
    assert np.abs(merged - expected).max() <= tolerance("torch-onnx-tiny")
    report = ld.parity(
        tmp_path / "side", model=model, tokens=2, backends=["onnx-side-inputs", "onnx-merged"]
    )
    assert report.passed, report.failures
    # Only some of the experts: the base has one parameter of all of them.
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    left = {key: values for key, values in tensors.items() if ".experts.2." not in key}
    save_file(left, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(AdapterMismatchError, match="factors of some of them only: merge it"):
        ld.export(model, tmp_path / "other", adapters={"a": tmp_path / "a"})


def test_merges_into_a_bundle_and_native_adapters_compute_what_peft_computes(
    bundle: Path,
    mixture: Callable[[str], Path],
    given: Callable[[Path, str], Path],
    tmp_path: Path,
) -> None:
    model = mixture("MixtralConfig")
    adapter = given(model, "patterns")
    expected = _logits(model, adapter)
    ld.export(bundle, tmp_path / "merged", adapters={"a": adapter}, merge=True)
    merged = onnx_output(tmp_path / "merged", IDS)
    assert np.abs(merged - expected).max() <= tolerance("torch-onnx-tiny")
    native, back = tmp_path / "a.onnx_adapter", tmp_path / "back"
    call("convert", adapter, "--bundle", bundle, "--output", native)
    call("convert", native, "--bundle", bundle, "--output", back)
    assert np.abs(_logits(model, back) - expected).max() <= tolerance("torch-onnx-tiny")
    facts = json.loads(call("inspect", adapter, "--json"))
    assert facts["layers"] == ["experts"]
    assert "experts" in json.loads(call("inspect", bundle, "--json"))["side_inputs"]


def test_every_rank_index_of_the_side_inputs_covers_all_experts(bundle: Path) -> None:
    manifest = ld.AdapterSession(bundle).manifest
    six = dataclasses.replace(
        manifest,
        targets=tuple(
            dataclasses.replace(t, experts=6) if t.kind == "experts" else t
            for t in manifest.targets
        ),
    )
    ranks = Filler(six, {}).ranks((), 8)
    sides = SideInputs(six, {}, ("cpu", 0), feeds_all=True, fixed=False, ranked=False)
    neutral_values = neutral(sides).values
    zeros = {n: np.zeros((1, 3, 0)) for t in six.targets for n in t.factors if n.endswith("_A")}
    least = of_least_rank(zeros, six)
    for target in six.targets:
        experts = target.kind == "experts"
        assert ranks[target.lora_A] == (12 if experts else 8)
        assert neutral_values[target.lora_A].shape()[2] == (6 if experts else 1)
        assert neutral_values[target.lora_B].shape()[1] == (6 if experts else 1)
        assert least[target.lora_A].shape == (1, 3, 6 if experts else 1)
    assert any(target.kind == "experts" for target in six.targets)
    assert {t.rank_from(0) for t in six.targets} == {0}


def test_parity_passes_for_a_bundle_with_experts(
    bundle: Path, mixture: Callable[[str], Path], given: Callable[[Path, str], Path]
) -> None:
    model = mixture("MixtralConfig")
    report = ld.parity(
        bundle,
        model=model,
        adapters={"a": given(model, "both")},
        tokens=3,
        backends=["onnx-side-inputs", "onnx-merged"],
        certificate=False,
    )
    assert report.passed, report.failures
    assert report.adapters[0].effect > 0.1, "the adapter did nothing"


def test_an_adapter_of_experts_is_read_combined_and_written_like_peft(
    mixture: Callable[[str], Path], given: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    model = mixture("MixtralConfig")
    first, second = given(model, "both"), given(model, "routers")
    save_adapter(load_adapter(first), tmp_path / "again")
    assert np.array_equal(_logits(model, tmp_path / "again"), _logits(model, first))
    # Half plus half of an adapter is the adapter; the order of two adapters does not matter.
    save_adapter(ld.combine({second: 1.0}), tmp_path / "one")
    one = _logits(model, tmp_path / "one") - _logits(model, second)
    assert np.abs(one).max() <= tolerance("torch-onnx-tiny")
    both = ld.combine({first: 0.5, second: 0.5}, method="cat")
    parameter = "model.layers.0.mlp.experts.down_proj"
    assert both.factors[parameter].rank == 3 + 8
    with pytest.raises(AdapterError, match=r"experts, whose rank cannot be reduced"):
        ld.reduce_rank(both, 2)


def test_factors_that_fit_no_expert_of_the_base_are_refused_by_name(
    bundle: Path,
    mixture: Callable[[str], Path],
    given: Callable[[Path, str], Path],
    tiny_llama_bundle: Path,
    tmp_path: Path,
) -> None:
    model = mixture("MixtralConfig")
    adapter = given(model, "both")
    dense = ld.AdapterSession(tiny_llama_bundle)
    with pytest.raises(AdapterMismatchError, match=r"experts.* without side inputs"):
        dense.load("a", adapter)
    # Factors of another size, and factors for only one of two parameters.
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = (adapter / "adapter_config.json").read_text()
    for name, kept, problem in (
        ("half", lambda key: "base_layer" not in key, "factors of 1 parameters"),
        ("other", lambda key: "lora_B" not in key or "experts" not in key, "no lora_B"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(config)
        left = {key: values for key, values in tensors.items() if kept(key)}
        save_file(left, tmp_path / name / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=problem):
            load_adapter(tmp_path / name)
