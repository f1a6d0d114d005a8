"""The cache of a decoder grows, or stays where it is."""

from __future__ import annotations

import numpy as np
import onnxruntime

from loradeploy.bundle.manifest import TensorSpec
from loradeploy.runtime.cache import Cache
from tests.bundle.test_manifest import a_manifest

PAST = ("past_key_values.0.key", "past_key_values.0.value")
PRESENT = ("present.0.key", "present.0.value")


def a_cache(padding: str) -> Cache:
    inputs = tuple(TensorSpec(name, "float32", ("batch", 2, "past", 4)) for name in PAST)
    return Cache(a_manifest(inputs=inputs, padding=padding), ("cpu", 0), batch=3, positions=7)


def test_a_cache_that_grows_starts_empty_and_takes_what_a_run_gave() -> None:
    cache = a_cache("left")
    assert cache.outputs == PRESENT
    assert [value.shape() for value in cache.inputs.values()] == [[3, 2, 0, 4]] * 2
    assert tuple(cache.inputs) == PAST
    assert not cache.places
    given = [
        onnxruntime.OrtValue.ortvalue_from_numpy(np.full((3, 2, 1, 4), n, np.float32))
        for n in range(2)
    ]
    cache.keep(given)
    assert [value.numpy().max() for value in cache.inputs.values()] == [0, 1]


def test_a_cache_in_place_is_written_where_it_is_read() -> None:
    cache = a_cache("right")
    assert [value.shape() for value in cache.inputs.values()] == [[3, 2, 7, 4]] * 2
    assert tuple(cache.inputs) == PAST
    read = [value.data_ptr() for value in cache.inputs.values()]
    assert [cache.places[name].data_ptr() for name in PRESENT] == read
    cache.keep(list(cache.places.values()))
    assert [value.data_ptr() for value in cache.inputs.values()] == read
