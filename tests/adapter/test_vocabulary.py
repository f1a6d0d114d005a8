"""The vocabulary size of an adapter, determined by its tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loradeploy.adapter.adapter import Adapter, Factors, Rows
from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.fitting.settle import with_rows
from loradeploy.adapter.fitting.vocabulary import (
    Vocabulary,
    added_tokens,
    resized_vocabulary,
    token_tables,
    without_added,
)
from loradeploy.errors import AdapterMismatchError

UNTIED = Vocabulary(32, "embed", "head")
TIED = Vocabulary(32, "embed", "head", tied=True)
FEWER = np.ones((30, 4))


def adapter(**parts: Any) -> Adapter:
    return Adapter(AdapterConfig(r=2, lora_alpha=2), **{"factors": {}, **parts})


def factors(tokens: int) -> dict[str, Factors]:
    return {
        "head": Factors(np.ones((2, 4)), np.ones((tokens, 2))),
        "embed": Factors(np.ones((2, tokens)), np.ones((4, 2)), kind="embedding"),
    }


@pytest.mark.parametrize(
    ("parts", "base"),
    [
        ({"factors": factors(30)}, UNTIED),
        ({"factors": factors(30)}, TIED),
        ({"factors": factors(30), "carried": {"head.weight": FEWER}}, UNTIED),
        ({"saved": {"head.weight": FEWER}}, TIED),
    ],
    ids=["factors", "factors, tied", "one of two tables", "the head of tied ones"],
)
def test_a_base_is_not_resized_for_an_adapter_without_embeddings(
    parts: dict[str, Any], base: Vocabulary
) -> None:
    with pytest.raises(AdapterMismatchError, match="of 30 tokens, the base has 32, .* whole"):
        resized_vocabulary(adapter(**parts), base)


@pytest.mark.parametrize(
    ("parts", "base"),
    [
        ({"carried": {"embed.weight": FEWER, "head.weight": FEWER}}, UNTIED),
        ({"saved": {"embed.weight": FEWER, "head.weight": FEWER}}, UNTIED),
        ({"factors": factors(30), "carried": {"embed.weight": FEWER}}, TIED),
    ],
)
def test_a_base_is_resized_for_an_adapter_with_embeddings(
    parts: dict[str, Any], base: Vocabulary
) -> None:
    assert resized_vocabulary(adapter(**parts), base) == 30


def test_factors_of_the_bases_size_change_no_vocabulary() -> None:
    assert resized_vocabulary(adapter(factors=factors(32)), UNTIED) is None


# -- added tokens as side inputs -------------------------------------------------------------------

OWN = np.arange(32 * 4, dtype=np.float32).reshape(32, 4)


def table(added: int, *, changed: tuple[int, ...] = ()) -> np.ndarray[Any, Any]:
    values = np.concatenate([OWN, np.full((added, 4), 7, np.float32)])
    values[list(changed)] += 1
    return values


def test_added_rows_and_a_few_changed_ones_are_trained_rows() -> None:
    given = adapter(carried={"embed.weight": table(2, changed=(5,)), "head.weight": table(2)})
    found = with_rows(given, lambda name: OWN, 64)
    assert found.carried == {}
    assert found.rows["embed.weight"].indices == (5, 32, 33)
    assert found.rows["head.weight"].indices == (32, 33)
    assert found.config.extra["trainable_token_indices"] == {"embed": [5, 32, 33], "head": [32, 33]}
    np.testing.assert_array_equal(found.rows["embed.weight"].values[0], OWN[5] + 1)
    assert added_tokens(found, UNTIED, 64) == 2


def test_fully_trained_embeddings_become_rows_if_the_tokens_are_named() -> None:
    config = AdapterConfig(r=2, lora_alpha=2, modules_to_save=("embed", "head"))
    saved = {"embed.weight": table(2), "head.weight": table(2)}
    given = Adapter(config, {}, saved)
    assert with_rows(given, lambda name: OWN, 64) is given
    found = with_rows(given, lambda name: OWN, 64, token_tables(given, UNTIED))
    assert (found.saved, found.config.modules_to_save) == ({}, ())
    assert found.rows.keys() == saved.keys()
    alone = Adapter(config, {}, {"embed.weight": table(2)})
    assert token_tables(alone, TIED) == (), "PEFT leaves the base's head as it is"


def test_individually_trained_rows_replace_those_of_the_embedding() -> None:
    rows = {"embed.weight": Rows((32, 33), np.ones((2, 4)))}
    found = with_rows(adapter(carried={"embed.weight": table(2)}, rows=rows), lambda name: OWN, 64)
    assert found.carried == {}
    np.testing.assert_array_equal(found.rows["embed.weight"].values, 1)


def test_an_embedding_that_differs_in_many_rows_is_refused_with_figures() -> None:
    given = adapter(carried={"embed.weight": table(2, changed=tuple(range(20)))})
    with pytest.raises(
        AdapterMismatchError, match=r"2 more than the base's, .* in 20 of .* 32: .*8"
    ):
        with_rows(given, lambda name: OWN, 8)


@pytest.mark.parametrize(
    ("base", "tokens", "message"),
    [
        (UNTIED, 34, "2 more than the base's 32, and side inputs have at most 1 more"),
        (UNTIED, 30, "fewer than the base's 32"),
        (Vocabulary(32, "embed", "head", biased=True), 34, "a bias, whose rows"),
    ],
)
def test_unsupported_added_tokens_are_refused(base: Vocabulary, tokens: int, message: str) -> None:
    saved = {"embed.weight": np.ones((tokens, 4)), "head.weight": np.ones((tokens, 4))}
    saved["head.bias"] = np.ones(tokens)
    most = 1 if tokens > 32 and not base.biased else 64
    with pytest.raises(AdapterMismatchError, match=message):
        added_tokens(adapter(saved=saved), base, most)


def test_without_its_added_tokens_an_adapter_has_the_size_of_the_base() -> None:
    rows = {"head.weight": Rows((3, 32, 33), np.ones((3, 4)))}
    carried = {"embed.weight": table(2)}
    found = without_added(adapter(factors=factors(34), carried=carried, rows=rows), UNTIED)
    assert found.carried == {}
    assert found.rows["head.weight"].indices == (3,)
    assert found.rows["embed.weight"].values.shape == (0, 4)
    assert found.factors["head"].B.shape == (32, 2)
    assert found.factors["embed"].A.shape == (2, 32)
