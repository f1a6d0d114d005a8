"""Images that transformers' processor splits into tiles, as in docs/images.md."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pytest

import loradeploy as ld
from tests.conftest import once
from tests.inputs.vision_language import (
    _WORDS,
    IMAGE,
    NEW,
    TILE_TOKENS,
    make_family,
    tile_processor,
)

FAMILY: Final = "Idefics3"
# Split into 2 × 2 and 1 × 2 tiles; each has the whole image as one more tile.
_SIZES: Final = ((56, 56), (28, 56))
_TILES: Final = (4 + 1) + (2 + 1)


def test_text_generated_from_tiles_is_that_of_the_whole_model(shared: Path, tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    import torch
    from transformers import AutoModelForImageTextToText

    made = once(shared / f"images-{FAMILY}", lambda place: make_family(FAMILY, place))
    random = np.random.default_rng(0)
    pictures = [pillow.fromarray(random.integers(0, 256, (*size, 3), np.uint8)) for size in _SIZES]
    given = tile_processor()(
        text=["w11 <image> w12 <image> w13"], images=[pictures], return_tensors="pt"
    )
    pixels = given["pixel_values"][0].numpy()
    assert len(pixels) == _TILES
    ids = given["input_ids"][0].tolist()
    assert ids.count(IMAGE) == _TILES * TILE_TOKENS
    assert max(ids) < _WORDS

    for task in ("causal-lm", "vision-tower"):
        ld.export(made / "model", tmp_path / task, task=task, adapters={"all": made / "all"})
    generator = ld.ImageTextGenerator(
        *(ld.AdapterSession(tmp_path / task) for task in ("causal-lm", "vision-tower"))
    )
    (found,) = generator.generate([ids], [list(pixels)], max_new_tokens=NEW)
    model = AutoModelForImageTextToText.from_pretrained(made / "model").eval()
    with torch.no_grad():
        out = model.generate(**given, max_new_tokens=NEW, do_sample=False)
    end = model.generation_config.eos_token_id
    expected = [token for token in out[0, len(ids) :].tolist() if token != end]
    assert list(found.token_ids) == expected
    (other,) = generator.generate([ids], [list(pixels[::-1])], max_new_tokens=NEW)
    assert other.token_ids != found.token_ids, "the order of the tiles counts"
