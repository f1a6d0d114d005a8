"""The soak test distinguishes texts that differ by rounding from wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tools import soak_engine
from tools.soak_engine import LoneAnswer, answer_alone

# Rounding decides the second of three tokens, and whether the text ends before or after the third.
LONE = LoneAnswer(
    (1, 2, 3),
    (frozenset({1}), frozenset({2, 5}), frozenset({3, 0}), frozenset({0, 4})),
    ends=frozenset({0}),
)


@pytest.mark.parametrize(
    ("ids", "whole", "differs", "tied"),
    [
        ((1, 2, 3), True, False, False),
        ((1, 2), False, False, False),  # canceled
        ((1, 2), True, True, True),  # the token that ends a text is not in its ids
        ((1, 5, 9), True, True, True),  # another text after the tie
        ((1, 5), False, True, True),
        ((1, 6, 3), True, True, False),
        ((7, 2, 3), True, True, False),
        ((1,), True, True, False),  # truncated
        ((1, 2, 3, 4), True, True, True),
        ((1, 2, 3, 8), True, True, False),
    ],
)
def test_only_tokens_decided_by_rounding_can_differ(
    ids: Sequence[int], whole: bool, differs: bool, tied: bool
) -> None:
    assert LONE.differs(ids, whole=whole) is differs
    if differs:
        assert LONE.tied(ids) is tied


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9}, {"temperature": 0.9, "n": 2}])
def test_the_tokens_near_each_choice_depend_on_the_size_of_rounding(
    tiny_llama_bundle: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    with AdapterSession(tiny_llama_bundle) as session:
        generator = TextGenerator(session)
        request = ("Shares rose", None, {"max_new_tokens": 4, **options})
        prompt, adapter, settings = request
        expected = [text.token_ids for text in generator.generate([prompt], adapter, **settings)]
        monkeypatch.setattr(soak_engine, "_ROUNDING", 0)
        exact = answer_alone(generator, request)
        monkeypatch.setattr(soak_engine, "_ROUNDING", 1e3)
        noisy = answer_alone(generator, request)
    assert [text.ids for text in exact] == [text.ids for text in noisy] == expected
    assert all(len(near) == 1 for text in exact for near in text.near)
    assert all(len(near) > 1 for text in noisy for near in text.near)
