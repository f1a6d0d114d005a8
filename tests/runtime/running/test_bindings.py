"""A cache in place is bound once; results are the same as with binding it for every run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from loradeploy.bundle.names import present_of
from loradeploy.errors import UsageError
from loradeploy.runtime.cache import DecoderCache, cache_inputs
from loradeploy.runtime.running.bindings import FixedBuffers
from loradeploy.runtime.session import AdapterSession

STEPS = (("small", "small"), ("small", "large"), ("small", "large"), (None, None), ("small",) * 2)
POSITIONS = 8


@pytest.fixture
def session(in_place: Path, llama_adapters: dict[str, Path]) -> AdapterSession:
    session = AdapterSession(in_place)
    for name, path in llama_adapters.items():
        session.load(name, path)
    return session


def cache_of(session: AdapterSession) -> tuple[dict[str, np.ndarray[Any, Any]], FixedBuffers]:
    """Return an empty cache of two rows, as arrays and as bound buffers."""
    arrays = {
        spec.name: np.zeros((2, int(spec.shape[1]), POSITIONS, int(spec.shape[3])), spec.dtype)
        for spec in cache_inputs(session.manifest)
    }
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()
    }
    outputs = {present_of(name): value for name, value in values.items()}
    return arrays, FixedBuffers(values, outputs)


def feeds_of(rows: int, number: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return inputs of one token per row, at position `number`."""
    ids = np.array([[5 + number], [9 + number]], np.int64)[:rows]
    return {
        "input_ids": ids,
        "attention_mask": np.ones((rows, number + 1), np.int64),
        "position_ids": np.full((rows, 1), number, np.int64),
    }


def step(
    session: AdapterSession,
    number: int,
    adapters: Any,
    fixed: FixedBuffers,
    buffers: Mapping[str, onnxruntime.OrtValue],
) -> np.ndarray[Any, Any]:
    """Run one step at position `number` and return its logits."""
    feeds = {**feeds_of(2, number), **fixed.inputs}
    outputs = session.run_with_ort_values(["logits", *fixed], feeds, adapters, buffers=buffers)
    return np.array(outputs[0].numpy())


def test_steps_equal_those_with_everything_bound_again(session: AdapterSession) -> None:
    kept, kept_buffers = cache_of(session)
    anew, anew_buffers = cache_of(session)
    found = []
    for number, adapters in enumerate(STEPS):
        logits = step(session, number, list(adapters), kept_buffers, kept_buffers)
        other = step(session, number, list(adapters), anew_buffers, dict(anew_buffers))
        np.testing.assert_array_equal(logits, other)
        found.append(logits)
        for name, array in kept.items():
            np.testing.assert_array_equal(array, anew[name])
    _, base = cache_of(session)
    alone = step(session, 0, None, base, base)
    assert np.abs(found[0] - alone).max() > 0.01  # the adapter has an effect
    assert np.abs(found[1][1] - found[1][0]).max() > 0.01


def test_a_step_binds_only_values_that_changed(
    session: AdapterSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fixed = cache_of(session)
    bound: list[str] = []
    bind = onnxruntime.IOBinding.bind_ortvalue_input

    def counted(binding: Any, name: str, value: Any) -> None:
        bound.append(name)
        bind(binding, name, value)

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_ortvalue_input", counted)
    with session.hold(["small", "large"]) as held:
        for number in range(2):
            bound.clear()
            feeds = {**feeds_of(2, number), **fixed.inputs}
            held.run_with_ort_values(["logits", *fixed], feeds, buffers=fixed)
    assert set(feeds_of(2, 0)) <= set(bound)
    assert len(set(bound) & set(fixed.inputs)) <= 1  # the one that has the number of rows
    assert not set(bound) & set(session.manifest.factors)


def test_bindings_are_dropped_with_the_side_inputs(session: AdapterSession) -> None:
    _, fixed = cache_of(session)
    step(session, 0, "large", fixed, fixed)
    assert fixed._kept is not None
    session.unload("large")
    gc.collect()
    assert fixed._kept is None


def test_another_number_of_rows_is_refused(session: AdapterSession) -> None:
    _, fixed = cache_of(session)
    feeds = {**feeds_of(1, 0), **fixed.inputs}
    with pytest.raises(UsageError, match="do not fit together"):
        session.run_with_ort_values(["logits", *fixed], feeds, None, buffers=fixed)


def steps_of(session: AdapterSession, cache: DecoderCache, adapters: Any, count: int) -> None:
    """Run steps of two rows with the buffers of a session's cache."""
    for number in range(count):
        cache.make_room(number + 1, POSITIONS)
        _, *present = session.run_with_ort_values(
            ["logits", *cache.outputs],
            {**feeds_of(2, number), **cache.inputs},
            adapters,
            buffers=cache.buffers,
        )
        cache.keep(present)


def test_a_cache_of_the_session_is_bound_once_and_leaves_the_side_inputs_bound(
    session: AdapterSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[str] = []
    bind = onnxruntime.IOBinding.bind_ortvalue_input

    def counted(binding: Any, name: str, value: Any) -> None:
        bound.append(name)
        bind(binding, name, value)

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_ortvalue_input", counted)
    cache, other = session.empty_cache(2), session.empty_cache(2)
    steps_of(session, cache, "small", 4)
    inputs, factors = set(cache.inputs), set(session.manifest.factors)
    assert sum(name in inputs for name in bound) == len(inputs) + 4  # one tells the rows
    assert sum(name in factors for name in bound) == len(factors)
    values = [weakref.ref(value) for value in cache.inputs.values()]
    cache.release()
    del cache
    assert not any(value() for value in values)  # the binding does not keep them
    bound.clear()
    steps_of(session, other, "small", 2)
    assert not factors & set(bound)


def test_the_buffers_of_a_cache_are_freed_without_garbage_collection(
    session: AdapterSession,
) -> None:
    cache = session.empty_cache(2)
    steps_of(session, cache, "small", 1)
    values = [weakref.ref(value) for value in cache.inputs.values()]
    gc.disable()
    try:
        cache.take_rows([0])
        assert not any(value() for value in values)
    finally:
        gc.enable()
