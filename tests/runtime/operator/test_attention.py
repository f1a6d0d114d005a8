"""The kernel of Attention computes what onnxruntime's node computes, or refuses its inputs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from loradeploy.bundle.names import OPERATOR_DOMAIN
from tests.runtime.operator.nodes import BOOL, FLOAT, single_node
from tests.tolerances import tolerance

Arrays = dict[str, NDArray[Any]]

# batch, heads, key heads, queries, keys, size, value size
SHAPES = {
    "prompt": (2, 9, 3, 37, 37, 64, 64),
    "prompt of several blocks": (1, 4, 4, 130, 130, 32, 32),
    "prompt after a past": (2, 9, 3, 40, 150, 64, 64),
    "step": (8, 9, 3, 1, 257, 64, 64),
    "step with a long past": (1, 9, 3, 1, 2000, 64, 64),
    "a few tokens": (3, 32, 1, 4, 70, 128, 128),
    "largest size": (1, 2, 1, 3, 300, 256, 256),
    "odd sizes": (2, 5, 1, 7, 65, 42, 23),
    "small sizes": (2, 2, 2, 65, 129, 7, 9),
    "one key": (1, 2, 2, 1, 1, 8, 8),
}


def _causal(queries: int, keys: int) -> NDArray[np.bool_]:
    return np.asarray(np.arange(keys) <= np.arange(queries)[:, None] + keys - queries)


def _mask(kind: str, shape: tuple[int, ...]) -> NDArray[Any] | None:
    batch, heads, _, queries, keys, *_ = shape
    random = np.random.default_rng(7)
    causal = np.broadcast_to(_causal(queries, keys), (batch, 1, queries, keys)).copy()
    if kind == "none":
        return None
    if kind == "left padding":
        for row in range(batch):
            causal[row, :, :, : 9 * row] = False
    if kind == "right padding":
        for row in range(batch):
            causal[row, :, :, keys - 3 * row :] = False
    if kind == "window":
        causal &= np.arange(keys) > np.arange(queries)[:, None] + keys - queries - 20
    if kind == "tree":  # a node sees some of those before it, and itself
        causal &= (random.random(causal.shape) < 0.4) | np.eye(queries, keys, keys - queries, bool)
    if kind == "random per head":
        return np.asarray(random.random((batch, heads, queries, keys)) < 0.5)
    if kind == "two axes":
        return np.asarray(random.random((queries, keys)) < 0.5)
    if kind == "nothing is seen":
        return np.zeros((1, 1, queries, keys), np.bool_)
    numbers = random.standard_normal((1, heads, queries, keys), np.float32)
    if kind == "numbers":
        return numbers
    if kind == "numbers and infinity":
        return np.where(causal, numbers, np.float32(-np.inf))
    if kind == "the lowest float":
        return np.where(causal, np.float32(0), np.finfo(np.float32).min)
    return causal


MASKS = (
    "none",
    *("causal", "left padding", "right padding", "window", "tree", "random per head", "two axes"),
    *("nothing is seen", "numbers", "numbers and infinity", "the lowest float"),
)


def _inputs(shape: tuple[int, ...], mask: str = "none", seed: int = 0) -> Arrays:
    batch, heads, key_heads, queries, keys, size, value_size = shape
    random = np.random.default_rng(seed)
    given: Arrays = {
        "q": random.standard_normal((batch, heads, queries, size), np.float32),
        "k": random.standard_normal((batch, key_heads, keys, size), np.float32),
        "v": random.standard_normal((batch, key_heads, keys, value_size), np.float32),
    }
    made = _mask(mask, shape)
    return given if made is None else given | {"mask": made}


@cache
def _session(
    library: Path | None, mask: int | None, threads: int, attributes: tuple[tuple[str, Any], ...]
) -> onnxruntime.InferenceSession:
    inputs = dict.fromkeys("qkv", FLOAT) | ({} if mask is None else {"mask": mask})
    domain = "" if library is None else OPERATOR_DOMAIN
    return single_node(
        "Attention", domain, inputs, ["y"], dict(attributes), library=library, threads=threads
    )


def _run(
    library: Path | None, given: Arrays, *, threads: int = 1, **attributes: Any
) -> NDArray[np.float32]:
    """The result of the library's kernel, or of onnxruntime's (None)."""
    mask = given.get("mask")
    kind = None if mask is None else BOOL if mask.dtype == np.bool_ else FLOAT
    opened = _session(library, kind, threads, tuple(attributes.items()))
    result: NDArray[np.float32] = opened.run(None, given)[0]
    return result


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_kernel_computes_what_onnxruntime_computes(
    operator_library: Path, shape: tuple[int, ...], mask: str
) -> None:
    given = _inputs(shape, mask)
    result, correct = _run(operator_library, given), _run(None, given)
    assert np.abs(result - correct).max() <= tolerance("attention")


@pytest.mark.parametrize(
    "attributes",
    [{"scale": 0.3}, {"softcap": 2.0}, {"softcap": 50.0, "scale": 0.4}, {"is_causal": 1}],
    ids=str,
)
@pytest.mark.parametrize("mask", ["none", "tree", "numbers"])
def test_attributes_have_their_meaning(
    operator_library: Path, mask: str, attributes: dict[str, Any]
) -> None:
    given = _inputs(SHAPES["prompt"], mask)
    result = _run(operator_library, given, **attributes)
    correct, plain = _run(None, given, **attributes), _run(operator_library, given)
    assert np.abs(result - correct).max() <= tolerance("attention")
    assert np.abs(result - plain).max() > 1e-3 or (attributes, mask) == ({"is_causal": 1}, "tree")


def test_another_mask_gives_another_result(operator_library: Path) -> None:
    given = _inputs(SHAPES["prompt"], "causal")
    result = _run(operator_library, given)
    given["mask"][0, 0, 20, 3] = False
    changed = np.abs(_run(operator_library, given) - result).max(axis=(1, 3))
    assert changed[0, 20] > 1e-3
    assert np.count_nonzero(changed) == 1


def test_a_query_that_sees_no_key_gets_zeros(operator_library: Path) -> None:
    given = _inputs(SHAPES["prompt"], "nothing is seen")
    assert not _run(operator_library, given).any()


@pytest.mark.parametrize("mask", ["causal", "left padding", "tree", "numbers and infinity"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_several_threads_compute_the_same(
    operator_library: Path, shape: tuple[int, ...], mask: str
) -> None:
    given = _inputs(shape, mask)
    one, several = (_run(operator_library, given, threads=threads) for threads in (1, 4))
    np.testing.assert_array_equal(one, several)


@pytest.mark.parametrize("mask", ["causal", "left padding", "window", "tree", "numbers"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_row_does_not_depend_on_the_other_rows(
    operator_library: Path, shape: tuple[int, ...], mask: str
) -> None:
    given = _inputs(shape, mask)
    together = _run(operator_library, given)
    whole_mask = np.broadcast_to(
        given["mask"], (shape[0], given["mask"].shape[1], shape[3], shape[4])
    )
    for row in range(shape[0]):
        for query in {0, shape[3] // 2, shape[3] - 1}:
            own = whole_mask[row : row + 1, :, query : query + 1]
            alone = {"q": given["q"][row : row + 1, :, query : query + 1], "mask": own}
            for name in "kv":
                alone[name] = given[name][row : row + 1]
            np.testing.assert_array_equal(
                _run(operator_library, alone)[0, :, 0], together[row, :, query]
            )


@pytest.mark.parametrize("part", [1, 7, 64, 100])
def test_a_prompt_read_in_parts_gets_the_same_rows(operator_library: Path, part: int) -> None:
    given = _inputs((1, 9, 3, 150, 150, 64, 64), "causal")
    whole = _run(operator_library, given)
    for begin in range(0, 150, part):
        end = min(begin + part, 150)
        step = {
            "q": given["q"][:, :, begin:end],
            "k": given["k"][:, :, :end],
            "v": given["v"][:, :, :end],
            "mask": given["mask"][:, :, begin:end, :end],
        }
        np.testing.assert_array_equal(_run(operator_library, step), whole[:, :, begin:end])


def test_large_scores_stay_finite(operator_library: Path) -> None:
    given = _inputs(SHAPES["prompt"], "causal")
    given["q"] *= 1000
    result, correct = _run(operator_library, given), _run(None, given)
    assert np.isfinite(result).all()
    assert np.abs(result - correct).max() <= 1000 * tolerance("attention")  # scores of 10,000


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_value_that_is_not_a_number_is_not_hidden(operator_library: Path, name: str) -> None:
    given = _inputs(SHAPES["prompt"], "causal")
    given[name][0, 0, 5] = np.nan
    assert np.isnan(_run(operator_library, given)[0, 0, 5]).all()
    assert np.isfinite(_run(operator_library, given)[1]).all()


@pytest.mark.parametrize("mask", ["none", "causal", "numbers and infinity"])
def test_scores_that_overflow_are_not_hidden(operator_library: Path, mask: str) -> None:
    given = _inputs(SHAPES["prompt of several blocks"], mask)
    given["k"] = np.abs(given["k"])
    given["q"][0, 1, 5] = -3e38  # all its scores are -infinity, and no key is masked by them
    for library in (operator_library, None):
        result = _run(library, given)
        assert np.isnan(result[0, 1, 5]).all()
        assert np.isfinite(np.delete(result[0, 1], 5, axis=0)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": (2, 3, 37, 63)}, r"k is \[2, 3, 37, 63\], expected \[2, 3, 37, 64\]"),
        ({"k": (1, 3, 37, 64)}, r"k is \[1, 3, 37, 64\], expected \[2, 3, 37, 64\]"),
        ({"v": (2, 3, 36, 64)}, r"v is \[2, 3, 36, 64\], expected \[2, 3, 37, 64\]"),
        ({"v": (2, 9, 37, 64)}, r"v is \[2, 9, 37, 64\], expected \[2, 3, 37, 64\]"),
        ({"q": (2, 8, 37, 64)}, "the number of heads is no multiple"),
        ({"q": (2, 37, 576)}, r"q is \[2, 37, 576\], expected 4 axes"),
        ({"mask": (2, 1, 37, 36)}, r"mask is \[2, 1, 37, 36\], expected \[2, 9, 37, 37\]"),
        ({"mask": (2, 1, 1, 37)}, r"mask is \[2, 1, 1, 37\]"),
        ({"mask": (2, 3, 37, 37)}, r"mask is \[2, 3, 37, 37\]"),
        ({"mask": (3, 1, 37, 37)}, r"mask is \[3, 1, 37, 37\]"),
        ({"mask": (37,)}, r"mask is \[37\]"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_inputs_that_do_not_fit_are_refused(
    operator_library: Path, changes: dict[str, tuple[int, ...]], message: str
) -> None:
    given = _inputs(SHAPES["prompt"], "causal")
    for name, shape in changes.items():
        given[name] = np.ones(shape, given[name].dtype)
    with pytest.raises(Exception, match=message):
        _run(operator_library, given)


def test_a_diagonal_that_is_not_defined_is_refused(operator_library: Path) -> None:
    given = _inputs(SHAPES["prompt after a past"])
    with pytest.raises(Exception, match="is_causal with 40 queries and 150 keys"):
        _run(operator_library, given, is_causal=1)


def test_attributes_that_are_not_computed_are_refused(operator_library: Path) -> None:
    with pytest.raises(Exception, match="qk_matmul_output_mode is not computed"):
        _run(operator_library, _inputs(SHAPES["prompt"]), qk_matmul_output_mode=1)
