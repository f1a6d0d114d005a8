"""Vectors and scores equal those of sentence-transformers, for every option of its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import loradeploy as ld
from loradeploy.bundle.text.scoring import read_scoring
from loradeploy.errors import BundleError, UsageError
from tests.conftest import MakeAdapter, once
from tests.inputs.pairs import give_rules
from tests.inputs.sentence import write
from tests.tolerances import tolerance

HIDDEN = 48
TEXTS = ["Shares fell in early trading", "", "A bank 😀 of\u200b Zürich", "The cup! " * 60]
PROMPTS = {"prompts": {"query": "Find: ", "other": "oil: "}}
IDENTITY = "torch.nn.modules.linear.Identity"


def dense(name: str | None, **options: Any) -> tuple[str, str, dict[str, Any]]:
    config = {"in_features": HIDDEN, "out_features": 5, **options}
    if name is not None:
        config["activation_function"] = f"torch.nn.modules.activation.{name}"
    return ("Dense", "2_Dense", config)


def pool(mode: Any = "mean", **options: Any) -> tuple[str, str, dict[str, Any]]:
    return (
        "Pooling",
        "1_Pooling",
        {"embedding_dimension": HIDDEN, "pooling_mode": mode, **options},
    )


NORMALIZE = ("Normalize", "3_Normalize", None)
# By name: the modules behind the encoder, and the other files.
RECIPES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    **{
        mode: ([pool(mode), NORMALIZE], {})
        for mode in ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
    },
    "several": ([pool(["lasttoken", "weightedmean", "max"])], {}),
    "flags": (
        [
            (
                "Pooling",
                "1_Pooling",
                {
                    "word_embedding_dimension": HIDDEN,
                    "pooling_mode_mean_tokens": True,
                    "pooling_mode_cls_token": True,
                },
            )
        ],
        {},
    ),
    "dense": ([pool(), dense(None), NORMALIZE], {}),
    "dense gelu": ([pool("cls"), dense("GELU", bias=False)], {}),
    "dense sigmoid residual": ([pool("max"), dense("Sigmoid", use_residual=True)], {}),
    "truncated": (
        [pool(), NORMALIZE],
        {"config_sentence_transformers": {"truncate_dim": 7}},
    ),
    "default prompt": (
        [pool()],
        {"config_sentence_transformers": {**PROMPTS, "default_prompt_name": "query"}},
    ),
    **{
        f"unpooled prompt {mode}": (
            [pool(mode, include_prompt=False)],
            {"config_sentence_transformers": {**PROMPTS, "default_prompt_name": "other"}},
        )
        for mode in ("cls", "weightedmean")
    },
    "short": ([pool()], {"sentence_bert_config": {"max_seq_length": 9}}),
    "lowercase": ([pool()], {"sentence_bert_config": {"do_lower_case": True}}),
    "tokenizer's limit": (
        [pool()],
        {
            "sentence_bert_config": {
                "max_seq_length": 9,
                "tokenizer_args": {"model_max_length": 6},
                "model_args": {"attn_implementation": "eager"},
            }
        },
    ),
    "call's limit": (
        [pool("lasttoken")],
        {
            "sentence_bert_config": {
                "max_seq_length": 9,
                "processing_kwargs": {"text": {"max_length": 5, "padding": "longest"}},
            }
        },
    ),
}


def with_weights(place: Path) -> Path:
    """Give the Dense module in `place`, if there is one, weights of a seed."""
    if (place / "2_Dense").is_dir():
        config = json.loads((place / "2_Dense" / "config.json").read_text())
        draw = torch.Generator().manual_seed(1)
        tensors = {"linear.weight": torch.randn(5, HIDDEN, generator=draw) / 7}
        if config.get("bias", True):
            tensors["linear.bias"] = torch.randn(5, generator=draw)
        if config.get("use_residual"):
            tensors["residual.weight"] = torch.randn(5, HIDDEN, generator=draw) / 7
        save_file(tensors, place / "2_Dense" / "model.safetensors")
    return place


@pytest.fixture(scope="module")
def model(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT with special tokens around a text or a pair."""
    place = tmp_path_factory.mktemp("sentence") / "model"
    shutil.copytree(tiny_bert, place)
    (place / "chat_template.jinja").unlink()  # with it, sentence-transformers makes texts chats
    return give_rules(place)


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sentence") / "bundle"
    ld.export(model, place, task="feature-extraction")
    return place


