"""The kernel of GroupQueryAttention computes what onnxruntime's node computes, also in place."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from loradeploy.bundle.names import OPERATOR_DOMAIN
from tests.runtime.operator.nodes import FLOAT, INT32, single_node
from tests.tolerances import tolerance

Arrays = dict[str, NDArray[Any]]

# heads, key heads, size
HEADS = {"9 of 3": (9, 3, 64), "one": (4, 1, 128), "each its own": (8, 8, 80)}
# new tokens, positions of the past, the tokens of each row with the new ones, total_sequence_length
CALLS: dict[str, tuple[int, int, list[int], int]] = {
    "prompt": (50, 0, [50, 22], 50),
    "prompt in a buffer": (50, 160, [50, 22], 50),
    "step": (1, 500, [501, 4], 501),
    "step in a buffer": (1, 160, [151, 3], 151),
    "fewer positions than tokens": (1, 16, [10, 4], 6),
    "first step": (1, 0, [1, 1], 1),
    "part of a prompt": (30, 50, [80], 80),
    "part of a prompt in a buffer": (30, 160, [80], 80),
    "shorter past": (3, 5, [6], 8),
}


def _inputs(call: str, heads: str, seed: int = 0) -> Arrays:
    new, past, tokens, total = CALLS[call]
    count, key_heads, size = HEADS[heads]
    random, batch = np.random.default_rng(seed), len(tokens)

    def numbers(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape, np.float32)

    return {
        "q": numbers(batch, new, count * size),
        "k": numbers(batch, new, key_heads * size),
        "v": numbers(batch, new, key_heads * size),
        "past_key": numbers(batch, key_heads, past, size),
        "past_value": numbers(batch, key_heads, past, size),
        "seqlens_k": np.array(tokens, np.int32) - 1,
        "total": np.array(total, np.int32),
    }


INPUTS = dict.fromkeys(("q", "k", "v", "past_key", "past_value"), FLOAT)
INPUTS |= dict.fromkeys(("seqlens_k", "total"), INT32)
OUTPUTS = ("y", "present_key", "present_value")


@cache
def _session(
    library: Path | None, heads: str, threads: int, attributes: tuple[tuple[str, Any], ...]
) -> onnxruntime.InferenceSession:
    count, key_heads, _ = HEADS[heads]
    domain = "com.microsoft" if library is None else OPERATOR_DOMAIN
    own = {"num_heads": count, "kv_num_heads": key_heads, **dict(attributes)}
    return single_node(
        "GroupQueryAttention", domain, INPUTS, OUTPUTS, own, library=library, threads=threads
    )


def _run(
    library: Path | None, heads: str, given: Arrays, *, threads: int = 1, **attributes: Any
) -> list[NDArray[np.float32]]:
    """y and the present keys and values, of the library's kernel or of onnxruntime's (None)."""
    opened = _session(library, heads, threads, tuple(attributes.items()))
    results: list[NDArray[np.float32]] = opened.run(None, given)
    return results


def _run_in_place(
    library: Path | None, heads: str, given: Arrays, *, threads: int = 1
) -> list[NDArray[np.float32]]:
    """As `_run`, with the buffers of the past as the present ones."""
    opened = _session(library, heads, threads, ())
    binding = opened.io_binding()
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(array.copy())
        for name, array in given.items()
    }
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("y")
    binding.bind_ortvalue_output("present_key", values["past_key"])
    binding.bind_ortvalue_output("present_value", values["past_value"])
    opened.run_with_iobinding(binding)
    written = (binding.get_outputs()[0], values["past_key"], values["past_value"])
    return [value.numpy().copy() for value in written]  # the views do not keep the buffers


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("call", CALLS)
def test_the_kernel_computes_what_onnxruntime_computes(
    operator_library: Path, call: str, heads: str, attributes: dict[str, float]
) -> None:
    given = _inputs(call, heads)
    results = _run(operator_library, heads, given, **attributes)
    correct = _run(None, heads, given, **attributes)
    assert np.abs(results[0] - correct[0]).max() <= tolerance("attention")
    for present, other in zip(results[1:], correct[1:], strict=True):
        np.testing.assert_array_equal(present, other)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("call", [call for call in CALLS if "in a buffer" in call])
def test_the_cache_is_updated_in_place(
    operator_library: Path, call: str, heads: str, threads: int
) -> None:
    given = _inputs(call, heads)
    results = _run_in_place(operator_library, heads, given, threads=threads)
    correct = _run_in_place(None, heads, given)
    copied = _run(operator_library, heads, given)
    np.testing.assert_array_equal(results[0], copied[0])
    assert np.abs(results[0] - correct[0]).max() <= tolerance("attention")
    for name, present, other in zip(OUTPUTS[1:], results[1:], correct[1:], strict=True):
        np.testing.assert_array_equal(present, other)
        # Only the new tokens are written.
        changed = (present != given[name.replace("present", "past")]).any(axis=3)
        assert changed.sum() == given["q"].shape[1] * changed[:, :, 0].size


@pytest.mark.parametrize("call", CALLS)
def test_several_threads_compute_the_same(operator_library: Path, call: str) -> None:
    given = _inputs(call, "9 of 3")
    one, several = (_run(operator_library, "9 of 3", given, threads=n) for n in (1, 4))
    for result, other in zip(one, several, strict=True):
        np.testing.assert_array_equal(result, other)


@pytest.mark.parametrize("call", [call for call in CALLS if len(CALLS[call][2]) > 1])
def test_a_row_does_not_depend_on_the_other_rows(operator_library: Path, call: str) -> None:
    given = _inputs(call, "9 of 3")
    together = _run(operator_library, "9 of 3", given)
    for row in range(2):
        alone = {name: array[row : row + 1] for name, array in given.items() if name != "total"}
        results = _run(operator_library, "9 of 3", {**alone, "total": given["total"]})
        for result, other in zip(results, together, strict=True):
            np.testing.assert_array_equal(result[0], other[row])


def test_a_prompt_read_in_parts_gets_the_same_rows(operator_library: Path) -> None:
    CALLS["whole"] = (150, 160, [150], 150)
    given = _inputs("whole", "9 of 3")
    del CALLS["whole"]
    whole = _run_in_place(operator_library, "9 of 3", given)[0]
    cache = {name: given[name] for name in ("past_key", "past_value")}
    begin = 0
    for part in (70, 1, 64, 15):
        end = begin + part
        step = {name: given[name][:, begin:end] for name in ("q", "k", "v")} | cache
        step["seqlens_k"], step["total"] = np.array([end - 1], np.int32), np.array(end, np.int32)
        y, cache["past_key"], cache["past_value"] = _run_in_place(operator_library, "9 of 3", step)
        np.testing.assert_array_equal(y, whole[:, begin:end])
        begin = end


def test_the_past_changes_the_result(operator_library: Path) -> None:
    given = _inputs("step in a buffer", "9 of 3")
    result = _run(operator_library, "9 of 3", given)[0]
    given["past_value"][0, 0, 149] += 1
    changed = np.abs(_run(operator_library, "9 of 3", given)[0] - result).max(axis=(1, 2))
    assert (changed > 0).tolist() == [True, False]
    given["past_value"][:, :, 151:] = np.nan  # beyond the tokens of all rows
    again = _run(operator_library, "9 of 3", given)[0]
    assert np.isfinite(again).all()


def test_no_new_tokens_leave_the_cache(operator_library: Path) -> None:
    given = _inputs("step in a buffer", "9 of 3")
    given |= {name: given[name][:, :0] for name in "qkv"}
    for results in (
        _run(operator_library, "9 of 3", given),
        _run_in_place(operator_library, "9 of 3", given),
    ):
        assert results[0].shape == given["q"].shape
        for row, tokens in enumerate(given["seqlens_k"] + 1):
            for name, present in zip(("past_key", "past_value"), results[1:], strict=True):
                np.testing.assert_array_equal(
                    present[row, :, :tokens], given[name][row, :, :tokens]
                )


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [
        ("step", {"seqlens_k": [500, -1]}, "seqlens_k has -1"),
        ("step", {"seqlens_k": [501, 3]}, "seqlens_k has 501"),
        ("step", {"seqlens_k": [500]}, r"seqlens_k is \[1\], expected \[2\]"),
        ("shorter past", {"seqlens_k": [1]}, "seqlens_k has 1 for 3 new tokens"),
        ("step", {"total": 503}, "total_sequence_length is 503, the past has 500"),
        ("step", {"total": [501, 501]}, r"total_sequence_length is \[2\], expected one number"),
        ("prompt in a buffer", {"total": 60}, "several rows have several new tokens after a past"),
        ("step", {"k": np.zeros((2, 1, 191))}, r"k is \[2, 1, 191\], expected \[2, 1, 192\]"),
        ("step", {"v": np.zeros((2, 2, 192))}, r"v is \[2, 2, 192\], expected \[2, 1, 192\]"),
        ("step", {"q": np.zeros((2, 1, 577))}, r"q is \[2, 1, 577\] with 9 heads"),
        ("step", {"past_value": np.zeros((2, 3, 499, 64))}, r"past_value is \[2, 3, 499, 64\]"),
        ("step", {"past_key": np.zeros((2, 2, 500, 64))}, r"past_key is \[2, 2, 500, 64\]"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_inputs_that_do_not_fit_are_refused(
    operator_library: Path, call: str, changes: dict[str, Any], message: str
) -> None:
    given = _inputs(call, "9 of 3")
    for name, values in changes.items():
        given[name] = np.array(values, given[name].dtype)
    with pytest.raises(Exception, match=message):
        _run(operator_library, "9 of 3", given)


@pytest.mark.parametrize(
    "attributes",
    [{"do_rotary": 1}, {"local_window_size": 8}, {"smooth_softmax": 1}, {"num_heads": 8}],
    ids=str,
)
def test_attributes_that_are_not_computed_are_refused(
    operator_library: Path, attributes: dict[str, int]
) -> None:
    with pytest.raises(Exception, match=next(iter(attributes))):
        _run(operator_library, "9 of 3", _inputs("step", "9 of 3"), **attributes)


def test_parts_of_one_buffer_are_refused(operator_library: Path) -> None:
    given = _inputs("step in a buffer", "one")
    opened = _session(operator_library, "one", 1, ())
    buffer = np.zeros((3, 1, 160, 128), np.float32)
    binding = opened.io_binding()
    for name, array in given.items():
        binding.bind_cpu_input(name, buffer[:2] if name == "past_key" else array)
    for name in ("y", "present_value"):
        binding.bind_output(name)
    overlapping = buffer[1:]
    binding.bind_output(
        "present_key", "cpu", 0, np.float32, overlapping.shape, overlapping.ctypes.data
    )
    with pytest.raises(Exception, match="past and present are different parts of one buffer"):
        opened.run_with_iobinding(binding)
