"""Attention within images: image positions see all of their image and everything before it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import add_optional_input
from loradeploy.export.passes.tokens.image_blocks import join_image_blocks

WINDOW: Final = 2
# A sliding-window mask combined with the attention mask, from the positions of queries and keys.
GRAPH: Final = """
<ir_version: 10, opset_import: ["": 23]>
decoder (int64[batch, sequence] input_ids, int64[batch, total] attention_mask,
         int64[1, 1, sequence, 1] queries, int64[1, 1, 1, total] keys,
         int64 window, int64[2] axes,
         float[batch, 1, sequence, 4] q, float[batch, 1, total, 4] k)
    => (bool[batch, 1, sequence, total] mask, float[batch, 1, sequence, 4] y)
{
    causal = LessOrEqual (keys, queries)
    first = Sub (queries, window)
    near = Greater (keys, first)
    both = And (near, causal)
    real = Cast <to = 9> (attention_mask)
    row = Unsqueeze (real, axes)
    mask = And (both, row)
    y = Attention (q, k, k, mask)
}
"""


def _model(graph: str = GRAPH) -> ir.Model:
    model = ir.from_onnx_text(graph)
    none = np.zeros((1, 1), np.bool_)
    add_optional_input(model.graph, "inputs_embeds_mask", none, ["rows", "embeds"])
    return model


def _mask(past: int, places: NDArray[np.bool_] | None, real: NDArray[np.int64]) -> NDArray[Any]:
    model = _model()
    join_image_blocks(model)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    rows, total = real.shape
    sequence = total - past
    feeds: dict[str, Any] = {
        "input_ids": np.zeros((rows, sequence), np.int64),
        "attention_mask": real,
        "queries": np.arange(past, total).reshape(1, 1, -1, 1),
        "keys": np.arange(total).reshape(1, 1, 1, -1),
        "window": np.array(WINDOW),
        "axes": np.array([1, 2]),
        "q": np.zeros((rows, 1, sequence, 4), np.float32),
        "k": np.zeros((rows, 1, total, 4), np.float32),
    }
    if places is not None:
        feeds["inputs_embeds_mask"] = places
    found: NDArray[Any] = session.run(["mask"], feeds)[0]
    return found[:, 0]


def _expected(past: int, images: list[list[range]], real: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return the mask by definition; `images`: the ranges of the images of each row."""
    rows, total = real.shape
    found = np.zeros((rows, total - past, total), np.bool_)
    for row, own in enumerate(images):
        for query in range(past, total):
            for key in range(total):
                same = any(query in image and key in image for image in own)
                seen = (key <= query or same) and key > query - WINDOW
                found[row, query - past, key] = seen and real[row, key] == 1
    return found


@pytest.mark.parametrize("past", [0, 3])
def test_the_positions_of_an_image_see_each_other_within_the_window(past: int) -> None:
    real = np.ones((3, 9 + past), np.int64)
    real[2, :2] = 0  # left padding
    images = [
        [range(past + 1, past + 4), range(past + 5, past + 9)],  # one ends at the last position
        [range(past, past + 3)],  # starts at the first position
        [range(past + 4, past + 6)],
    ]
    places = np.zeros((3, 9), np.bool_)
    for row, own in enumerate(images):
        for image in own:
            places[row, [position - past for position in image]] = True
        assert all(first.stop < second.start for first, second in pairwise(own))
    found = _mask(past, places, real)
    assert np.array_equal(found, _expected(past, images, real))
    assert not np.array_equal(found, _expected(past, [[], [], []], real))


@pytest.mark.parametrize("past", [0, 3])
def test_text_positions_see_only_earlier_positions(past: int) -> None:
    real = np.ones((2, 5 + past), np.int64)
    assert np.array_equal(_mask(past, None, real), _expected(past, [[], []], real))


def test_an_attention_without_a_causal_mask_is_refused() -> None:
    model = _model(GRAPH.replace("LessOrEqual", "GreaterOrEqual"))
    with pytest.raises(ExportError, match="no attention with one causal mask"):
        join_image_blocks(model)
