"""Measure a tied embedding and output head with two copies of the matrix, and with one.

    python -m tools.bench_tied_head

onnxruntime packs a constant of two dimensions for its matrix product, beside the copy that lookups
read. It packs none of three dimensions, so that one copy serves both. The table has the processor
time of lookup and head alone, in milliseconds with one thread, the median over the rounds. All
forms run in one process, in random order; the packed one runs twice, as the control.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from loradeploy.runtime.devices.table import CPU

if TYPE_CHECKING:
    from numpy.typing import NDArray

_VOCABULARY, _HIDDEN = 49152, 576  # of SmolLM2-135M
_ROWS: Final = (1, 4, 8, 16)
_ROUNDS: Final = 8
_CALLS: Final = 5  # in a round
# By form: the axes that the matrix [vocabulary, hidden] gets, the axis of tokens, and the operator
# of the head; no axes for two copies.
_FORMS: Final[dict[str, tuple[tuple[int, ...], int, str]]] = {
    "packed": ((), 0, "MatMul"),
    "the same again": ((), 0, "MatMul"),
    "[1, in, out], not packed": ((1, 0), 2, "MatMul"),
    "[1, out, in], not packed": ((0, 1), 1, "FusedMatMul"),
}


def graph_of(form: str, matrix: NDArray[np.float32]) -> onnx.ModelProto:
    """Return the graph that looks up `tokens` [1, rows] and multiplies them by the head.

    `matrix`: [vocabulary, hidden]; the output `logits` is [1, rows, vocabulary].
    """
    axes, at, product = _FORMS[form]
    if not axes:
        stored = {"embedding": matrix, "head": np.ascontiguousarray(matrix.T)}
        lookup = [helper.make_node("Gather", ["embedding", "tokens"], ["x"], axis=0)]
    else:
        stored = {"head": np.ascontiguousarray(matrix.transpose(axes))[np.newaxis]}
        lookup = [
            helper.make_node("Squeeze", ["tokens", "first"], ["flat"]),
            helper.make_node("Gather", ["head", "flat"], ["rows" if at == 2 else "x"], axis=at),
        ]
        if at == 2:  # [1, hidden, rows]
            lookup.append(helper.make_node("Transpose", ["rows"], ["x"], perm=[0, 2, 1]))
    head = helper.make_node(product, ["x", "head"], ["logits"])
    if product == "FusedMatMul":
        head.domain = "com.microsoft"
        head.attribute.append(helper.make_attribute("transB", 1))
    constants = [numpy_helper.from_array(values, name) for name, values in stored.items()]
    constants.append(numpy_helper.from_array(np.array([0], np.int64), "first"))
    return helper.make_model(
        helper.make_graph(
            [*lookup, head],
            "tied",
            [helper.make_tensor_value_info("tokens", TensorProto.INT64, [1, "rows"])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )


def opened(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Return a session with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[CPU])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    rounds = parser.parse_args().rounds
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((_VOCABULARY, _HIDDEN), dtype=np.float32)
    sessions = {form: opened(graph_of(form, matrix)) for form in _FORMS}
    print(f"| rows | {' | '.join(_FORMS)} |\n|---|{'---|' * len(_FORMS)}")
    for rows in _ROWS:
        tokens = generator.integers(0, _VOCABULARY, (1, rows))
        taken: dict[str, list[float]] = {form: [] for form in _FORMS}
        for _ in range(rounds):
            for form in random.sample(list(_FORMS), len(_FORMS)):
                sessions[form].run(None, {"tokens": tokens})  # warms up
                begin = time.process_time()
                for _ in range(_CALLS):
                    sessions[form].run(None, {"tokens": tokens})
                taken[form].append((time.process_time() - begin) / _CALLS * 1000)
        print(f"| {rows} | {' | '.join(f'{statistics.median(taken[f]):.1f}' for f in _FORMS)} |")


if __name__ == "__main__":
    main()
