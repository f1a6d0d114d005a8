"""Sentence encoders are trained with the losses of sentence-transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from loradeploy.adapter import load_adapter
from loradeploy.bundle.text.vectors.recipe import read_recipe, write_default
from loradeploy.errors import BundleError, DataError, UsageError
from loradeploy.files import write_json
from loradeploy.lora.inject import adapted
from loradeploy.train.api import train
from loradeploy.train.config import CHOICES, TrainConfig
from loradeploy.train.data.sources import Source
from loradeploy.train.tasks.embedding.losses import LOSSES
from loradeploy.train.tasks.embedding.vectors import vectors_of
from loradeploy.train.tasks.table import task_of
from tests.inputs.sentence import write
from tests.inputs.training_data import pairs
from tests.tolerances import tolerance
from tests.train.conftest import Quick, write_lines

RANKED: list[dict[str, Any]] = [
    {
        "anchor": "shares rose",
        "positive": "profit of the bank grew again",
        "negative": "the match ended",
    },
    {"anchor": "a goal", "positive": "the match ended", "negative": "oil"},
    {"anchor": "Web chip", "positive": "online software", "negative": "the Cup of a season"},
]
SCORED: list[dict[str, Any]] = [
    {"text": "shares rose", "text_pair": "profit of the bank grew again", "score": 0.9},
    {"text": "a goal", "text_pair": "the match ended", "score": 0.5},
    {"text": "Web chip", "text_pair": "oil", "score": -0.2},
    {"text": "the cup", "text_pair": "a season ended", "score": 0.5},
]
MODES = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
PROMPTS = {
    "prompts": {"query": "query: ", "document": "web: ", "usual": "oil: "},
    "default_prompt_name": "usual",
}


def hidden_size(base: Path) -> int:
    return int(json.loads((base / "config.json").read_text())["hidden_size"])


def embedder(base: Path, place: Path, *modes: str, more: bool = False, **pooling: Any) -> Path:
    """Copy `base` with sentence-transformers' files; `more`: layers after the pooling."""
    shutil.copytree(base, place)
    size = hidden_size(base)
    modules: list[Any] = [
        ("Pooling", "1_Pooling", {"pooling_mode": list(modes), "embedding_dimension": size}),
    ]
    modules[0][2].update(pooling)
    files: dict[str, Any] = {"config_sentence_transformers": PROMPTS}
    if more:
        # Shorter than tiny_bert's positions, so that truncation is tested.
        files["sentence_bert_config"] = {"max_seq_length": 9, "do_lower_case": True}
        gelu = "torch.nn.modules.activation.GELU"
        dense = {"in_features": size, "out_features": 5, "bias": True, "activation_function": gelu}
        modules += [
            ("Dense", "2_Dense", dense),
            ("LayerNorm", "3_LayerNorm", {"dimension": 5}),
            ("Normalize", "4_Normalize", None),
        ]
    write(place, *modules, **files)
    if more:
        draw = torch.Generator().manual_seed(1)
        weights = {
            "2_Dense": {
                "linear.weight": torch.randn(5, size, generator=draw),
                "linear.bias": torch.randn(5, generator=draw),
            },
            "3_LayerNorm": {
                "norm.weight": torch.rand(5, generator=draw),
                "norm.bias": torch.rand(5, generator=draw),
            },
        }
        for folder, tensors in weights.items():
            save_file(tensors, place / folder / "model.safetensors")
    return place


