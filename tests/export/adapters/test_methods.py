"""Every LoRA method, merged, as side inputs, and in a mixed batch, compared with PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from loradeploy.adapter.files.peft import load_adapter, save_adapter
from loradeploy.bundle.adapter_inputs.base import BundleBase
from loradeploy.bundle.adapter_inputs.factors import adapter_from_side_inputs
from loradeploy.bundle.adapter_inputs.native import read_onnx_adapter
from loradeploy.errors import AdapterError, AdapterMismatchError, BundleError, UsageError
from loradeploy.export.api import export
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter, once
from tests.export.reference import apart, difference
from tests.runtime.feeds import logits
from tests.tolerances import tolerance

CAUSAL, CLASSIFIER = "causal-lm", "sequence-classification"


@dataclass(frozen=True)
class Kind:
    """A tiny model: its task and the names of its modules."""

    task: str
    some: tuple[str, ...]
    embedding: str
    head: str


@dataclass(frozen=True)
class Method:
    """The options for PEFT, and whether side inputs support them."""

    options: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("some",)
    saved: tuple[str, ...] = ()
    side_inputs: bool = True


MODELS: Final = {
    "llama": Kind(CAUSAL, ("q_proj", "down_proj"), "embed_tokens", "lm_head"),
    "tied-llama": Kind(CAUSAL, ("q_proj", "down_proj"), "embed_tokens", "lm_head"),
    "gpt2": Kind(CAUSAL, ("c_attn", "c_fc", "mlp.c_proj"), "wte", "lm_head"),
    "bert": Kind(CLASSIFIER, ("query", "output.dense"), "word_embeddings", "classifier"),
}
METHODS: Final = {
    "dora": Method({"use_dora": True}),
    "dora on embeddings": Method({"use_dora": True}, ("some", "embedding")),
    "bias lora_only": Method({"bias": "lora_only"}),
    "bias all": Method({"bias": "all"}),
    "shifted factors": Method({"lora_bias": True, "use_rslora": True}),
    "shifted factors and bias": Method(
        {"lora_bias": True, "bias": "all", "alpha_pattern": {"c_fc": 24, "query": 24}}
    ),
    "dora and bias": Method({"use_dora": True, "bias": "all"}),
    "embedding": Method({}, ("some", "embedding")),
    "rslora and patterns": Method({"use_rslora": True, "use_dora": True, "rank_pattern": {"0": 2}}),
    "lora on the head": Method({}, ("some", "head")),
    "embedding saved": Method({}, ("some",), ("embedding",), side_inputs=False),
    "head saved": Method({}, ("some",), ("head",)),
    "head saved and targeted": Method({}, ("some", "head"), ("head",)),
}
# A Llama has no biases to train.
CASES: Final = [
    (model, method)
    for model in MODELS
    for method in METHODS
    if not ("llama" in model and "bias" in method)
    and not (model == "bert" and method in ("lora on the head", "head saved and targeted"))
]


def _make(name: str, place: Path) -> Path:
    import torch
    import transformers

    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 512}
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model: Any
    if name == "gpt2":
        config: Any = transformers.GPT2Config(
            n_embd=32, n_layer=1, n_head=4, n_positions=64, initializer_range=0.2, **tokens
        )
        model = transformers.GPT2LMHeadModel(config)
    elif name == "bert":
        config = transformers.BertConfig(num_labels=3, **small, **tokens)
        model = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.LlamaConfig(tie_word_embeddings=name[:4] == "tied", **small, **tokens)
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():  # the biases of a new model are zero
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.eval().save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def models(shared: Path) -> Any:
    return lambda name: once(shared / f"methods-{name}", lambda place: _make(name, place))


def _adapter(make: MakeAdapter, name: str, model: Path, method: Method, seed: int = 3) -> Path:
    kind = MODELS[name]
    named = {"embedding": kind.embedding, "head": kind.head}
    targets = [n for target in method.targets for n in _names(kind, named, target)]
    saved = [named[part] for part in method.saved] or None
    return make(
        model,
        seed=seed,
        task=kind.task,
        num_labels=3,
        scale=0.2,
        target_modules=targets,
        modules_to_save=saved,
        **method.options,
    )


def _names(kind: Kind, named: Mapping[str, str], target: str) -> tuple[str, ...]:
    return kind.some if target == "some" else (named[target],)


def _ids(rows: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(5, 510, (rows, 7))


def _expected(name: str, model: Path, adapter: Path | None, ids: Any) -> NDArray[Any]:
    """Return PEFT's logits."""
    import peft
    import torch
    import transformers

    kind = MODELS[name]
    auto = (
        transformers.AutoModelForCausalLM
        if kind.task == CAUSAL
        else transformers.AutoModelForSequenceClassification
    )
    held = auto.from_pretrained(model, dtype=torch.float32).eval()
    if adapter is not None:
        held = peft.PeftModel.from_pretrained(held, adapter).eval()
    with torch.no_grad():
        result: NDArray[Any] = held(input_ids=torch.from_numpy(ids)).logits.numpy()
    return result


