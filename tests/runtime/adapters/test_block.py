"""Copies of arrays in one memory block keep their values, order and alignment."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from loradeploy.runtime.adapters.block import empty_block, in_one_block

SHAPES = {"a.lora_A": (1, 5, 3), "a.lora_B": (1, 3, 7), "nothing": (1, 5, 0), "scale": (2, 9)}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arrays_are_contiguous_with_equal_values(dtype: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}
    block = in_one_block(arrays)
    gc.collect()  # the arrays keep the block alive
    places = [values.ctypes.data for values in block.values()]
    assert list(block) == list(arrays)
    for name, values in block.items():
        assert values.dtype == dtype
        assert values.flags.c_contiguous and values.flags.writeable
        np.testing.assert_array_equal(values, arrays[name])
    assert places == sorted(places)
    assert all(place % 64 == 0 for place in places)
    # At most one cache line of padding after each array.
    assert places[-1] - places[0] <= sum(v.nbytes for v in arrays.values()) + 64 * len(arrays)


def test_no_two_arrays_of_a_block_overlap() -> None:
    block = empty_block(SHAPES, np.dtype(np.float32))
    for number, values in enumerate(block.values()):
        values[...] = number
    for number, values in enumerate(block.values()):
        assert (values == number).all()


def test_a_block_of_no_arrays_is_empty() -> None:
    assert in_one_block({}) == {}
