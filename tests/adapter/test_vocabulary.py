"""The vocabulary that an adapter was trained with, by its tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.fitting.vocabulary import Vocabulary, resized_vocabulary
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
def test_no_base_is_cut_for_an_adapter_that_lacks_the_tables(
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
def test_a_base_is_cut_for_an_adapter_that_has_the_tables(
    parts: dict[str, Any], base: Vocabulary
) -> None:
    assert resized_vocabulary(adapter(**parts), base) == 30


def test_factors_of_the_bases_size_change_no_vocabulary() -> None:
    assert resized_vocabulary(adapter(factors=factors(32)), UNTIED) is None