def our_loss(base: Path, rows: Path, **settings: Any) -> float:
    """Return the loss of one batch of all rows before training."""
    config = TrainConfig(task="feature-extraction", **settings)
    task = task_of(config, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    features = task.encode(task.read(Source(rows)), (), tokenizer, 64).features
    with torch.no_grad():
        found = task.loss(
            AutoModel.from_pretrained(base).eval(),
            task.collate(0)(features),  # 0 is tiny_bert's padding token
        )
    assert int(found.items) == len(features)
    return float(found.total / found.items)


def their_loss(base: Path, rows: list[dict[str, Any]], name: str, prompts: list[str]) -> float:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    model = SentenceTransformer(str(base), device="cpu").eval()
    makers: dict[str, Any] = {
        "ranking": lambda: losses.MultipleNegativesRankingLoss(model),
        "triplet": lambda: losses.TripletLoss(
            model, losses.TripletDistanceMetric.COSINE, triplet_margin=0.5
        ),
        "cosent": lambda: losses.CoSENTLoss(model),
        "cosine": lambda: losses.CosineSimilarityLoss(model),
    }
    texts = [name for name in rows[0] if name != "score"]
    columns = []
    for part, prompt in zip(texts, prompts, strict=True):
        features = model.preprocess([row[part] for row in rows], prompt=prompt or None)
        columns.append(features)
    labels = torch.tensor([row.get("score", 0.0) for row in rows])
    with torch.no_grad():
        return float(makers[name]()(columns, labels))


@pytest.mark.parametrize("modes", [*((mode,) for mode in MODES), ("cls", "max")], ids="+".join)
def test_the_loss_is_that_of_sentence_transformers_for_every_pooling(
    modes: tuple[str, ...], tiny_bert: Path, tmp_path: Path
) -> None:
    base = embedder(tiny_bert, tmp_path / "base", *modes)
    rows = write_lines(tmp_path / "rows.jsonl", RANKED)
    prompts = ["query: ", *["web: "] * 2]
    expected = their_loss(base, RANKED, "ranking", prompts)
    assert our_loss(base, rows) == pytest.approx(expected, abs=1e-5)
    other = embedder(tiny_bert, tmp_path / "other", "mean", "max")
    assert our_loss(other, rows) != pytest.approx(expected, abs=1e-4), "the pooling is not seen"


@pytest.mark.parametrize("prompt_pooled", [True, False], ids=["", "prompt-left-out"])
@pytest.mark.parametrize("more", [False, True], ids=["pooled", "layers"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_that_of_sentence_transformers(
    loss: str, more: bool, prompt_pooled: bool, tiny_bert: Path, tmp_path: Path
) -> None:
    base = embedder(tiny_bert, tmp_path / "base", "mean", more=more, include_prompt=prompt_pooled)
    scored = loss in ("cosent", "cosine")
    rows = SCORED if scored else RANKED
    file = write_lines(tmp_path / "rows.jsonl", rows)
    prompts = ["oil: "] * 2 if scored else ["query: ", *["web: "] * 2]
    expected = their_loss(base, rows, loss, prompts)
    assert our_loss(base, file, embedding_loss=loss) == pytest.approx(expected, abs=1e-5)
    bare = our_loss(base, file, embedding_loss=loss, query_prompt="none", document_prompt="none")
    assert bare == pytest.approx(their_loss(base, rows, loss, [""] * len(prompts)), abs=1e-5)
    assert bare != pytest.approx(expected, abs=1e-4), "the prompts change nothing"


def test_the_table_of_losses_has_every_loss_of_the_settings() -> None:
    assert tuple(LOSSES) == CHOICES["embedding_loss"]


@pytest.mark.parametrize("loss", ["triplet", "cosent", "cosine"])
def test_training_lowers_every_loss(
    loss: str, tiny_bert: Path, tmp_path: Path, quick: Quick
) -> None:
    rows = [SCORED, RANKED][loss == "triplet"]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    result = quick(
        tiny_bert,
        data,
        tmp_path / "adapter",
        task="feature-extraction",
        embedding_loss=loss,
        max_steps=15,
        learning_rate=1e-2,
    )
    assert result.loss_after < 0.7 * result.loss_before
    assert (result.accuracy_after is None) == (loss != "triplet")


def test_sentence_transformers_computes_the_same_vectors_with_a_trained_adapter(
    tiny_bert: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    base = embedder(tiny_bert, tmp_path / "base", "lasttoken", more=True)
    data = pairs(tmp_path / "data.jsonl")
    learning = {"max_steps": 20, "batch_size": 8, "learning_rate": 2e-2}
    result = train(base, data, tmp_path / "a", config=learning, task="feature-extraction")
    assert read_recipe(result.adapter) is None, "it was trained as its base specifies"
    text = "shares and profit"
    theirs = SentenceTransformer(str(base), device="cpu")
    before = theirs.encode(text)
    theirs.load_adapter(str(result.adapter))
    recipe = read_recipe(base)
    assert recipe is not None
    model = AutoModel.from_pretrained(base).eval()
    encoded = AutoTokenizer.from_pretrained(base)(
        f"oil: {text}", return_tensors="pt", truncation=True, max_length=9
    )
    with torch.no_grad(), adapted(model, load_adapter(result.adapter)):
        states = model(**encoded).last_hidden_state.numpy()
    ours = recipe.vectors(states, encoded["attention_mask"].numpy())[0]
    found = theirs.encode(text)
    np.testing.assert_allclose(found, ours, atol=1e-5)
    assert np.abs(found - before).max() > 1e-2, "the adapter changed nothing"


@pytest.mark.parametrize("saved", [False, True], ids=["without-modules.json", "with"])
def test_given_prompts_are_saved_with_the_adapter(
    saved: bool, tiny_bert: Path, tmp_path: Path, quick: Quick
) -> None:
    base = embedder(tiny_bert, tmp_path / "base", "cls", more=True) if saved else tiny_bert
    given = {"query_prompt": "ask: ", "document_prompt": "none", "task": "feature-extraction"}
    data = pairs(tmp_path / "data.jsonl")
    result = quick(base, data, tmp_path / "adapter", max_steps=1, **given)
    recipe = read_recipe(result.adapter)
    assert recipe is not None
    assert recipe.pooling == (("cls",) if saved else ("mean",))
    assert (recipe.prompts["query"], recipe.prompts["document"]) == ("ask: ", "")
    assert recipe.default_prompt == ("usual" if saved else None)
    states, mask = np.random.default_rng(0).normal(size=(2, 3, 8)), np.ones((2, 3), np.int64)
    if saved:
        ours, own = read_recipe(base), recipe
        states = np.random.default_rng(0).normal(size=(2, 3, hidden_size(base)))
        assert ours is not None
        assert (ours.vectors(states, mask) == own.vectors(states, mask)).all()
    # Continued training uses the files saved with the adapter.
    options = {"task": "feature-extraction", "init_adapter": str(result.adapter)}
    config = {"max_steps": 1, "batch_size": 4, "max_length": 64}
    again = train(base, data, tmp_path / "again", config=config, **options)
    own_recipe = read_recipe(again.adapter)
    assert own_recipe is not None and own_recipe.same(recipe)


@pytest.mark.parametrize("loss", ["cosent", "cosine"])
def test_pairs_with_scores_have_the_prompts_of_the_adapters_training(
    loss: str, tmp_path: Path
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for directory in (base, adapter):
        directory.mkdir()
        write_default(directory)
    prompts = {"query": "base: ", "document": "base: "}
    write_json(base / "config_sentence_transformers.json", {"prompts": prompts})
    given = {"query_prompt": "Q: ", "document_prompt": "none"}
    config = TrainConfig(task="feature-extraction", embedding_loss=loss, **given)
    trained = vectors_of(config, base, None)
    trained.write(adapter)
    later = TrainConfig(task="feature-extraction", embedding_loss=loss)
    assert vectors_of(later, base, adapter).prompts == trained.prompts == ("Q: ", "")
    assert vectors_of(later, base, None).prompts == ("", ""), "neither text is the query"


@pytest.mark.parametrize(
    ("settings", "row", "message"),
    [
        ({"embedding_loss": "triplet"}, RANKED[0] | {"negative": None}, "has no negative, which"),
        ({"embedding_loss": "cosent"}, RANKED[0], "data for `embedding_loss` ranking or triplet"),
        (
            {},
            SCORED[0],
            "line 1: has text, text_pair, score, which is data for `embedding_loss` co",
        ),
        ({"embedding_loss": "cosine"}, SCORED[0] | {"score": 4}, "score is 4: .* needs -1 to 1"),
        ({"embedding_loss": "cosent"}, SCORED[0] | {"score": "x"}, "score is 'x', expected a num"),
        ({}, RANKED[0] | {"positive": ""}, "positive is '', expected a text"),
    ],
)
def test_data_of_another_format_is_named(
    settings: dict[str, Any], row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    task = task_of(TrainConfig(task="feature-extraction", **settings), tmp_path)
    with pytest.raises(DataError, match=message):
        task.read(Source(write_lines(tmp_path / "rows.jsonl", [row])))


@pytest.mark.parametrize(
    "setting", [{"embedding_loss": "cosent"}, {"query_prompt": "q: "}, {"document_prompt": "d: "}]
)
def test_settings_of_embedders_are_refused_for_other_tasks(setting: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="is for feature-extraction, not for causal-lm"):
        TrainConfig(**setting)


def test_an_unsupported_module_is_refused_by_name(
    tiny_bert: Path, tmp_path: Path, quick: Quick
) -> None:
    base = shutil.copytree(tiny_bert, tmp_path / "base")
    write(base, ("Pooling", "1_Pooling", {"pooling_mode": "cls"}), ("CNN", "2_CNN", {}))
    with pytest.raises(BundleError, match="names a module CNN"):
        quick(base, pairs(tmp_path / "d.jsonl"), tmp_path / "a", task="feature-extraction")


def test_padding_does_not_change_the_rows_of_a_batch(tiny_bert: Path, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", RANKED)
    found = our_loss(tiny_bert, rows)
    model = AutoModel.from_pretrained(tiny_bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)

    def vector(text: str) -> torch.Tensor:  # one text alone, with no padding
        mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        return mean / mean.norm()

    with torch.no_grad():
        texts = [vector(row[part]) for part in ("positive", "negative") for row in RANKED]
        scores = 20 * torch.stack([vector(row["anchor"]) for row in RANKED]) @ torch.stack(texts).T
        expected = torch.nn.functional.cross_entropy(scores, torch.arange(3))
    assert found == pytest.approx(float(expected), abs=20 * tolerance("same-torch"))
