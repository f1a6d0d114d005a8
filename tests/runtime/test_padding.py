"""Results of a row do not depend on the batch, for graphs with each kind of padding.

left    a decoder with position inputs, or one that derives positions from the mask
right   GroupQueryAttention, a decoder without a cache, an encoder with a mask
none    a decoder that counts positions from the start of the cache, an encoder without a mask
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loradeploy as ld
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import BudgetError, UsageError
from loradeploy.export.api import export
from loradeploy.runtime.decoding.caches.memory import position_bytes
from loradeploy.runtime.engine.engine import Engine
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.classification import TextClassifier
from loradeploy.runtime.tasks.embedding import TextEmbedder
from loradeploy.runtime.tasks.generation import Generation, TextGenerator
from tests.conftest import MakeAdapter
from tests.export import others
from tests.inputs.edits import edited_json
from tests.tolerances import tolerance

PADDING: Final = {
    "traced llama": "left",
    "gqa": "right",
    "gpt2 without positions": "none",
    "gpt2 with positions": "left",
    "llama without positions": "left",  # rotary positions are relative
    "gpt2 without a cache": "right",
}
Bundles = Callable[[str], Path]


@pytest.fixture(scope="module")
def bundles(
    tiny_llama: Path,
    tiny_gpt2: Path,
    tiny_llama_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundles:
    """A function: kind → a decoder bundle with an adapter `own`."""
    made: dict[str, Path] = {}
    graphs: dict[str, tuple[Path, dict[str, bool]]] = {
        "gpt2 without positions": (tiny_gpt2, {"cache": True}),
        "gpt2 with positions": (tiny_gpt2, {"cache": True, "positions": True}),
        "llama without positions": (tiny_llama, {"cache": True}),
        "gpt2 without a cache": (tiny_gpt2, {"cache": False}),
    }

    def make(kind: str) -> Path:
        place = tmp_path_factory.mktemp("padding")
        model, options = graphs.get(kind, (tiny_llama, {}))
        adapters = {"own": make_adapter(model, r=4, scale=0.3)}
        bundle = place / "bundle"
        if kind in graphs:
            others.export_decoder(model, place / "graph", **options)
            export(place / "graph", bundle, adapters=adapters, checkpoint=model)
        else:
            attention = "gqa" if kind == "gqa" else None
            export(tiny_llama_bundle, bundle, adapters=adapters, attention=attention)
        return bundle

    def bundle(kind: str) -> Path:
        if kind not in made:
            made[kind] = make(kind)
        return made[kind]

    return bundle


@pytest.mark.parametrize("kind", PADDING)
def test_the_export_detects_the_padding_side(kind: str, bundles: Bundles) -> None:
    assert read_manifest(bundles(kind)).padding == PADDING[kind]


rows = st.lists(
    st.tuples(
        st.lists(st.integers(3, 511), min_size=1, max_size=12), st.sampled_from([None, "own"])
    ),
    min_size=2,
    max_size=5,
)


def test_a_padding_token_beyond_the_vocabulary_does_not_prevent_padding(
    tiny_gpt2: Path, tmp_path: Path
) -> None:
    model, bundle = tmp_path / "model", tmp_path / "bundle"
    shutil.copytree(tiny_gpt2, model)
    with edited_json(model / "config.json") as config:
        config["pad_token_id"] = config["vocab_size"]
    assert export(model, bundle).padding == "left"
    generator = TextGenerator(AdapterSession(bundle))
    texts = ["Hi", "The match was won in the last minute"]
    together = generator.generate(texts, max_new_tokens=4)
    alone = [generator.generate([text], max_new_tokens=4)[0] for text in texts]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    options: dict[str, Any] = {"model": model, "prompts": texts, "tokens": 2}
    report = ld.parity(bundle, backends=["onnx-side-inputs"], **options)
    assert report.passed, [result.message for result in report.results]


@pytest.mark.parametrize("kind", PADDING)
def test_the_generated_text_of_a_row_is_the_same_as_alone(kind: str, bundles: Bundles) -> None:
    generator = TextGenerator(AdapterSession(bundles(kind)))

    @settings(
        max_examples=6,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(rows)
    def check(batch: list[tuple[list[int], str | None]]) -> None:
        prompts, adapters = [row[0] for row in batch], [row[1] for row in batch]
        together = generator.generate(prompts, adapters, max_new_tokens=4)
        for prompt, adapter, got in zip(prompts, adapters, together, strict=True):
            (alone,) = generator.generate([prompt], [adapter], max_new_tokens=4)
            assert got.token_ids == alone.token_ids, (prompt, adapter)

    check()


@pytest.mark.parametrize("kind", PADDING)
def test_the_generated_text_of_a_request_in_an_engine_is_the_same_as_alone(
    kind: str, bundles: Bundles
) -> None:
    settings: list[dict[str, Any]] = [{}, {"n": 2, "temperature": 0.9}, {"num_beams": 2}]
    asked: list[tuple[list[int], str | None, dict[str, Any]]] = [
        (
            [5 + number, *range(30, 30 + 5 * (number % 5))],
            (None, "own")[number % 2],
            {**settings[number % 3], "max_new_tokens": 3 + number % 4},
        )
        for number in range(12)
    ]
    with AdapterSession(bundles(kind)) as session:
        generator = TextGenerator(session)
        alone = [
            [one.token_ids for one in generator.generate([prompt], adapter, **options)]
            for prompt, adapter, options in asked
        ]
        with Engine(session, max_rows=5, prefill_chunk=4) as engine:
            taken = [
                engine.submit(prompt, adapter, **options) for prompt, adapter, options in asked
            ]
            found = [[one.token_ids for one in each.result(60).generations] for each in taken]
    assert found == alone
    assert len({ids for of in alone for ids in of}) > 8


def test_an_adapter_has_an_effect_in_a_batch_without_padding(
    bundles: Bundles,
) -> None:
    generator = TextGenerator(AdapterSession(bundles("gpt2 without positions")))
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12]]
    base = generator.generate(prompts, max_new_tokens=6)
    own = generator.generate(prompts, "own", max_new_tokens=6)
    assert [row.token_ids for row in base] != [row.token_ids for row in own]


@pytest.mark.parametrize(
    "options", [{}, {"n": 2, "temperature": 0.9}, {"num_beams": 3, "n": 2}], ids=str
)
def test_results_keep_their_order_where_batches_have_a_single_length(
    bundles: Bundles, options: dict[str, Any]
) -> None:
    generator = TextGenerator(AdapterSession(bundles("gpt2 without positions")))
    prompts = [[5, 6], [7, 8, 9], [10, 11], [5], [12, 13, 14]]
    alone = [
        one
        for prompt in prompts
        for one in generator.generate([prompt], "own", max_new_tokens=4, **options)
    ]
    for batch_size in (5, 3, 1):
        reported: dict[int, Generation] = {}
        results = generator.generate(
            prompts,
            "own",
            max_new_tokens=4,
            batch_size=batch_size,
            on_result=reported.__setitem__,
            **options,
        )
        assert list(reported.items()) == list(enumerate(results))
        assert [one.token_ids for one in results] == [one.token_ids for one in alone]


def test_samples_and_beams_are_the_same_with_and_without_a_cache(bundles: Bundles) -> None:
    cached, without = (
        TextGenerator(AdapterSession(bundles(kind)))
        for kind in ("gpt2 with positions", "gpt2 without a cache")
    )
    prompts = [[5, 6], [7, 8, 9, 10, 11], [12]]
    own: list[dict[str, Any]] = [{"num_beams": 3, "n": 2}, {"n": 3, "temperature": 0.9}, {}]
    options: dict[str, Any] = {"max_new_tokens": 6, "per_prompt": own}
    results = [
        made.generate(prompts, [None, "own", "own"], **options) for made in (cached, without)
    ]
    one, other = ([result.token_ids for result in of] for of in results)
    assert one == other
    assert len(set(one)) == 6
    base = without.generate(prompts, **options)
    assert [result.token_ids for result in base][:2] == one[:2]
    assert [result.token_ids for result in base][2:] != one[2:]


@pytest.fixture(scope="module")
def encoders(
    tiny_bert: Path, make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory
) -> Bundles:
    """A function: kind → an encoder with a mask, without one, or with int32 and another output."""
    place = tmp_path_factory.mktemp("encoders")
    others.export_with_torch(tiny_bert, place / "masked", dynamo=False)
    others.without_mask(place / "masked" / "model.onnx", place / "unmasked")
    others.with_int32(place / "masked" / "model.onnx", place / "int32", output="token_embeddings")
    adapter = make_adapter(tiny_bert, r=4, scale=0.3, task="feature-extraction")
    made: dict[str, Path] = {}

    def bundle(kind: str) -> Path:
        if kind not in made:
            for file in tiny_bert.iterdir():
                if file.suffix != ".safetensors":
                    shutil.copy(file, place / kind)
            made[kind] = place / f"bundle-{kind}"
            export(place / kind, made[kind], adapters={"own": adapter}, checkpoint=tiny_bert)
        return made[kind]

    return bundle


TEXTS = ["Shares rose", "The striker scored twice in the second half of the match", "A", "Go on"]


@pytest.mark.parametrize(
    ("kind", "padding"), [("masked", "right"), ("unmasked", "none"), ("int32", "right")]
)
def test_the_vector_of_a_text_is_the_same_as_alone(
    kind: str, padding: str, encoders: Bundles
) -> None:
    assert read_manifest(encoders(kind)).padding == padding
    embedder = TextEmbedder(AdapterSession(encoders(kind)))
    names = ["own", None, "own", None]
    together = embedder(TEXTS, names)
    for text, name, got in zip(TEXTS, names, together, strict=True):
        np.testing.assert_allclose(got, embedder([text], [name])[0], atol=tolerance("rows"))
    assert np.abs(embedder(TEXTS, "own") - embedder(TEXTS)).max() > 1e-2


def test_outputs_and_integers_of_another_exporter_give_the_same_vectors(encoders: Bundles) -> None:
    one, other = (TextEmbedder(AdapterSession(encoders(kind))) for kind in ("masked", "int32"))
    np.testing.assert_allclose(one(TEXTS, "own"), other(TEXTS, "own"), atol=tolerance("rows"))


def test_integers_are_cast_if_they_fit_and_refused_otherwise(encoders: Bundles) -> None:
    session = AdapterSession(encoders("int32"))
    ids = np.array([[5, 6, 7]])
    wide, narrow = (
        session.run(None, {"input_ids": ids.astype(kind), "attention_mask": ids > 0})[0]
        for kind in (np.int64, np.int16)
    )
    np.testing.assert_array_equal(wide, narrow)
    with pytest.raises(UsageError, match="input_ids is int64 .*, the graph takes int32"):
        session.run(None, {"input_ids": ids + 2**40, "attention_mask": np.ones_like(ids)})


def test_a_classifier_without_a_padding_token_scores_each_text_as_alone(
    tiny_gpt2: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    task = "sequence-classification"
    adapter = make_adapter(tiny_gpt2, r=4, task=task, modules_to_save=["score"])
    export(tiny_gpt2, tmp_path / "b", adapters={"own": adapter})
    classifier = TextClassifier(AdapterSession(tmp_path / "b"))
    together = classifier(TEXTS, "own")
    alone = [classifier([text], "own")[0] for text in TEXTS]
    assert [row.label for row in together] == [row.label for row in alone]
    np.testing.assert_allclose(
        [row.score for row in together], [row.score for row in alone], atol=tolerance("rows")
    )


def test_an_engine_limits_the_logits_of_a_graph_without_a_cache(bundles: Bundles) -> None:
    session = AdapterSession(bundles("gpt2 without a cache"))
    each = position_bytes(session)
    assert each == 4 * (session.limits.vocabulary or 0) > 0
    with Engine(session, cache_budget=20 * each) as engine:
        with pytest.raises(BudgetError, match="1 rows of 21 tokens take"):
            engine.submit([5] * 11, max_new_tokens=10).result(60)
        with pytest.raises(BudgetError, match="2 rows"):
            engine.submit([5] * 8, max_new_tokens=4, num_beams=2).result(60)
        fits = engine.submit([5] * 10, "own", max_new_tokens=10).result(60).generations[0]
    alone = TextGenerator(session).generate([[5] * 10], "own", max_new_tokens=10)[0]
    assert fits.token_ids == alone.token_ids