@pytest.mark.breadth(5)
@pytest.mark.parametrize(("name", "method"), CASES, ids=lambda part: part)
def test_a_method_computes_what_peft_computes_in_every_mode(
    name: str, method: str, models: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model, row = models(name), METHODS[method]
    task = MODELS[name].task
    adapter = _adapter(make_adapter, name, model, row)
    ids = _ids(3)
    allowed = tolerance("torch-onnx-tiny")
    base, adapted = (_expected(name, model, a, ids) for a in (None, adapter))
    assert difference(base, adapted) > 0.05, "the adapter changes nothing"

    export(model, tmp_path / "merged", adapters={"a": adapter}, merge=True, task=task)
    merged = logits(AdapterSession(tmp_path / "merged"), ids)
    assert difference(merged, adapted) <= allowed
    if not row.side_inputs:
        with pytest.raises(AdapterMismatchError, match=r"modules_to_save.* merge it instead"):
            export(model, tmp_path / "side", adapters={"a": adapter}, task=task)
        return

    plain = _adapter(make_adapter, name, model, Method(saved=row.saved), seed=5)
    other = _expected(name, model, plain, ids)
    export(model, tmp_path / "side", adapters={"a": adapter, "plain": plain}, task=task)
    session = AdapterSession(tmp_path / "side")
    assert difference(logits(session, ids), base) <= allowed
    assert difference(logits(session, ids, "a"), adapted) <= allowed
    mixed = logits(session, ids, ["a", "plain", None])
    for place, wanted in enumerate((adapted, other, base)):
        assert difference(mixed[place], wanted[place]) <= allowed, f"row {place}"
    session.load("native", tmp_path / "side" / "adapters" / "a.onnx_adapter")
    assert difference(logits(session, ids, "native"), adapted) <= allowed
    # A bundle can be exported again: its side inputs are removed and the adapter is merged.
    export(tmp_path / "side", tmp_path / "again", adapters={"a": adapter}, merge=True)
    again = AdapterSession(tmp_path / "again")
    assert difference(logits(again, ids), adapted) <= allowed


def test_only_requested_side_inputs_exist(
    models: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model = models("gpt2")
    plain = _adapter(make_adapter, "gpt2", model, Method())
    manifest = export(model, tmp_path / "b", adapters={"plain": plain})
    assert manifest.changed == ()
    assert {target.kind for target in manifest.targets} == {"linear"}
    assert not (tmp_path / "b" / "base.safetensors").exists()


@pytest.mark.parametrize("source", ["checkpoint", "bundle"])
def test_adapters_loaded_later_need_the_kinds_of_side_inputs_given_to_the_export(
    source: str, models: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model, ids = models("gpt2"), _ids(3)
    wide = Method({"use_dora": True, "bias": "all"}, ("some", "embedding"))
    adapter = _adapter(make_adapter, "gpt2", model, wide)
    export(model, tmp_path / "b", side_inputs=["dora", "bias", "embedding"])
    if source == "bundle":  # a bundle still has all of them
        export(tmp_path / "b", tmp_path / "again")
    session = AdapterSession(tmp_path / ("again" if source == "bundle" else "b"))
    session.load("late", adapter)
    mixed = logits(session, ids, ["late", None, "late"])
    adapted, base = (_expected("gpt2", model, a, ids) for a in (adapter, None))
    for row, wanted in enumerate((adapted, base, adapted)):
        assert difference(mixed[row], wanted[row]) <= tolerance("torch-onnx-tiny")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Method({"use_dora": True}), r"DoRA adapter \(use_dora\).*side_inputs=.*dora"),
        (Method({"bias": "lora_only"}), r"a trained bias.*side_inputs=.*bias"),
        (Method({"lora_bias": True}), r"\(lora_bias\).* have no offset.*export with this adapter"),
        (Method({}, ("some", "embedding")), r"wte is an embedding.*side_inputs=.*embedding"),
    ],
)
def test_a_bundle_without_the_kind_of_side_input_refuses_the_adapter_by_name(
    method: Method, message: str, models: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model = models("gpt2")
    export(model, tmp_path / "b")
    session = AdapterSession(tmp_path / "b")
    with pytest.raises(AdapterMismatchError, match=message):
        session.load("late", _adapter(make_adapter, "gpt2", model, method))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_packed_bundle_has_the_scales_of_the_adapters_given_to_the_export(
    precision: str, models: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model, ids = models("gpt2"), _ids(2)
    dora = Method({"use_dora": True})
    adapter = _adapter(make_adapter, "gpt2", model, dora)
    export(model, tmp_path / "full", adapters={"a": adapter})
    export(model, tmp_path / "b", adapters={"a": adapter}, precision=precision)
    session = AdapterSession(tmp_path / "b")
    full = read_onnx_adapter(tmp_path / "full" / "adapters" / "a.onnx_adapter")
    packed = read_onnx_adapter(tmp_path / "b" / "adapters" / "a.onnx_adapter")
    for name, values in full.items():
        np.testing.assert_array_equal(packed[name], values)
    own = logits(session, ids, "a")
    session.load("native", tmp_path / "b" / "adapters" / "a.onnx_adapter")
    np.testing.assert_array_equal(own, logits(session, ids, "native"))
    assert apart(own, _expected("gpt2", model, adapter, ids)) <= tolerance(f"export-{precision}")
    assert difference(own, logits(session, ids)) > 0.05
    with pytest.raises(AdapterMismatchError, match="is quantized here and cannot be read"):
        session.load("late", _adapter(make_adapter, "gpt2", model, dora, seed=8))


def test_changed_scales_in_a_packed_bundle_are_refused(
    models: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model = models("gpt2")
    adapters = {
        name: _adapter(make_adapter, "gpt2", model, Method({"use_dora": True}), seed=seed)
        for seed, name in enumerate(("a", "b"))
    }
    export(model, tmp_path / "b", adapters=adapters, precision="int8")
    place = tmp_path / "b" / "adapters"
    (place / "a.onnx_adapter").write_bytes((place / "b.onnx_adapter").read_bytes())
    with pytest.raises(BundleError, match="a.onnx_adapter is not the file that came with"):
        AdapterSession(tmp_path / "b").load("a")


def test_every_method_works_in_half_precision(
    models: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model, ids = models("gpt2"), _ids(3)
    wide = Method({"use_dora": True, "bias": "all"}, ("some", "embedding"))
    adapter = _adapter(make_adapter, "gpt2", model, wide)
    export(model, tmp_path / "side", adapters={"a": adapter}, precision="fp16")
    export(model, tmp_path / "merged", adapters={"a": adapter}, precision="fp16", merge=True)
    adapted, base = (_expected("gpt2", model, a, ids) for a in (adapter, None))
    side = AdapterSession(tmp_path / "side")
    allowed = tolerance("export-fp16")
    assert apart(logits(side, ids, "a"), adapted) <= allowed
    assert apart(logits(side, ids), base) <= allowed
    assert apart(logits(AdapterSession(tmp_path / "merged"), ids), adapted) <= allowed
    assert apart(adapted, base) > 10 * allowed


def test_side_inputs_convert_back_to_an_adapter_with_magnitudes_and_biases(
    models: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model = models("gpt2")
    wide = Method({"use_dora": True, "bias": "all"}, ("some", "embedding"))
    place = _adapter(make_adapter, "gpt2", model, wide)
    manifest = export(model, tmp_path / "b", adapters={"a": place})
    adapter = load_adapter(place)
    arrays = read_onnx_adapter(tmp_path / "b" / "adapters" / "a.onnx_adapter")
    again = adapter_from_side_inputs(arrays, manifest, BundleBase(tmp_path / "b", manifest))
    assert again.config.use_dora
    assert again.factors.keys() == adapter.factors.keys()
    for module, pair in adapter.factors.items():
        assert again.factors[module].kind == pair.kind
        np.testing.assert_allclose(again.factors[module].magnitude, pair.magnitude, rtol=1e-4)
    assert again.saved.keys() == adapter.saved.keys()
    for name, values in adapter.saved.items():
        np.testing.assert_allclose(again.saved[name], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_biases_of_factors_convert_back_to_an_adapter_that_peft_loads(
    name: str, models: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model = models(name)
    place = _adapter(make_adapter, name, model, Method({"lora_bias": True}))
    manifest = export(model, tmp_path / "b", adapters={"a": place})
    arrays = read_onnx_adapter(tmp_path / "b" / "adapters" / "a.onnx_adapter")
    again = adapter_from_side_inputs(arrays, manifest, BundleBase(tmp_path / "b", manifest))
    assert again.config.lora_bias == (name == "llama"), "only a Llama has no biases to train"
    save_adapter(again, tmp_path / "again")
    ids = _ids(2)
    base, expected, ours = (
        _expected(name, model, a, ids) for a in (None, place, tmp_path / "again")
    )
    assert difference(ours, expected) <= tolerance("torch-onnx-tiny")
    assert difference(base, expected) > 0.05, "the adapter changes nothing"


def test_biases_of_factors_beside_trained_rows_do_not_convert_to_what_peft_would_ignore(
    models: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model = models("llama")
    options = {"lora_bias": True, "trainable_token_indices": {"embed_tokens": [7, 9]}}
    place = _adapter(make_adapter, "llama", model, Method(options))
    manifest = export(model, tmp_path / "b", adapters={"a": place})
    arrays = read_onnx_adapter(tmp_path / "b" / "adapters" / "a.onnx_adapter")
    with pytest.raises(AdapterMismatchError, match=r"has a bias for .*use the PEFT directory"):
        adapter_from_side_inputs(arrays, manifest, BundleBase(tmp_path / "b", manifest))


@pytest.mark.parametrize("damage", ["truncated", "moved outside"])
def test_weights_that_are_not_at_the_place_in_the_manifest_are_refused(
    damage: str, models: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model = models("gpt2")
    adapter = _adapter(make_adapter, "gpt2", model, Method({"use_dora": True}))
    export(model, tmp_path / "b", adapters={"a": adapter})
    session = AdapterSession(tmp_path / "b")
    data = tmp_path / "b" / "model.onnx.data"
    if damage == "truncated":
        data.rename(tmp_path / "gone")  # the open session keeps its file
        data.write_bytes(b"short")
    else:
        data.rename(tmp_path / "elsewhere")
        data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"model\.onnx\.data"):
        session.load("late", adapter)


def test_an_adapter_trained_on_a_modified_base_is_refused_by_name(
    models: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model = models("gpt2")
    adapter = _adapter(make_adapter, "gpt2", model, Method({"init_lora_weights": "pissa"}))
    for merge in (False, True):
        with pytest.raises(AdapterError, match=r"a: .*pissa.*loradeploy convert ADAPTER --model"):
            export(model, tmp_path / "b", adapters={"a": adapter}, merge=merge)
    export(model, tmp_path / "b")
    with pytest.raises(AdapterError, match="loradeploy convert ADAPTER --model"):
        AdapterSession(tmp_path / "b").load("a", adapter)


def test_unknown_kinds_and_kinds_of_a_merged_graph_are_refused(models: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'doora'.*lora, dora, bias, embedding"):
        export(models("gpt2"), tmp_path / "b", side_inputs=["doora"])
    with pytest.raises(UsageError, match="do not go together"):
        export(models("gpt2"), tmp_path / "b", side_inputs=["dora"], merge=True)