@pytest.mark.parametrize("name", RECIPES)
def test_vectors_are_those_of_sentence_transformers(
    name: str, model: Path, bundle: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    modules, files = RECIPES[name]
    shutil.copytree(model, tmp_path / "base")
    with_weights(write(tmp_path / "base", *modules, **files))
    adapter = make_adapter(model, task="feature-extraction", target_modules=["query", "value"])
    shutil.copytree(adapter, tmp_path / "adapter")
    with_weights(write(tmp_path / "adapter", *modules, **files))
    session = ld.AdapterSession(bundle)
    session.load("own", tmp_path / "adapter")
    theirs = SentenceTransformer(str(tmp_path / "base"), device="cpu")
    without = theirs.encode(TEXTS)
    theirs.load_adapter(str(adapter))
    expected = theirs.encode(TEXTS, batch_size=2)
    ours = ld.TextEmbedder(session)(TEXTS, "own", batch_size=3)
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= tolerance("same-torch")
    assert np.abs(expected - without).max() > 1e-3, "the adapter has an effect"
    if "prompt" in name:
        named = ld.TextEmbedder(session)(TEXTS, "own", prompt_name="query")
        difference = np.abs(named - theirs.encode(TEXTS, prompt_name="query")).max()
        assert difference <= tolerance("same-torch")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processing_kwargs": {"text": {"add_special_tokens": False}}}, "add_special_tokens is"),
        ({"processing_kwargs": {"common": {"truncation": False}}}, "truncation is False"),
        ({"processing_kwargs": {"text": {"max_length": "9"}}}, "max_seq_length is '9'"),
        ({"tokenizer_args": {"do_lower_case": True}}, "tokenizer_args.do_lower_case is True"),
        ({"config_kwargs": {"is_decoder": True}}, "config_kwargs.is_decoder is True"),
        ({"model_args": 7}, "model_args is 7, expected an object"),
        ({"query_length": 8}, "query_length is 8"),
        ({"modality_config": {"text": {}, "message": {}}}, "messages of a chat"),
        ({"modality_config": {"text": {"method": "get_text_features"}}}, "method is 'get_text"),
        (
            {"modality_config": {"text": {"method_output_name": "pooler_output"}}},
            "method_output_name is 'pooler_output', expected last_hidden_state",
        ),
    ],
)
def test_options_that_would_change_vectors_are_refused_by_name(
    options: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "base")
    write(tmp_path / "base", pool(), sentence_bert_config=options)
    with pytest.raises(BundleError, match=message):
        ld.export(tmp_path / "base", tmp_path / "bundle", task="feature-extraction")


PAIRS = [("Which match was won?", text) for text in TEXTS]


def their_scorer(model: Path, **options: Any) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(model), device="cpu", num_labels=1, **options)


@pytest.fixture(scope="module")
def cross_encoder(model: Path, shared: Path) -> Path:
    """A cross-encoder as sentence-transformers saves it: scores are logits, with prompts."""

    def make(place: Path) -> None:
        torch.manual_seed(4)
        theirs = their_scorer(
            model,
            activation_fn=torch.nn.Identity(),
            max_length=24,
            default_prompt_name="query",
            **PROMPTS,
        )
        theirs.save_pretrained(str(place))

    return once(shared / "cross-encoder", make)


@pytest.fixture(scope="module")
def their_adapter(cross_encoder: Path, shared: Path) -> Path:
    """An adapter that sentence-transformers saved, with a sigmoid and another default prompt."""
    import peft

    def make(place: Path) -> None:
        theirs = their_scorer(cross_encoder, default_prompt_name="other")
        theirs.activation_fn = torch.nn.Sigmoid()
        theirs.add_adapter(
            peft.LoraConfig(
                r=3,
                target_modules=["query", "value"],
                modules_to_save=["classifier"],
                init_lora_weights=False,
                task_type="SEQ_CLS",
            )
        )
        theirs.save_pretrained(str(place))

    return once(shared / "cross-encoder-adapter", make)


@pytest.fixture(scope="module")
def scoring_bundle(cross_encoder: Path, their_adapter: Path, shared: Path) -> Path:
    def make(place: Path) -> None:
        ld.export(cross_encoder, place, adapters={"own": their_adapter})

    return once(shared / "cross-encoder-bundle", make)


