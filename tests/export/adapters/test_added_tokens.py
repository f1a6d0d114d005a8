"""Adapters that add tokens to the vocabulary, as side inputs: each row has its adapter's tokens.

The reference is PEFT: `resize_token_embeddings`, then the adapter is loaded.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import loradeploy as ld
from loradeploy.adapter.files.peft import load_adapter, save_adapter
from loradeploy.conversion import convert
from loradeploy.errors import AdapterError, ExportError, UsageError
from loradeploy.export.graph.edit import constant_of, set_constant
from loradeploy.runtime.running.bindings import FixedBuffers
from tests.export.adapters.vocabularies import (
    BASE,
    CASES,
    TABLES,
    WORDS,
    Case,
    ids_of,
    make,
    resized,
)
from tests.export.reference import difference, onnx_output
from tests.parity.spoil import spoiled
from tests.runtime.feeds import feeds
from tests.tolerances import tolerance

Bases = dict[str, tuple[Path, Path]]
AdapterOf = Callable[[str], Path]

ADDED = [
    name for name, case in CASES.items() if case.size == BASE + 2 and name != "trained in full"
]


@pytest.mark.parametrize("source", ["checkpoint", "bundle"])
@pytest.mark.parametrize("name", ADDED)
def test_each_row_of_a_batch_has_the_added_tokens_of_its_adapter(
    name: str, source: str, bases: Bases, adapter_of: AdapterOf, tmp_path: Path
) -> None:
    case, adapter = CASES[name], adapter_of(name)
    checkpoint, plain = bases[case.model]
    model = checkpoint if source == "checkpoint" else plain
    manifest = ld.export(model, tmp_path / "b", adapters={"a": adapter})
    assert manifest.added_tokens is not None
    assert (manifest.added_tokens.base, manifest.added_tokens.count) == (BASE, 2)
    session = ld.AdapterSession(tmp_path / "b")
    ids = ids_of(case)
    known = np.where(ids < BASE, ids, 9)
    given = feeds(session.manifest, np.concatenate([ids, known, known]))
    first, other, adapted = session.run(["logits"], given, ["a", None, "a"])[0]
    expected = np.load(adapter / "expected.npy")[0]
    assert difference(first, expected) <= tolerance("torch-onnx-tiny")
    base = onnx_output(plain, known)[0]
    assert difference(other[:, :BASE], base) <= tolerance("torch-onnx-tiny")
    assert (other[:, BASE:] < -1e17).all()
    assert difference(adapted[:, :BASE], base) > 0.1, "the adapter does nothing"
    (alone,) = session.run(["logits"], feeds(session.manifest, ids), "a")
    assert difference(alone[0], expected) <= tolerance("torch-onnx-tiny")
    (idle,) = session.run(["logits"], feeds(session.manifest, known))
    assert difference(idle[0][:, :BASE], base) <= tolerance("torch-onnx-tiny")
    assert (idle[0][:, BASE:] < -1e17).all()
    with pytest.raises(UsageError, match=r"row 1 .* token 51[23], and the base has .* up to 511"):
        session.run(["logits"], feeds(session.manifest, np.repeat(ids, 2, axis=0)), ["a", None])


def test_fully_trained_embeddings_are_refused_with_figures(
    bases: Bases, adapter_of: AdapterOf, tmp_path: Path
) -> None:
    for model in bases["llama"]:
        with pytest.raises(
            AdapterError,
            match=r"a: (lm_head|.*embed_tokens).weight has 514 rows, 2 more than the base's, and"
            r" differs in 512 of the base's 512: .* at most 64 .*`merge=True`",
        ):
            ld.export(model, tmp_path / "b", adapters={"a": adapter_of("trained in full")})


@pytest.fixture(scope="module")
def adapters(bases: Bases, adapter_of: AdapterOf, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two adapters with different tokens of the same ids, one with one token, one with none."""
    checkpoint = bases["llama"][0]
    place = tmp_path_factory.mktemp("adapters")
    one = Case(
        BASE + 1, {"trainable_token_indices": {name: [BASE] for name in TABLES}}, saved=False
    )
    make(one, checkpoint, place / "one", seed=2, words=("<|other|>",))
    make(Case(BASE, {"target_modules": ["q_proj", *TABLES]}), checkpoint, place / "none", seed=3)
    return {
        "saved": adapter_of("embeddings saved"),
        "rows": adapter_of("trained rows"),
        "one": place / "one",
        "none": place / "none",
    }


SIZES = {"saved": BASE + 2, "rows": BASE + 2, "one": BASE + 1, "none": BASE, None: BASE}


