"""Sentence vectors as defined by sentence-transformers, compared with plain torch code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loradeploy.bundle.text.vectors.recipe import (
    SentenceRecipe,
    default_recipe,
    read_recipe,
    recipe_directory,
)
from loradeploy.errors import BundleError, UsageError
from tests.inputs.edits import edited_json
from tests.inputs.sentence import NEW, OLD, write
from tests.tolerances import tolerance

HIDDEN = 6
STATES = torch.randn(3, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])


def vectors(place: Path, skipped: int = 0) -> Any:
    recipe = read_recipe(place)
    assert recipe is not None
    rows = slice(1) if skipped else slice(None)  # other rows are no longer than the prompt
    return recipe.vectors(STATES[rows].numpy(), MASK[rows].numpy(), skipped)


def _rows(pool: Callable[[Any], Any]) -> Any:
    """Apply `pool` to the unpadded states [tokens, hidden] of each row."""
    return torch.stack([pool(s[m.bool()]) for s, m in zip(STATES, MASK, strict=True)]).numpy()


def _weighted(states: Any) -> Any:
    weights = torch.arange(1, len(states) + 1)[:, None]
    return (states * weights).sum(0) / weights.sum()


POOLINGS: dict[str, Callable[[Any], Any]] = {
    "cls": lambda s: s[0],
    "max": lambda s: s.max(0).values,
    "mean": lambda s: s.mean(0),
    "mean_sqrt_len_tokens": lambda s: s.sum(0) / len(s) ** 0.5,
    "weightedmean": _weighted,
    "lasttoken": lambda s: s[-1],
}
FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@pytest.mark.parametrize("form", ["flags", "name", "list"])
@pytest.mark.parametrize("mode", POOLINGS)
def test_each_pooling_mode_is_computed(mode: str, form: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"flags": {flag: flag == FLAGS[mode] for flag in FLAGS.values()}}.get(
        form, {"pooling_mode": mode if form == "name" else [mode]}
    )
    kind = (OLD if form == "flags" else NEW) + ("Pooling" if form == "flags" else "pooling.Pooling")
    place = write(tmp_path / "m", (kind, "1_Pooling", {"embedding_dimension": HIDDEN, **config}))
    assert np.abs(vectors(place) - _rows(POOLINGS[mode])).max() <= tolerance("same-torch")


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True},  # older format
        {"pooling_mode": ["cls", "max"]},
    ],
)
def test_several_pooling_modes_are_concatenated(config: dict[str, Any], tmp_path: Path) -> None:
    place = write(tmp_path / "m", ("Pooling", "1_Pooling", config))
    expected = np.concatenate([_rows(POOLINGS["cls"]), _rows(POOLINGS["max"])], axis=1)
    assert np.abs(vectors(place) - expected).max() <= tolerance("same-torch")


@pytest.mark.parametrize("mode", POOLINGS)
def test_prompt_tokens_are_excluded_if_the_config_says_so(mode: str, tmp_path: Path) -> None:
    place = write(
        tmp_path / "m",
        ("Pooling", "1_Pooling", {"pooling_mode": mode, "include_prompt": False}),
    )
    rest = STATES[0, 2:]
    weights = torch.arange(3, 6)[:, None]  # a token's weight is its position in the whole row
    expected = (
        (rest * weights).sum(0) / weights.sum() if mode == "weightedmean" else POOLINGS[mode](rest)
    ).numpy()
    assert np.abs(vectors(place, skipped=2)[0] - expected).max() <= tolerance("same-torch")
    if mode not in ("lasttoken", "max"):  # these use no prompt token here
        assert np.abs(vectors(place, skipped=2)[0] - vectors(place)[0]).max() > 1e-3


POOL = ("Pooling", "1_Pooling", {"pooling_mode": "mean"})
MEAN = torch.from_numpy(_rows(POOLINGS["mean"]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("torch.nn.modules.activation.Tanh", torch.tanh),
        ("torch.nn.modules.linear.Identity", lambda x: x),
        ("torch.nn.modules.activation.GELU", torch.nn.functional.gelu),
        ("torch.nn.modules.activation.ReLU", torch.relu),
        ("torch.nn.modules.activation.Sigmoid", torch.sigmoid),
        ("torch.nn.modules.activation.SiLU", torch.nn.functional.silu),
        (None, torch.tanh),  # the default of sentence-transformers
    ],
)
def test_a_dense_layer_is_computed(
    activation: str | None, function: Callable[[Any], Any], bias: bool, tmp_path: Path
) -> None:
    config = {"in_features": HIDDEN, "out_features": 4, "bias": bias}
    if activation is not None:
        config["activation_function"] = activation  # type: ignore[assignment]
    layer = torch.nn.Linear(HIDDEN, 4, bias=bias)
    place = write(tmp_path / "m", POOL, ("Dense", "2_Dense", config), ("Normalize", "3_N", None))
    tensors = {f"linear.{name}": value.data for name, value in layer.named_parameters()}
    save_file(tensors, place / "2_Dense" / "model.safetensors")
    with torch.no_grad():
        expected = torch.nn.functional.normalize(function(layer(MEAN)), dim=1).numpy()
    assert np.abs(vectors(place) - expected).max() <= tolerance("same-torch")


@pytest.mark.parametrize("out", [HIDDEN, 4])
def test_a_dense_layer_with_a_residual_is_computed(out: int, tmp_path: Path) -> None:
    config = {"in_features": HIDDEN, "out_features": out, "use_residual": True}
    layer, beside = torch.nn.Linear(HIDDEN, out), torch.nn.Linear(HIDDEN, out, bias=False)
    place = write(tmp_path / "m", POOL, ("Dense", "2_Dense", config))
    tensors = {"linear.weight": layer.weight.data, "linear.bias": layer.bias.data}
    if out != HIDDEN:
        tensors["residual.weight"] = beside.weight.data
    save_file(tensors, place / "2_Dense" / "model.safetensors")
    with torch.no_grad():
        expected = torch.tanh(layer(MEAN)) + (MEAN if out == HIDDEN else beside(MEAN))
    assert np.abs(vectors(place) - expected.numpy()).max() <= tolerance("same-torch")


def test_a_layer_norm_is_computed(tmp_path: Path) -> None:
    norm = torch.nn.LayerNorm(HIDDEN)
    torch.nn.init.normal_(norm.weight)
    place = write(
        tmp_path / "m", POOL, ("Dropout", "2_D", {"dropout": 0.1}), ("LayerNorm", "3_L", {})
    )
    save_file(
        {"norm.weight": norm.weight.data, "norm.bias": norm.bias.data},
        place / "3_L/model.safetensors",
    )
    with torch.no_grad():
        assert np.abs(vectors(place) - norm(MEAN).numpy()).max() <= tolerance("same-torch")


def test_vectors_are_normalized_only_with_a_normalize_module(tmp_path: Path) -> None:
    plain = vectors(write(tmp_path / "m", POOL))
    assert np.abs(plain - MEAN.numpy()).max() <= tolerance("same-torch")
    usual = default_recipe().vectors(STATES.numpy(), MASK.numpy())
    np.testing.assert_allclose(np.linalg.norm(usual, axis=1), 1, atol=1e-6)


def test_prompts_and_the_encoders_settings_are_read(tmp_path: Path) -> None:
    place = write(
        tmp_path / "m",
        POOL,
        config_sentence_transformers={
            "prompts": {"query": "Query: ", "document": None},
            "default_prompt_name": "query",
        },
        sentence_bert_config={"max_seq_length": 7, "do_lower_case": True},
    )
    recipe = read_recipe(place)
    assert recipe is not None
    assert (recipe.prompts, recipe.default_prompt) == (
        {"query": "Query: ", "document": ""},
        "query",
    )
    assert (recipe.max_length, recipe.lowercase, recipe.include_prompt) == (7, True, True)


@pytest.mark.parametrize(
    ("modules", "files", "message"),
    [
        ([("my_code.Pooler", "1_P", None)], {}, "my_code.Pooler, which is code of its own"),
        ([POOL, ("WeightedLayerPooling", "2_W", {})], {}, "names a module WeightedLayerPooling"),
        ([("Normalize", "1_N", None)], {}, "names a module Normalize before the Pooling"),
        ([POOL, ("Pooling", "2_P", {})], {}, "names a module Pooling"),
        ([], {}, "names no Pooling"),
        ([("Pooling", "1_P", {"pooling_mode": "median"})], {}, "the pooling 'median'"),
        ([("Pooling", "1_P", {"pooling_mode_new": True})], {}, "pooling_mode_new is not supported"),
        (
            [("Pooling", "1_P", {"pooling_mode": "cls", "pooling_mode_mean_tokens": True})],
            {},
            "pooling_mode is cls, and pooling_mode_mean_tokens is mean: keep one",
        ),
        (
            [("Pooling", "1_P", {"embedding_dimension": 6, "word_embedding_dimension": 8})],
            {},
            "two sizes",
        ),
        ([("Pooling", "1_P", {"embedding_dimension": "six"})], {}, "the size is"),
        (
            [("Pooling", "1_P", {"embedding_dimension": 6})],
            {"config": {"hidden_size": 8}},
            "the Pooling is for states of size 6, the encoder's hidden_size is 8",
        ),
        ([POOL, ("Dense", "2_D", {})], {}, "model.safetensors does not exist"),
        ([POOL, ("Dense", "../d", None)], {}, "is outside"),
        ([POOL], {"config_sentence_transformers": {"model_type": "SparseEncoder"}}, "SparseEnc"),
        ([POOL], {"config_sentence_transformers": {"default_prompt_name": "q"}}, "default prompt"),
        ([POOL], {"sentence_bert_config": {"transformer_task": "fill-mask"}}, "fill-mask"),
        ([POOL], {"sentence_bert_config": {"max_seq_length": "long"}}, "max_seq_length is 'long'"),
    ],
)
def test_unsupported_modules_are_refused_by_name(
    modules: list[Any], files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    place = write(tmp_path / "m", *modules, **files)
    with pytest.raises(BundleError, match=message) as problem:
        read_recipe(place)
    assert len(str(problem.value).replace(str(tmp_path), "")) < 300


@pytest.mark.parametrize("change", [{"activation_function": "torch.nn.Softplus"}, {"bias": False}])
def test_an_invalid_dense_layer_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    place = write(tmp_path / "m", POOL, ("Dense", "2_D", {"out_features": 2, **change}))
    tensors = {"linear.weight": torch.zeros(2, HIDDEN), "linear.bias": torch.zeros(2)}
    if "bias" in change:
        tensors["linear.extra"] = torch.zeros(1)
    save_file(tensors, place / "2_D" / "model.safetensors")
    with pytest.raises(BundleError, match=r"Softplus|linear\.extra"):
        read_recipe(place)


def test_a_dense_layer_of_another_size_than_the_pooled_vector_is_refused(tmp_path: Path) -> None:
    pooling = {"pooling_mode": ["cls", "mean"], "embedding_dimension": HIDDEN}
    place = write(tmp_path / "m", ("Pooling", "1_P", pooling), ("Dense", "2_D", {"bias": False}))
    for size, refused in ((HIDDEN, True), (2 * HIDDEN, False)):
        file = place / "2_D" / "model.safetensors"
        save_file({"linear.weight": torch.zeros(2, size)}, file)
        if refused:
            with pytest.raises(
                BundleError, match="2_D takes vectors of size 6, the step before it"
            ):
                read_recipe(place)
        else:
            assert read_recipe(place) is not None


@pytest.mark.parametrize("folder", ["", "onnx", "0_Transformer"])
def test_the_modules_are_found_from_the_directory_of_the_encoder(
    folder: str, tmp_path: Path
) -> None:
    place = write(tmp_path / "m", POOL)
    with edited_json(place / "modules.json") as modules:
        modules[0]["path"] = "0_Transformer"
    (place / folder).mkdir(exist_ok=True)
    (place / "other").mkdir()
    assert recipe_directory(place / folder) == place
    assert recipe_directory(place / "other") is None


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_a_text_without_pooled_tokens_is_refused(mode: str) -> None:
    recipe = SentenceRecipe((mode,), (), include_prompt=False)
    states, mask = np.ones((2, 3, 4), np.float32), np.array([[1, 1, 1], [1, 1, 0]])
    assert np.array_equal(recipe.vectors(states, mask, 1), np.ones((2, 4)))
    with pytest.raises(UsageError, match="a text has no tokens after its prompt"):
        recipe.vectors(states, mask, 2)
