"""Operators that only move values give the arrays that onnxruntime gives."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from loradeploy.export.graph.moves import MOVED

X: Final = np.arange(60, dtype=np.float32).reshape(3, 4, 5)

# By case: the operator, its inputs after the first, its attributes, its number of outputs.
CASES: Final[dict[str, tuple[str, list[Any], dict[str, Any], int]]] = {
    "Concat": ("Concat", [X + 1], {"axis": -1}, 1),
    "Gather one": ("Gather", [-1], {"axis": 1}, 1),
    "Gather rows": ("Gather", [[[2, 0], [1, -3]]], {}, 1),
    "Slice": ("Slice", [[1, -2], [99, 99], [0, -1]], {}, 1),
    "Slice without axes": ("Slice", [[1, 0], [3, 3]], {}, 1),
    "Slice backward": ("Slice", [[-1], [-99], [1], [-1]], {}, 1),
    "Slice backward from before the start": ("Slice", [[-99], [-100], [1], [-1]], {}, 1),
    "Slice backward to an open end": ("Slice", [[2], [2**63 - 1], [2], [-1]], {}, 1),
    "Slice by steps": ("Slice", [[0], [5], [2], [2]], {}, 1),
    "Split": ("Split", [[1, 3]], {"axis": 1}, 2),
    "Split evenly": ("Split", [], {"axis": 2, "num_outputs": 2}, 2),
    "Squeeze": ("Squeeze", [[0]], {}, 1),
    "Squeeze all": ("Squeeze", [[]], {}, 1),
    "Transpose": ("Transpose", [], {"perm": [2, 0, 1]}, 1),
    "Transpose all": ("Transpose", [], {}, 1),
    "Unsqueeze": ("Unsqueeze", [[0, -1]], {}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_arrays_are_moved_as_by_onnxruntime(case: str) -> None:
    operator, others, given, outputs = CASES[case]
    x = X[:1] if operator == "Squeeze" else X
    rest = [np.array(o, np.int64) if not isinstance(o, np.ndarray) else o for o in others]
    names = [f"input{number}" for number in range(len(rest))]
    made = [f"output{number}" for number in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", *names], made, **given)],
        "move",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in made],
        [numpy_helper.from_array(value, name) for name, value in zip(names, rest, strict=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    expected = session.run(None, {"x": x})
    found = MOVED[operator](x, rest, given, outputs)
    assert len(found) == len(expected) == outputs
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_operator_is_compared() -> None:
    assert {operator for operator, *_ in CASES.values()} == MOVED.keys()
