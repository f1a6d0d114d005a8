"""Random requests: mixed rows, padding, prompts in parts, steps and selected positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

import loradeploy as ld
from loradeploy.runtime.session import AdapterSession
from tests.conftest import once
from tests.runtime.requests import DecoderRequest, RowsInTorch, largest_error, requests
from tests.tolerances import tolerance

NAMES = ("small", "large", "partial")
VOCABULARY = 512
FORMS: dict[str, dict[str, Any]] = {
    "rows": {},
    "slots with branches": {"layout": "slots", "branches": True},
    "in place": {"attention": "gqa", "layout": "rows"},
}


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, llama_adapters: dict[str, Path]) -> RowsInTorch:
    return RowsInTorch(tiny_llama, llama_adapters)


@pytest.fixture(scope="module", params=FORMS)
def session(
    request: pytest.FixtureRequest,
    tiny_llama_bundle: Path,
    llama_adapters: dict[str, Path],
    shared: Path,
) -> Iterator[AdapterSession]:
    place = once(
        shared / f"bundle-llama-{request.param.replace(' ', '-')}",
        lambda partial: ld.export(tiny_llama_bundle, partial, **FORMS[request.param]),
    )
    with AdapterSession(place) as opened:
        for name, path in llama_adapters.items():
            opened.load(name, path)
        yield opened


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(request=requests(NAMES))
def test_each_row_has_the_logits_that_pytorch_computes_for_it_alone(
    request: DecoderRequest, session: AdapterSession, expected: RowsInTorch
) -> None:
    error = largest_error(session, request, expected, VOCABULARY)
    assert error <= tolerance("random-models")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda right: DecoderRequest(right.adapters[::-1], right.lengths),
        lambda right: DecoderRequest((None, None, "small"), right.lengths),
    ],
    ids=["rows exchanged", "one row without its adapter"],
)
def test_a_row_with_another_adapter_is_found(
    wrong: Callable[[DecoderRequest], DecoderRequest],
    session: AdapterSession,
    expected: RowsInTorch,
) -> None:
    """The negative control: PyTorch computes the rows of `right`, the session those of `wrong`."""
    right = DecoderRequest(("large", None, "small"), (5, 5, 5))

    class Swapped(RowsInTorch):
        def __init__(self) -> None:
            self._models = expected._models
            self._names = iter(right.adapters)

        def logits(self, adapter: str | None, tokens: Any) -> Any:
            return super().logits(next(self._names), tokens)

    error = largest_error(session, wrong(right), Swapped(), VOCABULARY)
    assert error > 100 * tolerance("random-models")
