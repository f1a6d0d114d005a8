"""The kernels of fused products compute what LoraAdd computes for each layer, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loradeploy.bundle.names import (
    LORA_ADD_2_OPERATOR,
    LORA_ADD_3_OPERATOR,
    LORA_ADD_OPERATOR,
    LORA_ADD_RESIDUAL_OPERATOR,
    LORA_SWIGLU_OPERATOR,
    OPERATOR_DOMAIN,
    SWIGLU_OPERATOR,
)
from tests.runtime.operator.kernel import Arrays, expected, inputs
from tests.runtime.operator.nodes import FLOAT, INT64, single_node
from tests.tolerances import tolerance

# The sizes of the layers of each operator.
SIZES = {
    LORA_ADD_2_OPERATOR: [(70, 150), (8, 8), (1030, 33)],
    LORA_ADD_3_OPERATOR: [(64, 16, 16), (1, 2, 3), (576, 192, 192)],
    LORA_SWIGLU_OPERATOR: [(40, 40), (1542, 1542), (3, 3)],
}
CASES = [(name, sizes) for name, all_sizes in SIZES.items() for sizes in all_sizes]
# Rows and tokens, the input's size, the slots of rows, and each layer's rank in each slot.
CALLS: dict[str, dict[str, Any]] = {
    "decode": {"batch": 1, "sequence": 1, "into": 20, "ids": [1], "ranks": [[0, 16]] * 3},
    "a prompt": {"batch": 1, "sequence": 61, "into": 576, "ids": [0], "ranks": [[16]] * 3},
    "mixed rows": {
        "batch": 9,
        "sequence": 3,
        "into": 33,
        "ids": [0, 1, 2] * 3,
        "ranks": [[4, 69, 0], [4, 0, 0], [0, 8, 0]],
    },
    "one layer only": {"batch": 2, "sequence": 9, "into": 40, "ids": [0], "ranks": [[0], [4], [0]]},
    "large, few rows": {
        "batch": 5,
        "sequence": 1,
        "into": 2051,
        "ids": [1] * 5,
        "ranks": [[16, 69], [4, 64], [4, 0]],
    },
    "large, a prompt": {"batch": 1, "sequence": 45, "into": 2051, "ids": [0], "ranks": [[69]] * 3},
}


def layers(sizes: tuple[int, ...], ranks: list[list[int]], **call: Any) -> list[Arrays]:
    """The inputs of LoraAdd for each layer; all have the same x."""
    made = [
        inputs(out=size, ranks=own, stored=max(own) + at, seed=at, **call)
        for at, (size, own) in enumerate(zip(sizes, ranks, strict=False))
    ]
    return [each | {"x": made[0]["x"]} for each in made]


def joined(given: list[Arrays]) -> Arrays:
    """The inputs of one call for all layers; layer i reads the column i of the ranks."""
    factors = {f"{name}_{at}": own[name] for at, own in enumerate(given) for name in "AB"}
    ranks = np.stack([own["adapter_ranks"][:, 1] for own in given], axis=1)
    return {
        "y": np.concatenate([own["y"] for own in given], axis=-1),
        "x": given[0]["x"],
        **factors,
        "adapter_ids": given[0]["adapter_ids"],
        "adapter_ranks": ranks,
    }


def run(
    name: str, library: Path, feeds: Arrays, count: int, threads: int = 1, **attributes: Any
) -> list[NDArray[np.float32]]:
    types = {each: INT64 if values.dtype == np.int64 else FLOAT for each, values in feeds.items()}
    outputs = [f"z_{at}" for at in range(count)]
    opened = single_node(
        name, OPERATOR_DOMAIN, types, outputs, attributes, library=library, threads=threads
    )
    found: list[NDArray[np.float32]] = opened.run(None, feeds)
    return found


def together(
    name: str, library: Path, given: list[Arrays], threads: int = 1, **changes: Any
) -> list[NDArray[np.float32]]:
    """The outputs of one call for all layers."""
    attributes: dict[str, Any] = {
        "targets": list(range(len(given))),
        "sizes": [own["y"].shape[-1] for own in given],
    }
    count = 1 if name == LORA_SWIGLU_OPERATOR else len(given)
    return run(name, library, joined(given), count, threads, **(attributes | changes))


def apart(name: str, library: Path, given: list[Arrays]) -> list[NDArray[np.float32]]:
    """The same outputs, from a call of LoraAdd for each layer."""
    parts = [run(LORA_ADD_OPERATOR, library, own, 1, target=1)[0] for own in given]
    if name != LORA_SWIGLU_OPERATOR:
        return parts
    return run(SWIGLU_OPERATOR, library, {"x": np.concatenate(parts, axis=-1)}, 1)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_one_call_computes_what_calls_for_each_layer_compute(
    operator_library: Path, name: str, sizes: tuple[int, ...], call: str
) -> None:
    given = layers(sizes, **CALLS[call])
    found = together(name, operator_library, given)
    for own, correct in zip(found, apart(name, operator_library, given), strict=True):
        np.testing.assert_array_equal(own, correct)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", SIZES)
def test_several_threads_compute_the_same(operator_library: Path, name: str, call: str) -> None:
    given = layers(SIZES[name][-1], **CALLS[call])
    one, several = (together(name, operator_library, given, threads=n) for n in (1, 4))
    for own, other in zip(one, several, strict=True):
        np.testing.assert_array_equal(own, other)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("out", [1, 70, 1030])
def test_a_residual_is_added_to_what_lora_add_computes(
    operator_library: Path, out: int, call: str
) -> None:
    (given,) = layers((out,), **CALLS[call])
    name = LORA_ADD_RESIDUAL_OPERATOR
    feeds = given | {"residual": np.random.default_rng(1).random(given["y"].shape, np.float32)}
    one, several = (run(name, operator_library, feeds, 1, threads=n, target=1)[0] for n in (1, 4))
    (update,) = run(LORA_ADD_OPERATOR, operator_library, given, 1, target=1)
    np.testing.assert_array_equal(one, feeds["residual"] + update)
    np.testing.assert_array_equal(one, several)


def test_a_residual_of_another_shape_is_refused(operator_library: Path) -> None:
    (given,) = layers((8,), batch=1, sequence=2, into=5, ids=[0], ranks=[[4]])
    feeds = given | {"residual": given["y"][..., :1]}
    with pytest.raises(Exception, match=r"residual is \[1, 2, 1\], expected \[1, 2, 8\]"):
        run(LORA_ADD_RESIDUAL_OPERATOR, operator_library, feeds, 1, target=1)


@pytest.mark.parametrize("name", [LORA_ADD_2_OPERATOR, LORA_ADD_3_OPERATOR])
def test_each_layer_gets_its_own_update(operator_library: Path, name: str) -> None:
    given = layers(SIZES[name][0], **CALLS["mixed rows"])
    for own, found in zip(given, together(name, operator_library, given), strict=True):
        correct = expected(own)
        assert np.abs(found - correct).max() <= tolerance("operator") * np.abs(correct).max()
    swapped = [given[0], *(own | {"A": own["A"][::-1]} for own in given[1:])]
    wrong = together(name, operator_library, swapped)
    assert np.abs(wrong[1] - expected(given[1])).max() > 0.1


@pytest.mark.parametrize(
    ("name", "sizes", "changes", "message"),
    [
        (LORA_ADD_2_OPERATOR, (8, 6), {"sizes": [6, 8]}, r"B is \[1, 4, 8\], expected \[1, 4, 6\]"),
        (LORA_ADD_2_OPERATOR, (8, 6), {"sizes": [8]}, "sizes must have 2 values"),
        (LORA_ADD_3_OPERATOR, (8, 6, 4), {"targets": [0, 1]}, "targets and sizes must have 3"),
        (LORA_ADD_2_OPERATOR, (8, 6), {"targets": [0, 2]}, "target 2 is not in adapter_ranks"),
        (LORA_SWIGLU_OPERATOR, (8, 6), {}, "gate and up have different sizes"),
    ],
)
def test_attributes_that_do_not_fit_are_refused(
    operator_library: Path, name: str, sizes: tuple[int, ...], changes: Any, message: str
) -> None:
    given = layers(sizes, batch=1, sequence=2, into=5, ids=[0], ranks=[[4]] * 3)
    with pytest.raises(Exception, match=message):
        together(name, operator_library, given, **changes)


def test_factors_of_another_number_of_slots_are_refused(operator_library: Path) -> None:
    given = layers((8, 6), batch=1, sequence=2, into=5, ids=[0], ranks=[[4, 4]] * 2)
    given[1]["A"] = given[1]["A"][:1]
    with pytest.raises(Exception, match=r"A_1 is \[1, 5, 5\], expected \[2, 5, 5\]"):
        together(LORA_ADD_2_OPERATOR, operator_library, given)
