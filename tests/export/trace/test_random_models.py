"""Random decoders with random adapters, in random forms, answer random requests as PyTorch does."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.errors import ExportError
from loradeploy.runtime.session import AdapterSession
from tests.inputs.adapters import random_adapter
from tests.inputs.random_models import VOCABULARY, random_decoder, random_lora
from tests.runtime.requests import DecoderRequest, RowsInTorch, largest_error
from tests.tolerances import tolerance

FORMS: tuple[dict[str, Any], ...] = (
    {"layout": "rows", "branches": True},
    {"layout": "slots", "branches": False},
    {"operator": True},
    {"attention": "gqa"},
    {"attention": "gqa", "operator": True},
)


def _request(random: Random, names: list[str | None]) -> DecoderRequest:
    rows = random.randint(1, 4)
    lengths = tuple(random.choice([1, 2, 3, 5, 9, 14, 20]) for _ in range(rows))
    return DecoderRequest(
        adapters=tuple(random.choice(names) for _ in range(rows)),
        lengths=random.choice([lengths, lengths[:1] * rows]),
        cuts=() if random.random() < 0.5 else (2, 7),
        steps=random.randint(0, 3),
        selects=random.random() < 0.3,
        seed=random.randrange(1 << 16),
    )


@pytest.mark.slow
@pytest.mark.breadth(10)
@pytest.mark.parametrize("seed", range(10))
def test_every_row_of_every_form_is_the_pytorch_model(seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    model = random_decoder(random, tmp_path / "model")
    adapters = {
        name: random_adapter(model, tmp_path / name, **random_lora(random, model)) for name in "ab"
    }
    ld.export(model, tmp_path / "bundle", adapters=adapters)
    expected = RowsInTorch(model, adapters)
    names: list[str | None] = [None, *adapters]
    tokens = np.arange(3, 12)
    base = expected.logits(None, tokens)
    for name in adapters:
        effect = np.abs(expected.logits(name, tokens) - base).max() / np.abs(base).max()
        assert effect > 100 * tolerance("random-models"), "the adapter does nothing"
    places = [(tmp_path / "bundle", names)]
    for number, form in enumerate((*random.sample(FORMS, 2), {"merge": True})):
        own = {"a": adapters["a"]} if form.get("merge") else adapters
        try:
            ld.export(tmp_path / "bundle", tmp_path / f"{number}", adapters=own, **form)
        except ExportError:
            continue  # the model does not support the form, and it is refused by name
        places.append((tmp_path / f"{number}", ["a"] if form.get("merge") else names))
    for place, known in places:
        with AdapterSession(place) as session:
            for _ in range(4):
                request = _request(random, known)
                error = largest_error(session, request, expected, VOCABULARY)
                assert error <= tolerance("random-models"), (place.name, request)