@pytest.fixture(scope="module")
def bundle(bases: Bases, adapters: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundles") / "b"
    ld.export(bases["llama"][0], place, adapters=adapters)
    return place


FORMS: dict[str, dict[str, Any]] = {
    "slots": {"layout": "slots", "required_inputs": True},
    "branches": {"branches": True, "required_inputs": True},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
    "one position": {"logits_to_keep": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_adapters_with_different_tokens_of_one_id_share_a_batch(
    form: str, bases: Bases, adapters: Any, tmp_path: Path
) -> None:
    ld.export(bases["llama"][0], tmp_path / "b", adapters=adapters, **FORMS[form])
    session = ld.AdapterSession(tmp_path / "b")
    names = ["saved", None, "rows", "one", "none"]
    rows = [_ids(SIZES[name]) for name in names]
    (mixed,) = session.run(["logits"], feeds(session.manifest, np.stack(rows)), names)
    coarse = {"fp16": 0.05, "int8": 0.5}.get(form, tolerance("torch-onnx-tiny"))
    for name, ids, found in zip(names, rows, mixed, strict=True):
        expected = _peft(bases["llama"][0], name and adapters[name], SIZES[name], ids)
        assert difference(found[:, : SIZES[name]], expected) <= coarse, name
        assert (found[:, SIZES[name] :] < -6e4).all(), name


def _ids(size: int) -> Any:
    return np.array([5, 7, *(min(size - 1, BASE + place) for place in (0, 1)), 44, 60])


def _peft(base: Path, adapter: Path | None, size: int, ids: Any) -> Any:
    """Return PEFT's logits [tokens, size]."""
    import torch

    with torch.no_grad():
        return _model(base, adapter, size)(torch.from_numpy(ids)[None]).logits[0].numpy()


def _model(base: Path, adapter: Path | None, size: int) -> Any:
    import peft

    model = resized(base, size)
    return (model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)).eval()


def test_generated_text_is_that_of_peft_with_the_tokenizer_of_each_adapter(
    bases: Bases, adapters: Any, bundle: Path
) -> None:
    import torch
    from transformers import AutoTokenizer

    names = ["rows", None, "one", "saved"]
    prompts = {"rows": WORDS, "one": ("<|other|>",), "saved": WORDS, None: ("end",)}
    texts = [f"The match {' '.join(prompts[name])} was" for name in names]
    session = ld.AdapterSession(bundle)
    found = ld.TextGenerator(session).generate(texts, names, max_new_tokens=6)
    with ld.Engine(session) as engine:
        waiting = [
            engine.submit(text, name, max_new_tokens=6)
            for text, name in zip(texts, names, strict=True)
        ]
        served = [one.result(60).generations[0] for one in waiting]
    for name, text, own, other in zip(names, texts, found, served, strict=True):
        place = bases["llama"][0] if name is None else adapters[name]
        ids = AutoTokenizer.from_pretrained(place)(text, return_tensors="pt").input_ids
        assert (ids >= BASE).sum() == (0 if name is None else len(prompts[name]))
        model = _model(bases["llama"][0], name and adapters[name], SIZES[name])
        with torch.no_grad():
            made = model.generate(
                input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None
            )
        expected = made[0, ids.shape[1] :].tolist()[: len(own.token_ids)]
        assert expected and list(own.token_ids) == expected, name
        assert own.token_ids == other.token_ids
    with pytest.raises(UsageError, match=r"row 0 .* token 512, and the base has tokens up to 511"):
        ld.TextGenerator(session).generate([[5, BASE]], [None], max_new_tokens=2)
    with ld.Engine(session) as engine, pytest.raises(UsageError, match="has tokens up to 512"):
        engine.submit([5, BASE + 1], "one", max_new_tokens=2).result(60)
    scores = ld.TextGenerator(session).score([[5, 7, BASE]], ["one"])
    assert np.isfinite(scores[0].logprob)


@pytest.fixture(scope="module")
def other_bundles(
    bases: Bases, adapters: Any, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """`bundle`, one in float16, and one with a cache of fixed size."""
    place = tmp_path_factory.mktemp("forms")
    forms: dict[str, dict[str, Any]] = {"fp16": {"precision": "fp16"}, "gqa": {"attention": "gqa"}}
    for form, options in forms.items():
        ld.export(bases["llama"][0], place / form, adapters=adapters, **options)
    return {"fp32": bundle, **{form: place / form for form in forms}}


each_bundle = pytest.mark.parametrize("form", ["fp32", "fp16", "gqa"])


@each_bundle
def test_hidden_tokens_are_not_sampled_at_any_temperature(
    form: str, other_bundles: dict[str, Path]
) -> None:
    names = ["one", None, "none", "rows"]
    options: dict[str, Any] = {"max_new_tokens": 100, "top_k": 0, "seed": 1, "logprobs": BASE + 2}
    generator = ld.TextGenerator(ld.AdapterSession(other_bundles[form]))
    for temperature in (1e5, 1e20):  # for the lowest logit of float16, then of float32
        made = generator.generate(["The"] * 4, names, temperature=temperature, **options)
        for name, one in zip(names, made, strict=True):
            assert max(one.token_ids) < SIZES[name], name
            assert one.logprobs and {len(own.top) for own in one.logprobs} == {SIZES[name]}
    beams = generator.generate(["The"], [None], max_new_tokens=5, num_beams=3)
    assert max(beams[0].token_ids) < BASE
    (score,) = generator.score([[5, 7, 9]], [None], logprobs=BASE + 2)
    assert [len(own.top) for own in score.logprobs] == [BASE] * 2


def _only_added(made: Any) -> Any:
    """Return a token mask: only added tokens are allowed after the first step."""
    mask = np.ones(BASE + 2 if made else BASE, bool)
    mask[: BASE if made else 0] = False
    return mask


@each_bundle
def test_only_the_row_that_requires_a_hidden_token_fails(
    form: str, other_bundles: dict[str, Path]
) -> None:
    session = ld.AdapterSession(other_bundles[form])
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 1.0}
    expected = ld.TextGenerator(session).generate(["The match"], ["rows"], seed=3, **options)
    for wrong, message in (
        ({"allowed_tokens": _only_added}, "allows the token 512, the logits end at 511"),
        ({"logit_bias": {BASE: 1e30}}, "logit_bias names the token 512, the logits end at 511"),
        ({"num_beams": 2, "temperature": 0.0, "allowed_tokens": _only_added}, "the token 512"),
    ):
        with ld.Engine(session) as engine:
            bad = engine.submit("The", None, **{**options, **wrong})
            good = [engine.submit("The match", "rows", seed=3, **options) for _ in range(3)]
            with pytest.raises(UsageError, match=message):
                bad.result(60)
            for one in good:
                assert one.result(60).generations[0].token_ids == expected[0].token_ids
        with pytest.raises(UsageError, match=message):
            ld.TextGenerator(session).generate(["The"], [None], **{**options, **wrong})
    (own,) = ld.TextGenerator(session).generate(
        ["The"], ["one"], max_new_tokens=5, allowed_tokens=lambda made: _only_added(made)[:-1]
    )
    assert own.token_ids[1:] == (BASE,) * 4


@pytest.mark.parametrize("width", [BASE - 9, BASE, BASE + 1, BASE + 2, BASE + 32])
def test_a_token_mask_is_as_wide_as_the_vocabulary_of_its_row(width: int, bundle: Path) -> None:
    generator = ld.TextGenerator(ld.AdapterSession(bundle))
    mask = np.arange(width) >= min(width, BASE) - 2  # includes all ids after the base's tokens
    for name in (None, "one", "rows"):
        options: dict[str, Any] = {"max_new_tokens": 3, "allowed_tokens": lambda made: mask}
        if width > SIZES[name]:
            with pytest.raises(UsageError, match=f"allows the token {SIZES[name]}, the logits end"):
                generator.generate(["The"], [name], **options)
            options["allowed_tokens"] = lambda made: mask & (np.arange(width) < BASE)
        (made,) = generator.generate(["The"], [name], **options)
        assert set(made.token_ids) <= set(mask.nonzero()[0].tolist())


def test_a_step_with_a_cache_of_fixed_size_is_refused_for_a_hidden_token(
    other_bundles: dict[str, Path],
) -> None:
    session = ld.AdapterSession(other_bundles["gqa"])
    cache = session.empty_cache(1)
    cache.make_room(4, 4)
    fixed = FixedBuffers(cache.inputs, cache.buffers)
    known = {spec.name for spec in session.manifest.inputs}

    def step(token: int) -> Any:
        fed = {name: np.array([[1]]) for name in ("attention_mask", "position_ids")}
        fed |= {"input_ids": np.array([[token]])}
        own = {name: values for name, values in fed.items() if name in known}
        with session.hold(None) as held:
            return held.run_with_ort_values(
                ("logits", *cache.outputs), {**own, **cache.inputs}, buffers=fixed
            )

    assert np.isfinite(step(5)[0].numpy()).all()
    with pytest.raises(UsageError, match="the base has tokens up to 511"):
        step(BASE)


def test_every_path_agrees_and_every_mistake_is_caught(
    bases: Bases, adapters: Any, tmp_path: Path
) -> None:
    given = {name: adapters[name] for name in ("saved", "rows", "one")}
    ld.export(bases["llama"][0], tmp_path / "b", adapters=given)
    report = ld.parity(
        tmp_path / "b", model=bases["llama"][0], prompts=["The match"], tokens=3, controls=True
    )
    assert report.passed, report.failures
    passed = {result.backend for result in report.results if result.outcome == "passed"}
    assert {"torch-merged", "peft", "onnx-merged", "onnx-native", "onnx-mixed"} <= passed
    caught = {(control.name, control.adapter) for control in report.controls if control.caught}
    assert {("swapped tokens", "rows"), ("ignored tokens", "one")} <= caught
    assert all(control.caught for control in report.controls), report.controls


def test_an_adapter_of_only_added_tokens_is_not_reported_as_untrained(
    bases: Bases, adapters: Any, tmp_path: Path
) -> None:
    one = load_adapter(adapters["one"])
    zero = {m: dataclasses.replace(pair, B=pair.B * 0) for m, pair in one.factors.items()}
    save_adapter(dataclasses.replace(one, factors=zero), tmp_path / "one")
    ld.export(bases["llama"][0], tmp_path / "b", adapters={"one": tmp_path / "one"})
    report = ld.parity(
        tmp_path / "b",
        model=bases["llama"][0],
        prompts=["The match"],
        tokens=1,
        backends=["onnx-side-inputs"],
        phases=["prefill"],
        certificate=False,
    )
    assert report.passed, report.failures
    (facts,) = report.adapters
    assert facts.message == "its only effect is on tokens that the base does not have"


def test_merges_made_by_parity_itself_log_nothing_about_tokenizers(
    bases: Bases, adapters: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"one": adapters["one"]}
    ld.export(bases["llama"][0], tmp_path / "b", adapters=given)
    ld.export(bases["llama"][0], tmp_path / "merged", adapters=given, merge=True)
    assert "in place of the base's" in caplog.text  # logged for a requested merge
    caplog.clear()
    with caplog.at_level(logging.INFO, "loradeploy"):
        report = ld.parity(
            tmp_path / "b",
            model=bases["llama"][0],
            prompts=["The match"],
            tokens=1,
            backends=["onnx-merged"],
            phases=["prefill"],
            certificate=False,
        )
    assert report.passed, report.failures
    assert "ONNX merged, one" in caplog.text  # parity's own lines are kept
    assert "in place of the base's" not in caplog.text


def _without_the_offset(graph: ir.Graph) -> None:
    value = graph.initializers["logits.offset"]
    set_constant(value, np.zeros_like(constant_of(value)))


def test_parity_fails_a_base_whose_added_tokens_are_not_hidden(
    bases: Bases, bundle: Path, tmp_path: Path
) -> None:
    broken = spoiled(bundle, tmp_path / "broken", _without_the_offset)
    report = ld.parity(
        broken,
        model=bases["llama"][0],
        prompts=["The match"],
        tokens=1,
        backends=["onnx-side-inputs"],
        phases=["prefill"],
        shrink=False,
        localize=False,
        certificate=False,
    )
    assert not report.passed


def test_an_adapter_loaded_later_can_add_as_many_tokens(
    bases: Bases, adapters: Any, bundle: Path, tmp_path: Path
) -> None:
    ld.export(bases["llama"][0], tmp_path / "b", adapters={"one": adapters["one"]})
    session = ld.AdapterSession(tmp_path / "b")
    with pytest.raises(
        AdapterError, match=r"514 tokens, the base has 512 and this bundle .* 1 more"
    ):
        session.load("rows", adapters["rows"])
    wide = ld.AdapterSession(bundle)
    for name in ("saved", "one", "none"):
        wide.load(f"{name} again", adapters[name])
        ids = _ids(SIZES[name])[None]
        given = feeds(wide.manifest, ids)
        (first,), (again,) = (wide.run(["logits"], given, each) for each in (name, f"{name} again"))
        np.testing.assert_array_equal(first, again)
    wide.load("native", bundle / "adapters" / "rows.onnx_adapter")
    given = feeds(wide.manifest, _ids(BASE + 2)[None])
    (first,), (again,) = (wide.run(["logits"], given, each) for each in ("rows", "native"))
    np.testing.assert_array_equal(first, again)
    with pytest.raises(UsageError, match="cannot be blended"):
        wide.run(["logits"], given, {"rows": 0.5, "none": 0.5})
    with pytest.raises(AdapterError, match="use the PEFT directory"):
        convert(bundle / "adapters" / "rows.onnx_adapter", tmp_path / "back", bundle=bundle)


def test_a_bundle_with_added_tokens_is_exported_and_merged_again(
    bases: Bases, adapters: Any, bundle: Path, tmp_path: Path
) -> None:
    manifest = ld.export(bundle, tmp_path / "b", adapters={"one": adapters["one"]})
    assert manifest.added_tokens is not None and manifest.added_tokens.count == 2
    ld.export(bundle, tmp_path / "m", adapters={"one": adapters["one"]}, merge=True)
    ids = _ids(BASE + 1)
    expected = _peft(bases["llama"][0], adapters["one"], BASE + 1, ids)
    session = ld.AdapterSession(tmp_path / "b")
    (found,) = session.run(["logits"], feeds(session.manifest, ids[None]), "one")
    assert difference(found[0][:, : BASE + 1], expected) <= tolerance("torch-onnx-tiny")
    merged = onnx_output(tmp_path / "m", ids[None])
    assert merged.shape[-1] == BASE + 1
    assert difference(merged[0], expected) <= tolerance("torch-onnx-tiny")


def test_a_quantized_bundle_keeps_its_rows_of_added_tokens(
    bases: Bases, adapters: Any, tmp_path: Path
) -> None:
    given = {"one": adapters["one"]}
    ld.export(bases["llama"][0], tmp_path / "int4", adapters=given, precision="int4")
    before = ld.AdapterSession(tmp_path / "int4")
    assert before.manifest.added_tokens is not None
    for name, others in (("none", {"none": adapters["none"]}), ("nobody", {})):
        manifest = ld.export(tmp_path / "int4", tmp_path / name, adapters=others)
        assert manifest.added_tokens == before.manifest.added_tokens
        session = ld.AdapterSession(tmp_path / name)
        session.load("one", tmp_path / "int4" / "adapters" / "one.onnx_adapter")
        ids = _ids(BASE + 1)[None]
        expected, found = (
            own.run(["logits"], feeds(own.manifest, ids), "one")[0] for own in (before, session)
        )
        assert difference(found, expected) <= tolerance("torch-onnx-tiny")
    (adapted,) = session.run(["logits"], feeds(session.manifest, _ids(BASE)[None]), "one")
    (base,) = session.run(["logits"], feeds(session.manifest, _ids(BASE)[None]))
    assert difference(adapted[..., :BASE], base[..., :BASE]) > 0.1, "the adapter does nothing"
    with pytest.raises(
        ExportError,
        match=r"lm_head is quantized, and this bundle has 1 row for added tokens, which a merge"
        " takes out: merge the adapter into the unquantized checkpoint",
    ):
        ld.export(
            tmp_path / "int4", tmp_path / "m", adapters={"none": adapters["none"]}, merge=True
        )


def test_added_tokens_are_refused_in_the_rows_layout(
    bases: Bases, adapters: Any, bundle: Path, tmp_path: Path
) -> None:
    given = {name: adapters[name] for name in ("none", "one")}
    for model, own, who in (
        (bases["llama"][0], given, "one adds tokens"),
        (bundle, {}, "this bundle has rows for added tokens"),
    ):
        with pytest.raises(UsageError, match=rf'{who}, which are .* with `layout="slots"`'):
            ld.export(model, tmp_path / "b", adapters=own, layout="rows")


def test_an_encoder_accepts_added_tokens_without_logits_for_them(
    tiny_bert: Path, tmp_path: Path
) -> None:
    import peft
    import torch
    from transformers import AutoModel

    def base() -> Any:
        model = AutoModel.from_pretrained(tiny_bert)
        model.resize_token_embeddings(BASE + 1, mean_resizing=False)
        return model

    config = peft.LoraConfig(
        r=2,
        target_modules=["query"],
        trainable_token_indices={"word_embeddings": [BASE]},
        task_type="FEATURE_EXTRACTION",
    )
    made = peft.get_peft_model(base(), config).eval()
    ids = np.array([[5, BASE, 44]])
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        expected = made(torch.from_numpy(ids)).last_hidden_state[0].numpy()
    made.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    manifest = ld.export(
        tiny_bert, tmp_path / "b", adapters={"a": tmp_path / "a"}, task="feature-extraction"
    )
    assert manifest.added_tokens is not None and manifest.added_tokens.output is None
    session = ld.AdapterSession(tmp_path / "b")
    (found,) = session.run(None, feeds(session.manifest, ids), "a")[:1]
    assert difference(found[0], expected) <= tolerance("torch-onnx-tiny")
    with pytest.raises(UsageError, match="and the base has tokens up to 511"):
        session.run(None, feeds(session.manifest, ids))
