"""Localization: for any fault in a graph or an adapter, the module where it begins is named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import loradeploy as ld
from loradeploy.adapter.adapter import Adapter
from loradeploy.adapter.files.peft import load_adapter, save_adapter
from loradeploy.bundle.adapter_inputs.native import write_onnx_adapter
from loradeploy.bundle.manifest import read_manifest
from loradeploy.export.trace import load_model
from loradeploy.parity.context import CheckContext, find_adapters
from loradeploy.parity.diagnose.localize import localize
from loradeploy.parity.diagnose.torch_probe import Modules, rounded, sites_of, values_at
from loradeploy.parity.inputs.tokens import Cases
from loradeploy.parity.reference.loading import load_base
from loradeploy.parity.report.results import Localization, ParityReport
from loradeploy.parity.report.table import diagnosis_lines
from loradeploy.parity.report.writers import markdown
from tests.cli.calling import exit_status
from tests.conftest import MakeAdapter, generated_tokens
from tests.parity.spoil import Change, attribute, operator, reads, spoiled, weight

TOKENS = (5, 17, 301, 44, 260, 9, 77, 130, 12)
Locate = Callable[..., Localization]
_QKV = "model.layers.1.self_attn.q_proj+k_proj+v_proj.weight"
_BERT_QKV = "bert.encoder.layer.1.attention.self.query+key+value.weight"


@pytest.fixture
def locate(tmp_path: Path) -> Locate:
    """A function that runs `localize` on a bundle with its own adapters and additional ones."""

    def run(
        bundle: Path,
        model: Path,
        backend: str = "onnx-side-inputs",
        adapter: str | None = "one",
        *,
        adapters: dict[str, Path] | None = None,
        change: Callable[[CheckContext], CheckContext] = lambda context: context,
        tokens: tuple[int, ...] = TOKENS,
        failed: bool = True,
    ) -> Localization:
        manifest = read_manifest(bundle)
        context = CheckContext(
            bundle=bundle,
            manifest=manifest,
            model=model,
            adapters=find_adapters(bundle, manifest, adapters),
            cases=Cases((TOKENS,), 0, 0, "given"),
            scratch=tmp_path,
        )
        base = load_base(context)
        return localize(change(context), base, backend, adapter, tokens, failed=failed)

    return run


def adapter_of(name: str, model: Path, make_adapter: MakeAdapter) -> Path:
    head: dict[str, Any] = {}
    if name == "bert":
        head = {"task": "sequence-classification", "modules_to_save": ["classifier"]}
    return make_adapter(model, seed=1, **head)


def first_of(found: Localization) -> tuple[str, str]:
    assert found.first is not None, found
    return found.first.module, found.first.op


# -- something is wrong in the graph -----------------------------------------------------------

# Modules that no node computes: a constant, and an output that is computed in a submodule.
WITHOUT_A_NODE = {"llama": ("model.rotary_emb",), "gpt2": ("transformer",)}

WRONG: list[tuple[str, str, Change, str, str]] = [
    ("down-1", "llama", weight("model.layers.1.mlp.down_proj.weight"),
     "model.layers.1.mlp.down_proj", "MatMul"),
    ("o-0", "llama", weight("model.layers.0.self_attn.o_proj.weight", columns=slice(3, 4)),
     "model.layers.0.self_attn.o_proj", "MatMul"),
    ("packed-q", "llama", weight(_QKV, columns=slice(0, 64)),
     "model.layers.1.self_attn.q_proj", "MatMul"),
    ("packed-k", "llama", weight(_QKV, columns=slice(64, 96)),
     "model.layers.1.self_attn.k_proj", "MatMul"),
    ("packed-v", "llama", weight(_QKV, columns=slice(96, 97), by=1.01),
     "model.layers.1.self_attn.v_proj", "MatMul"),
    ("norm-1", "llama", weight("model.layers.1.post_attention_layernorm.weight"),
     "model.layers.1.post_attention_layernorm", "RMSNormalization"),
    ("epsilon-0", "llama",
     attribute(reads("RMSNormalization", "0.input_layernorm.weight"), "epsilon", 1e-4),
     "model.layers.0.input_layernorm", "RMSNormalization"),
    ("attention-1", "llama", attribute(reads("Attention", "present.1.key"), "scale", 0.2),
     "model.layers.1.self_attn", "Attention"),
    ("rotary", "llama", weight("model.rotary_emb.inv_freq", by=1.1),
     "model.layers.0.self_attn", "Attention"),
    ("residual", "llama", operator(reads("Add", "layers.0.mlp.down_proj/lora_add"), "Sub"),
     "model.layers.0", "Sub"),
    ("gate", "llama", operator(reads("Mul", "layers.0.mlp.up_proj/lora_add"), "Sub"),
     "model.layers.0.mlp", "Sub"),
    ("last-norm", "llama", weight("model.norm.weight"), "model.norm", "RMSNormalization"),
    ("head", "llama", weight("lm_head.weight", columns=slice(7, 8)), "lm_head", "MatMul"),
    ("nan", "llama", weight("model.layers.1.mlp.down_proj.weight", by=np.nan),
     "model.layers.1.mlp.down_proj", "MatMul"),
    ("conv1d", "gpt2", weight("transformer.h.1.mlp.c_proj.weight"),
     "transformer.h.1.mlp.c_proj", "MatMul"),
    ("bias", "gpt2", weight("transformer.h.0.attn.c_attn.bias", plus=0.1),
     "transformer.h.0.attn.c_attn", "MatMul"),
    ("positions", "gpt2", weight("transformer.wpe.weight"), "transformer.wpe", "Gather"),
    ("tied", "gpt2", weight("transformer.wte.weight"), "transformer.wte", "Gather"),
    ("packed-key", "bert", weight(_BERT_QKV, columns=slice(48, 96)),
     "bert.encoder.layer.1.attention.self.key", "MatMul"),
    ("layer-norm", "bert", weight("bert.encoder.layer.0.output.LayerNorm.weight"),
     "bert.encoder.layer.0.output.LayerNorm", "LayerNormalization"),
    ("pooler", "bert", weight("bert.pooler.dense.weight"), "bert.pooler.dense", "Gemm"),
    ("types", "bert", weight("bert.embeddings.token_type_embeddings.weight"),
     "bert.embeddings.token_type_embeddings", "Gather"),
]  # fmt: skip


@pytest.mark.breadth
@pytest.mark.parametrize(
    ("name", "change", "module", "op"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
def test_the_faulty_module_of_a_graph_is_named(
    name: str,
    change: Change,
    module: str,
    op: str,
    request: pytest.FixtureRequest,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    locate: Locate,
) -> None:
    model = request.getfixturevalue(f"tiny_{name}")
    bundle = spoiled(request.getfixturevalue(f"tiny_{name}_bundle"), tmp_path / "wrong", change)
    adapter = adapter_of(name, model, make_adapter)
    found = locate(bundle, model, adapters={"one": adapter})
    assert first_of(found) == (module, op)
    assert found.message is None
    assert found.offenders[0] == found.first


def test_modules_before_the_fault_agree_and_modules_after_it_are_not_blamed(
    tiny_llama: Path, tiny_llama_bundle: Path, tmp_path: Path, locate: Locate
) -> None:
    wrong = weight("model.layers.0.mlp.down_proj.weight")
    bundle = spoiled(tiny_llama_bundle, tmp_path / "wrong", wrong)
    found = locate(bundle, tiny_llama, adapter=None)
    assert found.before is not None
    assert (found.before.module, found.before.op) == ("model.layers.0.mlp", "Mul")
    assert [step.module for step in found.offenders] == ["model.layers.0.mlp.down_proj"]
    layers = {step.layer for step in found.steps if step.module.endswith("proj")}
    assert layers == {0}, "only the block that diverges is examined"


def test_two_faults_are_both_among_the_offenders(
    tiny_llama: Path, tiny_llama_bundle: Path, tmp_path: Path, locate: Locate
) -> None:
    first = weight("model.layers.0.input_layernorm.weight", columns=slice(0, 1), by=1.01)
    second = weight("model.layers.0.mlp.down_proj.weight", by=-3.0)
    one = spoiled(tiny_llama_bundle, tmp_path / "one", first)
    found = locate(spoiled(one, tmp_path / "both", second), tiny_llama, adapter=None)
    assert first_of(found)[0] == "model.layers.0.input_layernorm"
    named = {step.module for step in found.offenders}
    assert {"model.layers.0.input_layernorm", "model.layers.0.mlp.down_proj"} <= named


def test_nan_values_are_shown_in_the_heatmap(
    tiny_llama: Path, tiny_llama_bundle: Path, tmp_path: Path, locate: Locate
) -> None:
    wrong = weight("model.layers.1.mlp.down_proj.weight", by=np.inf)
    bundle = spoiled(tiny_llama_bundle, tmp_path / "wrong", wrong)
    found = locate(bundle, tiny_llama, adapter=None)
    assert first_of(found)[0] == "model.layers.1.mlp.down_proj"
    assert found.heatmap is not None
    assert found.heatmap.positions == tuple(range(len(TOKENS)))
    rows = dict(zip(found.heatmap.modules, np.array(found.heatmap.values), strict=True))
    assert list(rows) == [
        *("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"),
    ]
    assert rows["model.layers.0"].max() < 1e-5
    assert np.isnan(rows["model.layers.1"]).all()


def test_an_error_at_one_position_is_shown_at_that_position(
    tiny_gpt2: Path, tiny_gpt2_bundle: Path, tmp_path: Path, locate: Locate
) -> None:
    def change(graph: Any) -> None:
        weight("transformer.wpe.weight")(graph)
        numbers = graph.initializers["transformer.wpe.weight"].const_value.numpy()
        numbers[:6] /= 1.5  # restores all but the last three positions of the row

    bundle = spoiled(tiny_gpt2_bundle, tmp_path / "wrong", change)
    found = locate(bundle, tiny_gpt2, adapter=None)
    assert found.heatmap is not None
    row = found.heatmap.values[found.heatmap.modules.index("transformer.h.1")]
    assert max(row[:6]) < 1e-5 < 1e-3 < min(row[6:])


@pytest.mark.breadth(4)  # one in 4 still covers each model and each form
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(
    "options", [{"layout": "slots"}, {}, {"branches": True}], ids=["slots", "rows", "branches"]
)
def test_a_correct_graph_has_no_faulty_module(
    options: dict[str, Any],
    name: str,
    request: pytest.FixtureRequest,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    locate: Locate,
) -> None:
    model = request.getfixturevalue(f"tiny_{name}")
    bundle = request.getfixturevalue(f"tiny_{name}_bundle")
    adapter = adapter_of(name, model, make_adapter)
    ld.export(bundle, tmp_path / "bundle", adapters={"one": adapter}, **options)
    for backend in ("onnx-side-inputs", "onnx-native", "onnx-merged"):
        found = locate(tmp_path / "bundle", model, backend)
        assert found.first is None, backend
        assert "every module agrees" in str(found.message)
        assert found.unmatched == WITHOUT_A_NODE.get(name, ())
    assert locate(tmp_path / "bundle", model, adapter=None, failed=False).message is None


@pytest.mark.parametrize("options", [{"layout": "rows"}, {"branches": True}], ids=str)
def test_faults_are_found_in_every_layout(
    options: dict[str, Any],
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    locate: Locate,
) -> None:
    adapter = make_adapter(tiny_llama, seed=1)
    ld.export(tiny_llama_bundle, tmp_path / "bundle", adapters={"one": adapter}, **options)
    wrong = weight("model.layers.1.self_attn.o_proj.weight")
    bundle = spoiled(tmp_path / "bundle", tmp_path / "wrong", wrong)
    assert first_of(locate(bundle, tiny_llama))[0] == "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_the_rounding_of_coarser_precisions_is_not_taken_for_a_fault(
    precision: str,
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    locate: Locate,
) -> None:
    # fp16 is exported from the checkpoint; the packed precisions from the fp32 graph.
    source = tiny_llama if precision == "fp16" else tiny_llama_bundle
    adapter = make_adapter(tiny_llama, seed=1)
    place = tmp_path / "bundle"
    ld.export(source, place, adapters={"one": adapter}, precision=precision)
    backends = ("onnx-side-inputs", "onnx-native", "torch-merged")
    assert [locate(place, tiny_llama, backend).first for backend in backends] == [None] * 3
    # Rounding to 8 bits changes the tiny model's second layer by 1/20, which hides smaller faults.
    wrong = weight("model.layers.1.post_attention_layernorm.weight", by=-1.0)
    found = locate(spoiled(place, tmp_path / "wrong", wrong), tiny_llama)
    assert first_of(found)[0] == "model.layers.1.post_attention_layernorm"


# -- something is wrong in an adapter ----------------------------------------------------------

ONE_FACTOR = "model.layers.1.self_attn.v_proj"


@pytest.fixture
def bundle(
    tiny_llama: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> Path:
    """A bundle of the tiny Llama with one adapter."""
    adapter = make_adapter(tiny_llama, seed=1)
    ld.export(tiny_llama_bundle, tmp_path / "bundle", adapters={"one": adapter})
    return tmp_path / "bundle"


@pytest.fixture
def wrong(bundle: Path) -> Adapter:
    """The adapter of the bundle with one wrong factor."""
    adapter = load_adapter(bundle / "adapters/one")
    pair = adapter.factors[ONE_FACTOR]
    factors = {**adapter.factors, ONE_FACTOR: dataclasses.replace(pair, B=pair.B * 1.2)}
    return dataclasses.replace(adapter, factors=factors)


def test_a_wrong_factor_of_a_native_adapter_is_named(
    tiny_llama: Path, bundle: Path, wrong: Adapter, locate: Locate
) -> None:
    write_onnx_adapter(wrong, read_manifest(bundle), bundle / "adapters/one.onnx_adapter")
    assert first_of(locate(bundle, tiny_llama, "onnx-native"))[0] == ONE_FACTOR


def test_a_wrong_factor_in_a_merged_graph_is_named(
    tiny_llama: Path, bundle: Path, wrong: Adapter, tmp_path: Path, locate: Locate
) -> None:
    save_adapter(wrong, tmp_path / "saved")
    ld.export(bundle, tmp_path / "merged", adapters={"it": tmp_path / "saved"}, merge=True)
    right = {"it": bundle / "adapters/one"}
    found = locate(tmp_path / "merged", tiny_llama, "onnx-merged", "it", adapters=right)
    assert first_of(found) == (ONE_FACTOR, "MatMul")


def test_a_wrong_factor_in_pytorch_is_named_without_a_graph(
    tiny_llama: Path, bundle: Path, wrong: Adapter, tmp_path: Path, locate: Locate
) -> None:
    save_adapter(wrong, tmp_path / "saved")

    def other_place(context: CheckContext) -> CheckContext:
        (tested,) = context.adapters
        moved = dataclasses.replace(tested, path=tmp_path / "saved")
        return dataclasses.replace(context, adapters=(moved,))

    found = locate(bundle, tiny_llama, "peft", change=other_place)
    assert found.first is not None
    assert (found.first.module, found.first.node) == (ONE_FACTOR, "")
    assert locate(bundle, tiny_llama, "torch-merged").first is None


# -- what cannot be examined --------------------------------------------------------------------


def test_a_graph_that_cannot_be_read_is_reported(
    tiny_llama: Path, bundle: Path, locate: Locate
) -> None:
    (bundle / "model.onnx").write_bytes(b"no graph")
    found = locate(bundle, tiny_llama)
    assert (found.first, found.steps) == (None, ())
    assert str(found.message).startswith("it could not be examined: ")


def test_a_backend_that_cannot_be_probed_is_reported(
    tiny_llama: Path, bundle: Path, locate: Locate
) -> None:
    assert "of a-callable" in str(locate(bundle, tiny_llama, "a-callable").message)


def test_localization_changes_neither_the_bundle_nor_the_scratch_directory(
    tiny_llama: Path, bundle: Path, tmp_path: Path, locate: Locate
) -> None:
    def files() -> dict[Path, tuple[int, int, int]]:
        return {
            file: (file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_nlink)
            for file in tmp_path.rglob("*")
        }

    before = files()
    locate(bundle, tiny_llama)
    after = files()
    assert after.keys() == before.keys()
    assert all(after[file] == before[file] for file in before if file.is_file())


# -- PyTorch's side ----------------------------------------------------------------------------


def test_modules_that_return_the_same_tensor_are_one_site(tiny_llama: Path) -> None:
    model, _ = load_model(tiny_llama, "causal-lm")
    sites = sites_of(model, Modules.of(model), lambda: run(model))
    givers = {site.given_by for site in sites}
    assert ("model.layers.0.self_attn.o_proj", "model.layers.0.self_attn") in givers
    (block,) = (site for site in sites if site.given_by == ("model.layers.0",))
    assert block.taken_by == ("model.layers.1.input_layernorm",)


def test_perturbing_a_model_changes_it_by_its_rounding_error_and_restores_it(
    tiny_llama: Path,
) -> None:
    model, _ = load_model(tiny_llama, "causal-lm")
    modules = Modules.of(model)
    last = sites_of(model, modules, lambda: run(model))[-1:]
    (before,) = values_at(model, last, lambda: run(model))
    moved = []
    for unit in (2.0**-24, 2.0**-11):
        with rounded(model, modules, unit, 0):
            (after,) = values_at(model, last, lambda: run(model))
        moved.append(np.abs(after - before).max() / np.abs(before).max() / unit)
    assert all(1 < units < 100 for units in moved), moved
    assert np.array_equal(values_at(model, last, lambda: run(model))[0], before)


def run(model: torch.nn.Module) -> None:
    with torch.inference_mode():
        model(input_ids=torch.tensor([TOKENS]))


# -- the check ---------------------------------------------------------------------------------


@pytest.fixture
def parity(tiny_llama: Path) -> Callable[..., ParityReport]:
    def run(bundle: Path, **options: Any) -> ParityReport:
        given: dict[str, Any] = {"prompts": ["The capital of France", "Hi"], "certificate": False}
        given |= {"model": tiny_llama, "tokens": generated_tokens(bundle, 3), **options}
        return ld.parity(bundle, **given)

    return run


def test_a_check_that_fails_reports_the_faulty_module(
    bundle: Path, tmp_path: Path, parity: Callable[..., ParityReport]
) -> None:
    wrong = weight("model.layers.1.mlp.down_proj.weight")
    spoiled(bundle, tmp_path / "wrong", wrong)
    backends = ["torch-merged", "onnx-side-inputs", "onnx-native"]
    report = parity(tmp_path / "wrong", backends=backends)
    assert not report.passed
    assert [(found.backend, found.adapter) for found in report.localizations] == [
        ("onnx-side-inputs", None),
        ("onnx-side-inputs", "one"),
        ("onnx-native", "one"),
    ]
    for found in report.localizations:
        assert first_of(found) == ("model.layers.1.mlp.down_proj", "MatMul")
    named = "model.layers.1.mlp.down_proj (MatMul) is the first to diverge"
    assert all(named in line for line in diagnosis_lines(report)[:3])
    assert "**Where**" in markdown(report)
    assert json.loads(json.dumps(report.to_json()))["localizations"][0]["first"]["layer"] == 1
    never = parity(tmp_path / "wrong", backends=backends[1:2], localize=False)
    assert never.localizations == ()


def test_a_classifier_is_localized_on_the_whole_row(
    tiny_bert: Path,
    tiny_bert_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    parity: Callable[..., ParityReport],
) -> None:
    wrong = weight("bert.encoder.layer.0.intermediate.dense.bias", plus=0.5)
    bundle = spoiled(tiny_bert_bundle, tmp_path / "wrong", wrong)
    adapter = adapter_of("bert", tiny_bert, make_adapter)
    options = {"adapters": {"one": adapter}, "backends": ["onnx-native"]}
    report = parity(bundle, model=tiny_bert, optimization=["basic"], **options)
    (found,) = report.localizations
    assert first_of(found) == ("bert.encoder.layer.0.intermediate.dense", "MatMul")
    assert found.tokens > 1


def test_a_check_that_passes_is_localized_only_on_request(
    bundle: Path, parity: Callable[..., ParityReport]
) -> None:
    assert parity(bundle, backends=["onnx-native"]).localizations == ()
    report = parity(bundle, backends=["onnx-native", "onnx-side-inputs"], localize=True)
    assert [(found.backend, found.adapter) for found in report.localizations] == [
        ("onnx-side-inputs", None),
        ("onnx-side-inputs", "one"),
    ]
    assert all(found.first is None for found in report.localizations)
    assert "no single module diverges" in diagnosis_lines(report)[0]


def test_the_command_prints_the_faulty_module(
    tiny_llama: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = weight("model.layers.0.mlp.gate_proj+up_proj.weight", columns=slice(96, 192))
    spoiled(bundle, tmp_path / "wrong", wrong)
    given = [tmp_path / "wrong", "--model", tiny_llama, "--tokens", 2]
    assert exit_status("parity", *given, "--backends", "onnx-native") == 1
    named = "model.layers.0.mlp.up_proj (MatMul) is the first to diverge"
    assert named in capsys.readouterr().out
