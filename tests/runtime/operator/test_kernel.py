"""The operator's kernel computes what numpy computes, and refuses inputs that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.operator.kernel import Arrays, call, expected, inputs, session
from tests.tolerances import tolerance


@pytest.fixture(scope="module")
def opened(operator_library: Path) -> onnxruntime.InferenceSession:
    return session(operator_library)


@st.composite
def calls(draw: st.DrawFn) -> Arrays:
    ranks = draw(st.lists(st.integers(0, 64), min_size=1, max_size=5))
    batch = draw(st.integers(1, 16))
    rows = draw(st.sampled_from([1, batch]))
    slots = st.integers(-len(ranks), len(ranks) - 1)
    return inputs(
        batch=batch,
        sequence=draw(st.integers(1, 40)),
        into=draw(st.integers(1, 70)),
        out=draw(st.integers(1, 150)),
        ranks=ranks,
        ids=draw(st.lists(slots, min_size=rows, max_size=rows)),
        stored=max(ranks) + draw(st.integers(0, 9)),
        seed=draw(st.integers(0, 99)),
    )


@given(calls())
@settings(max_examples=200, deadline=None)
def test_the_kernel_computes_what_numpy_computes(opened: Any, given: Arrays) -> None:
    result, correct = call(opened, given), expected(given)
    size = np.abs(correct).max()
    assert np.abs(result - correct).max() <= tolerance("operator") * max(size, 1)


def test_the_update_changes_the_result(opened: Any) -> None:
    given = inputs(batch=2, sequence=3, into=8, out=8, ranks=[4], ids=[0])
    assert np.abs(call(opened, given) - given["y"]).max() > 1


@given(calls())
@settings(max_examples=100, deadline=None)
def test_ranks_change_nothing_but_what_is_read(opened: Any, given: Arrays) -> None:
    whole = given | {"adapter_ranks": np.zeros((0, 2), np.int64)}
    np.testing.assert_array_equal(call(opened, given), call(opened, whole))


def test_nothing_is_read_beyond_an_adapters_rank(opened: Any) -> None:
    given = inputs(batch=3, sequence=2, into=20, out=30, ranks=[3, 8, 0], ids=[0, 1, 2], stored=16)
    correct = call(opened, given)
    for slot, rank in enumerate((3, 8, 0)):
        given["A"][slot, :, rank:], given["B"][slot, rank:] = np.nan, np.nan
    np.testing.assert_array_equal(call(opened, given), correct)


@given(calls())
@settings(max_examples=100, deadline=None)
def test_a_row_does_not_depend_on_the_other_rows(opened: Any, given: Arrays) -> None:
    together = call(opened, given)
    ids = np.broadcast_to(given["adapter_ids"], len(together))
    for row in range(len(together)):
        for token in (0, together.shape[1] - 1):
            slot = int(ids[row])
            rank = int(given["adapter_ranks"][slot, 1])
            alone = call(
                opened,
                {
                    "y": given["y"][row : row + 1, token : token + 1],
                    "x": given["x"][row : row + 1, token : token + 1],
                    # As an adapter of its own, without padding and ranks.
                    "A": given["A"][[slot], :, :rank],
                    "B": given["B"][[slot], :rank],
                    "adapter_ids": np.zeros(1, np.int64),
                    "adapter_ranks": np.zeros((0, 2), np.int64),
                },
            )
            np.testing.assert_array_equal(together[row, token], alone[0, 0])


CALLS: dict[str, dict[str, Any]] = {
    "decode": {"batch": 8, "sequence": 1, "into": 576, "out": 1536, "ids": [0, 1, 2, 3] * 2},
    "prompts": {"batch": 8, "sequence": 100, "into": 576, "out": 1536, "ids": [0, 1, 2, 3] * 2},
    # The factors of a large layer are divided between threads if there are few rows, and read block
    # by block if there are many.
    "large, one row": {"batch": 1, "sequence": 1, "into": 2051, "out": 4103, "ids": [1]},
    "large, few rows": {"batch": 9, "sequence": 1, "into": 2051, "out": 4103, "ids": [1] * 8 + [0]},
    "large, a prompt": {"batch": 1, "sequence": 61, "into": 2051, "out": 4103, "ids": [1]},
}


@pytest.mark.parametrize("name", CALLS)
def test_several_threads_compute_the_same(operator_library: Path, name: str) -> None:
    given = inputs(**CALLS[name], ranks=[16, 69, 8, 4])
    one, several = (call(session(operator_library, threads=n), given) for n in (1, 4))
    np.testing.assert_array_equal(one, several)
    assert np.abs(one - expected(given)).max() <= tolerance("operator") * np.abs(one).max()


@pytest.mark.parametrize("name", CALLS)
def test_a_token_of_a_large_layer_does_not_depend_on_the_others(opened: Any, name: str) -> None:
    given = inputs(**CALLS[name], ranks=[16, 69, 8, 4])
    together = call(opened, given)
    for token in (0, together.shape[1] - 1):
        alone = given | {each: given[each][:, [token]] for each in ("x", "y")}
        np.testing.assert_array_equal(together[:, [token]], call(opened, alone))


def test_a_value_that_is_not_finite_stays_in_its_row(opened: Any) -> None:
    given = inputs(batch=4, sequence=2, into=9, out=17, ranks=[4, 4], ids=[0, 1, 0, 1])
    given["B"][1, 0, 0] = np.nan
    finite = np.isfinite(call(opened, given)).all(axis=(1, 2))
    assert finite.tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_ids": [0, 2]}, "adapter_ids has 2, there are 2 slots"),
        ({"adapter_ids": [-3, 0]}, "adapter_ids has -3, there are 2 slots"),
        ({"adapter_ids": [0, 1, 0]}, r"adapter_ids is \[3\], expected \[1\]"),
        ({"adapter_ids": []}, r"adapter_ids is \[0\], expected \[1\]"),
        ({"adapter_ranks": [[0, 5], [0, 1]]}, "adapter_ranks has 5, A has the rank 4"),
        ({"adapter_ranks": [[0, -1], [0, 1]]}, "adapter_ranks has -1"),
        ({"adapter_ranks": [[0, 1]]}, r"adapter_ranks is \[1, 2\], expected \[2, 2\]"),
        ({"adapter_ranks": [[1], [1]]}, r"target 1 is not in adapter_ranks \[2, 1\]"),
        ({"x": np.zeros((2, 3, 7))}, r"A is \[2, 8, 4\], expected \[2, 7, 4\]"),
        ({"y": np.zeros((2, 3, 7))}, r"y is \[2, 3, 7\], expected \[2, 3, 6\]"),
        ({"y": np.zeros((2, 2, 6))}, r"y is \[2, 2, 6\], expected \[2, 3, 6\]"),
        ({"B": np.zeros((2, 3, 6))}, r"B is \[2, 3, 6\], expected \[2, 4, 6\]"),
        ({"B": np.zeros((1, 4, 6))}, r"B is \[1, 4, 6\], expected \[2, 4, 6\]"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_inputs_that_do_not_fit_are_refused(
    opened: Any, changes: dict[str, Any], message: str
) -> None:
    given = inputs(batch=2, sequence=3, into=8, out=6, ranks=[4, 4], ids=[0, 1])
    for name, values in changes.items():
        given[name] = np.array(values, given[name].dtype)
    with pytest.raises(Exception, match=message):
        call(opened, given)


@pytest.mark.parametrize(
    ("name", "axis"), [("x", 0), ("x", 1), ("y", 2)], ids=["no rows", "no tokens", "no outputs"]
)
def test_an_empty_batch_gives_an_empty_result(opened: Any, name: str, axis: int) -> None:
    given = inputs(batch=2, sequence=3, into=8, out=6, ranks=[4], ids=[0])
    empty = {"x": ("x", "y"), "y": ("y", "B")}[name]
    for each in empty:
        given[each] = given[each].take([], axis=axis)
    assert call(opened, given).size == 0


def test_no_slots_are_refused(opened: Any) -> None:
    given = inputs(batch=2, sequence=3, into=8, out=6, ranks=[4], ids=[0])
    for name in ("A", "B", "adapter_ranks"):
        given[name] = given[name][:0]
    with pytest.raises(Exception, match="there are 0 slots"):
        call(opened, given)
