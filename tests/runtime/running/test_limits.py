"""Inputs for which a graph would fail or return wrong results are refused before the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from loradeploy.errors import LoraDeployError, RunError, UsageError
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.runtime.feeds import feeds, random_ids

Feeds = dict[str, Any]


@pytest.fixture(scope="module")
def session(tiny_llama_bundle: Path, llama_adapters: dict[str, Path]) -> AdapterSession:
    """A session on the tiny Llama: 512 tokens, 128 positions."""
    session = AdapterSession(tiny_llama_bundle)
    session.load("small", llama_adapters["small"])
    return session


def good(session: AdapterSession, rows: int = 2, length: int = 5) -> Feeds:
    return feeds(session.manifest, random_ids(rows, length))


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Feeds], Feeds]:
    return lambda values: {**values, name: change(values[name])}


REFUSED: dict[str, tuple[Callable[[Feeds], Any], str]] = {
    "no rows": (lambda f: {n: v[:0] for n, v in f.items()}, "there must be rows"),
    "no tokens": (changed("input_ids", lambda v: v[:, :0]), "there must be rows"),
    "two batches": (changed("attention_mask", lambda v: v[:1]), "2 for batch"),
    "two lengths": (changed("position_ids", lambda v: v[:, :3]), "5 for sequence"),
    "a token below zero": (changed("input_ids", lambda v: v * 0 - 1), "the token -1"),
    "a token too far": (changed("input_ids", lambda v: v * 0 + 512), "ends at 511"),
    "a mask of more": (changed("attention_mask", lambda v: np.ones((2, 9), int)), "of 9 tokens"),
    "a mask of less": (changed("attention_mask", lambda v: v[:, :2]), "of 2 tokens"),
    "a mask of twos": (changed("attention_mask", lambda v: v + 1), "takes 0 to 1"),
    "a position too far": (changed("position_ids", lambda v: v + 124), "takes 0 to 127"),
    "a position below zero": (changed("position_ids", lambda v: v - 1), "contains -1"),
    "another type": (changed("input_ids", lambda v: v * 1.5), "float64"),
    "another rank": (changed("input_ids", lambda v: v[0]), r"\[5\]"),
    "a value of another rank": (
        changed("input_ids", lambda v: onnxruntime.OrtValue.ortvalue_from_numpy(v[0])),
        r"\[5\]",
    ),
    "a value with a token too far": (
        changed("input_ids", lambda v: onnxruntime.OrtValue.ortvalue_from_numpy(v * 0 + 600)),
        "ends at 511",
    ),
    "no array": (changed("input_ids", lambda v: [[1], [1, 2]]), "makes no array"),
    "no mapping": (lambda f: list(f), "give a mapping"),
}


def test_a_graph_that_updates_its_cache_in_place_takes_no_padding_on_the_left(
    in_place: Path,
) -> None:
    session = AdapterSession(in_place)
    values = good(session)
    for hidden, fits in ((slice(3, None), True), (slice(0, 1), False), (slice(2, 3), False)):
        mask = np.ones_like(values["attention_mask"])
        mask[1, hidden] = 0
        given = {**values, "attention_mask": mask}
        if fits:
            assert np.isfinite(session.run(["logits"], given)[0]).all()
        else:
            with pytest.raises(UsageError, match="hides a token before others"):
                session.run(["logits"], given)


@pytest.mark.parametrize("what", REFUSED)
def test_an_input_that_would_give_wrong_results_is_refused(
    what: str, session: AdapterSession
) -> None:
    change, message = REFUSED[what]
    with pytest.raises(UsageError, match=message):
        session.run(["logits"], change(good(session)))
    assert np.isfinite(session.run(["logits"], good(session))[0]).all()


def test_an_error_of_onnxruntime_becomes_a_typed_one_line_error(session: AdapterSession) -> None:
    values = good(session)
    values["past_key_values.1.value"] = onnxruntime.OrtValue.ortvalue_from_numpy(
        np.zeros((2, 2, 0, 16))
    )
    with pytest.raises(RunError, match="onnxruntime cannot run") as raised:
        session.run(["logits"], values)
    assert "\n" not in str(raised.value)


def test_the_last_position_and_the_last_token_are_accepted(session: AdapterSession) -> None:
    values = feeds(session.manifest, np.full((1, 128), 511))
    assert np.isfinite(session.run(["logits"], values)[0]).all()


@pytest.mark.parametrize(
    "adapters",
    [
        *(3, [3, None], {"small"}, b"small", {"small": np.nan}, {"small": 1e39}, {}, ["small"]),
        *({"small": 10**400}, {"small": 1e38}, {"small": "1"}, {3: 1.0}, [b"small", None]),
    ],
    ids=repr,
)
def test_invalid_adapter_arguments_are_refused(adapters: Any, session: AdapterSession) -> None:
    with pytest.raises(UsageError):
        session.run(["logits"], good(session), adapters)


@pytest.mark.parametrize("name", [3, "", None, b"x", "\ud800"])
def test_the_name_of_an_adapter_must_be_valid_text(
    name: Any, session: AdapterSession, tmp_path: Path
) -> None:
    before = session.adapters
    with pytest.raises(UsageError, match="adapter"):
        session.register(name, tmp_path)
    assert session.adapters == before


@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        *[
            (prompts, {})
            for prompts in (None, 3, {"a"}, [None], [b"ab"], [[-1]], [[512]], [[True]])
        ],
        *[(prompts, {}) for prompts in ([[2**70]], ["\ud800"], [1, 2], [[1.5]], [[]], [])],
        *[("a", {"max_new_tokens": value}) for value in (None, 0, 1.5, "1", True)],
        *[("a", {"seed": value, "temperature": 1.0}) for value in (-1, 0.5, [1, 2], None)],
        *[("a", {"top_k": value, "temperature": 1.0}) for value in (-1, 2.5, "2")],
        *[("a", {"temperature": value}) for value in (-1.0, float("nan"), float("inf"), None)],
        ("a", {"batch_size": 0}),
    ],
    ids=repr,
)
def test_invalid_prompts_and_options_are_refused(
    prompts: Any, options: dict[str, Any], session: AdapterSession
) -> None:
    with pytest.raises(LoraDeployError):
        TextGenerator(session).generate(prompts, **options)
