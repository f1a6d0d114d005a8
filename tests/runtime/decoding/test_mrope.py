"""Three-dimensional positions, compared with transformers' `get_rope_index`."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest

from loradeploy.errors import UsageError
from loradeploy.runtime.decoding.mrope import check_grids, grid_positions, shift_of
from tests.inputs.qwen_vl import IMAGE, VISION, tokens_of

ROWS: Final[dict[str, list[list[Any]]]] = {
    "text alone": [[5, 6, 7]],
    "an image": [[5, (2, 3), 6, 7]],
    "a wide one": [[(1, 5), 6]],
    "a high one at the end": [[9, (4, 1)]],
    "one token": [[(1, 1)]],
    "several": [[5, (2, 2), 6, (3, 2), (1, 4), 7, 8]],
    "rows of other lengths": [[5, (3, 3), 6, 7], [5, 6], [(2, 1), (1, 2), 9]],
}


@pytest.fixture(scope="module", params=VISION)
def whole(request: pytest.FixtureRequest) -> Any:
    """A model of the family without weights: positions depend only on the config."""
    import torch
    import transformers

    config = getattr(transformers, f"{request.param}Config")(vision_config=VISION[request.param])
    with torch.device("meta"):
        return getattr(transformers, f"{request.param}Model")(config)


@pytest.mark.parametrize("rows", ROWS.values(), ids=list(ROWS))
def test_positions_are_those_of_transformers(whole: Any, rows: list[list[Any]]) -> None:
    import torch

    texts = [tokens_of(words) for words in rows]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    grids = [[word for word in words if not isinstance(word, int)] for words in rows]
    shapes = [[1, 2 * height, 2 * width] for own in grids for height, width in own]
    expected, deltas = whole.get_rope_index(
        ids,
        (ids == IMAGE).int(),
        image_grid_thw=torch.tensor(shapes) if shapes else None,
        attention_mask=mask,
    )
    for row, own in enumerate(grids):
        real = mask[row].numpy() == 1
        found = grid_positions(ids[row].numpy()[real] == IMAGE, own)
        assert np.array_equal(found, expected[:, row].numpy()[:, real])
        assert shift_of(own) == int(deltas[row])


def test_images_that_do_not_fit_their_tokens_are_refused() -> None:
    places = np.array([False, True, True, True, True, False])
    check_grids(places, [(2, 2)], "it")
    check_grids(places, [(1, 2), (2, 1)], "it")
    with pytest.raises(UsageError, match="it has 4 embeddings for images of 2 x 3"):
        check_grids(places, [(2, 3)], "it")
    with pytest.raises(UsageError, match="it has 4 embeddings for images of none"):
        check_grids(places, [], "it")
    with pytest.raises(UsageError, match="it has 4 embeddings for images of -2 x -2"):
        check_grids(places, [(-2, -2)], "it")
    with pytest.raises(UsageError, match="the embeddings of it have no `grids`"):
        check_grids(places, None, "it")
    apart = np.array([True, True, False, True, True])
    with pytest.raises(UsageError, match="an image of it has other tokens between its 2 x 2"):
        check_grids(apart, [(2, 2)], "it")
    check_grids(apart, [(1, 2), (1, 2)], "it")
