"""Spellings of the keys in adapter files, and the names of their modules in the base."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loradeploy.adapter import Adapter, AdapterConfig, Factors
from loradeploy.adapter.files.keys import read_keys
from loradeploy.adapter.fitting.fit import AdaptableBase, Layer, check_fit
from loradeploy.adapter.fitting.settle import without_idle
from loradeploy.adapter.modules.names import named_as
from loradeploy.errors import AdapterError, AdapterMismatchError

P = "base_model.model."


@pytest.mark.parametrize(
    ("key", "part", "name", "half"),
    [
        (f"{P}l.q.lora_A.weight", "factor", "l.q", "lora_A"),
        (f"{P}l.q.lora_B.default.weight", "factor", "l.q", "lora_B"),
        (f"module.{P}l.q.lora_A.weight", "factor", "l.q", "lora_A"),
        (f"_forward_module.{P}l.q.lora_A.weight", "factor", "l.q", "lora_A"),
        (f"{P}{P}l.q.lora_A.weight", "factor", "l.q", "lora_A"),
        (f"text.{P}l.q.lora_A.weight", "factor", "text.l.q", "lora_A"),
        (f"_orig_mod.{P}l.q.lora_A.weight", "factor", "l.q", "lora_A"),
        (f"{P}l._checkpoint_wrapped_module.q.lora_A.weight", "factor", "l.q", "lora_A"),
        (f"{P}l._fsdp_wrapped_module.q.lora_A.weight", "factor", "l.q", "lora_A"),
        (f"{P}emb.lora_embedding_A", "factor", "emb", "lora_embedding_A"),
        (f"{P}emb.lora_embedding_B.default", "factor", "emb", "lora_embedding_B"),
        (f"{P}l.q.lora_magnitude_vector", "factor", "l.q", "lora_magnitude_vector"),
        (f"{P}l.q.lora_magnitude_vector.weight", "factor", "l.q", "lora_magnitude_vector"),
        (f"{P}l.q.lora_magnitude_vector.default", "factor", "l.q", "lora_magnitude_vector"),
        (f"{P}l.q.lora_magnitude_vector.default.weight", "factor", "l.q", "lora_magnitude_vector"),
        (f"{P}l.q.lora_B.bias", "bias", "l.q", "lora_B"),
        (f"{P}l.q.base_layer.bias", "below", "l.q.bias", ""),
        (f"{P}emb.token_adapter.base_layer.weight", "below", "emb.weight", ""),
        (f"{P}emb.token_adapter.trainable_tokens_delta", "rows", "emb", ""),
        (f"{P}head.modules_to_save.weight", "saved", "head.weight", ""),
        (f"{P}head.modules_to_save.default.weight", "saved", "head.weight", ""),
        (f"{P}head.modules_to_save.dense.weight", "saved", "head.dense.weight", ""),
        (f"{P}head.original_module.weight", "original", "head.weight", ""),
        (f"{P}head.weight", "parameter", "head.weight", ""),
    ],
)
def test_every_spelling_of_a_key_is_read(key: str, part: str, name: str, half: str) -> None:
    found = read_keys([key])[key]
    assert (found.part, found.name, found.half) == (part, name, half)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([f"{P}l.q.lora_A.weight", "l.q.lora_B.weight"], "does not begin with"),
        ([f"{P}l.q.lora_A.one.weight", f"{P}l.q.lora_A.two.weight"], "2 adapters"),
        ([f"{P}l.q.lora_A.one.weight", f"{P}l.q.lora_B.weight"], "some keys name an adapter .one."),
    ],
)
def test_keys_of_several_adapters_in_one_file_are_refused(keys: list[str], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        read_keys(keys)


def test_a_magnitude_with_a_name_beside_factors_without_is_read_as_in_peft() -> None:
    keys = [f"{P}l.q.lora_A.weight", f"{P}l.q.lora_magnitude_vector.default.weight"]
    assert {key.name for key in read_keys(keys).values()} == {"l.q"}


def an_adapter(*modules: str, zeros: str | None = None, **changes: Any) -> Adapter:
    def factors(module: str) -> Factors:
        B = np.zeros((4, 2)) if module == zeros else np.ones((4, 2))
        return Factors(np.ones((2, 3)), B, changes.get("magnitude"))

    config = AdapterConfig(r=2, target_modules=modules, use_dora="magnitude" in changes)
    return Adapter(config, {module: factors(module) for module in modules})


@pytest.mark.parametrize(
    ("module", "base", "expected"),
    [
        ("l.0.q", ["l.0.q", "l.0.k"], "l.0.q"),
        ("l.0.q", ["model.l.0.q", "model.l.0.k"], "model.l.0.q"),
        ("model.l.0.q", ["l.0.q", "l.0.k"], "l.0.q"),
        ("model.l.0.q", ["model.text.l.0.q"], "model.text.l.0.q"),
        ("l.0.q", ["vision.l.0.q"], "l.0.q"),
        ("l.7.q", ["model.l.0.q"], "l.7.q"),
    ],
    ids=["the same", "added", "subtracted", "inserted", "another part of a model", "unknown"],
)
def test_an_unambiguous_prefix_is_adjusted_to_the_base(
    module: str, base: list[str], expected: str
) -> None:
    assert list(named_as(an_adapter(module), base, list).factors) == [expected]


def test_most_names_are_found_if_the_base_has_another_head() -> None:
    """An adapter of BertForMaskedLM on BertModel: only the modules of its head are refused."""
    modules = ["bert.l.0.q", "bert.l.1.q", "cls.dense"]
    base = ["l.0.q", "l.0.k", "l.1.q", "l.1.k"]
    found = named_as(an_adapter(*modules), base, list)
    assert sorted(found.factors) == ["cls.dense", "l.0.q", "l.1.q"]
    layers = {name: Layer("linear", (3,), 4) for name in base}
    with pytest.raises(AdapterMismatchError) as refusal:
        check_fit(found, AdaptableBase("this base", layers))
    assert "cls.dense is not a linear layer of this base (it has no cls: " in str(refusal.value)
    assert "another model" not in str(refusal.value)
    assert "l.0.q" not in str(refusal.value)


def test_an_ambiguous_prefix_is_refused() -> None:
    with pytest.raises(AdapterMismatchError, match=r"may be one\.l\.q or two\.l\.q"):
        named_as(an_adapter("l.q"), ["one.l.q", "two.l.q"], list)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"zeros": "vision.q"}, ["text.q"]),
        ({"zeros": "text.q"}, ["text.q", "vision.q"]),
        ({}, ["text.q", "vision.q"]),
        ({"zeros": "vision.q", "magnitude": np.ones(4)}, ["text.q", "vision.q"]),
    ],
    ids=["zero and absent", "zero and there", "not zero", "zero with a magnitude"],
)
def test_zero_factors_of_absent_modules_are_omitted(
    options: dict[str, Any], kept: list[str]
) -> None:
    adapter = without_idle(an_adapter("text.q", "vision.q", **options), {"text.q"})
    assert sorted(adapter.factors) == kept