def test_scores_are_those_of_a_cross_encoder_with_its_activation_prompts_and_maximum_length(
    cross_encoder: Path, their_adapter: Path, scoring_bundle: Path, tmp_path: Path
) -> None:
    session = ld.AdapterSession(scoring_bundle)
    session.load("later", their_adapter)
    scorer = ld.TextPairScorer(session)
    base, tuned = their_scorer(cross_encoder), their_scorer(their_adapter)
    expected = {None: base.predict(PAIRS), "own": tuned.predict(PAIRS)}
    expected["later"] = expected["own"]
    assert np.abs(expected[None] - expected["own"]).max() > 0.1, "the adapter has an effect"
    rows = [(pair, name) for pair in PAIRS for name in expected]
    scores = scorer.score([pair for pair, _ in rows], [name for _, name in rows], batch_size=5)
    for (pair, name), score in zip(rows, scores, strict=True):
        assert abs(score - expected[name][PAIRS.index(pair)]) <= tolerance("same-torch"), name
    named = scorer.score(PAIRS, prompt_name="other")
    assert np.abs(named - base.predict(PAIRS, prompt_name="other")).max() <= tolerance("same-torch")
    assert np.abs(named - expected[None]).max() > 1e-4, "the prompt has an effect"
    with pytest.raises(UsageError, match="no prompt is named 'web'; there are: "):
        scorer.score(PAIRS, prompt_name="web")
    ranked = scorer.rerank(PAIRS[0][0], TEXTS, prompt_name="other", top_k=2)
    theirs = base.rank(PAIRS[0][0], TEXTS, prompt_name="other", top_k=2)
    assert [one.index for one in ranked] == [one["corpus_id"] for one in theirs]
    plain = tmp_path / "plain"
    shutil.copytree(their_adapter, plain)
    (plain / "modules.json").unlink()
    session.load("plain", plain)
    blend: Any = {"own": 0.5, "plain": 0.5}
    with pytest.raises(UsageError, match="different files of cross-encoders"):
        scorer.score(PAIRS, blend)


def test_a_merged_cross_encoder_scores_like_its_adapter(
    their_adapter: Path, scoring_bundle: Path, tmp_path: Path
) -> None:
    ld.export(scoring_bundle, tmp_path / "merged", adapters={"own": their_adapter}, merge=True)
    merged = ld.TextPairScorer(ld.AdapterSession(tmp_path / "merged"))
    expected = their_scorer(their_adapter).predict(PAIRS)
    assert np.abs(merged.score(PAIRS) - expected).max() <= tolerance("same-torch")


def test_a_changed_file_of_a_cross_encoder_is_refused(scoring_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(scoring_bundle, tmp_path / "bundle")
    file = tmp_path / "bundle" / "config_sentence_transformers.json"
    file.write_text(file.read_text().replace("Identity", "Sigmoid"))
    with pytest.raises(BundleError, match=r"config_sentence_transformers\.json is not the file"):
        ld.TextPairScorer(ld.AdapterSession(tmp_path / "bundle"))


def edited(place: Path, change: Callable[[Any], Any], name: str) -> None:
    file = place / name
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


LOGIT_SCORE = {
    "idx": 1,
    "name": "1",
    "path": "1_LogitScore",
    "type": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("modules.json", lambda v: [*v, LOGIT_SCORE], "the modules Transformer, LogitScore: only"),
        ("modules.json", lambda v: [], "names the modules"),
        (
            "sentence_bert_config.json",
            lambda v: {**v, "transformer_task": "text-generation"},
            "transformer_task is 'text-generation', expected sequence-classification",
        ),
        (
            "config_sentence_transformers.json",
            lambda v: {**v, "activation_fn": "torch.nn.modules.activation.Tanh"},
            "the activation function is .*Tanh.*: choose `activation`, sigmoid or identity",
        ),
        (
            "config_sentence_transformers.json",
            lambda v: {**v, "default_prompt_name": "gone"},
            "the default prompt 'gone' is not among its prompts",
        ),
    ],
)
def test_a_cross_encoder_that_is_not_supported_is_refused_as_a_scorer_only(
    name: str,
    change: Callable[[Any], Any],
    message: str,
    cross_encoder: Path,
    scoring_bundle: Path,
    their_adapter: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(their_adapter, tmp_path / "adapter")
    edited(tmp_path / "adapter", change, name)
    session = ld.AdapterSession(scoring_bundle)
    session.load("odd", tmp_path / "adapter")
    with pytest.raises(BundleError, match=message):
        ld.TextPairScorer(session).score(PAIRS, "odd")
    assert ld.TextClassifier(session)(PAIRS, "odd"), "classes do not depend on these files"
    ld.export(scoring_bundle, tmp_path / "again", adapters={"odd": tmp_path / "adapter"})
    bundled = ld.AdapterSession(tmp_path / "again")
    with pytest.raises(BundleError, match=message):
        ld.TextPairScorer(bundled).score(PAIRS, "odd")


def test_an_embedders_files_are_no_cross_encoders(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "base")
    write(tmp_path / "base", pool(), config_sentence_transformers=PROMPTS)
    assert read_scoring(tmp_path / "base") is None
