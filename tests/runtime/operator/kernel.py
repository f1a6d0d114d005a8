"""Run one call of the operator, and the same computation in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto
from onnx import helper as make

from loradeploy.bundle.names import LORA_ADD_OPERATOR, OPERATOR_DOMAIN

INPUTS = ("y", "x", "A", "B", "adapter_ids", "adapter_ranks")
Arrays = dict[str, NDArray[Any]]


def session(library: Path, *, threads: int = 1) -> onnxruntime.InferenceSession:
    """A graph of one call, whose `target` is 1."""
    shapes = {"y": 3, "x": 3, "A": 3, "B": 3, "adapter_ids": 1, "adapter_ranks": 2}
    integers = ("adapter_ids", "adapter_ranks")
    inputs = [
        make.make_tensor_value_info(
            name,
            TensorProto.INT64 if name in integers else TensorProto.FLOAT,
            [f"{name}_{axis}" for axis in range(shapes[name])],
        )
        for name in INPUTS
    ]
    node = make.make_node(LORA_ADD_OPERATOR, INPUTS, ["z"], domain=OPERATOR_DOMAIN, target=1)
    output = make.make_tensor_value_info("z", TensorProto.FLOAT, ["b", "s", "o"])
    graph = make.make_graph([node], "call", inputs, [output])
    imports = [make.make_opsetid("", 21), make.make_opsetid(OPERATOR_DOMAIN, 1)]
    model = make.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def inputs(
    *,
    batch: int,
    sequence: int,
    into: int,
    out: int,
    ranks: list[int],
    ids: list[int],
    stored: int | None = None,
    seed: int = 0,
) -> Arrays:
    """Random inputs of a call; slot s has the rank ranks[s], padded with zeros to `stored`."""
    random = np.random.default_rng(seed)

    def numbers(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape, np.float32)

    stored = max(ranks) if stored is None else stored
    A, B = numbers(len(ranks), into, stored), numbers(len(ranks), stored, out)
    for slot, rank in enumerate(ranks):
        A[slot, :, rank:], B[slot, rank:] = 0, 0
    return {
        "y": numbers(batch, sequence, out),
        "x": numbers(batch, sequence, into),
        "A": A,
        "B": B,
        "adapter_ids": np.array(ids, np.int64),
        # Another target's rank first: the call's is column 1.
        "adapter_ranks": np.array([[99, rank] for rank in ranks], np.int64),
    }


def expected(given: Arrays) -> NDArray[Any]:
    """y + (x A[ids]) B[ids] in float64."""
    wide = {name: values.astype(np.float64) for name, values in given.items()}
    ids = given["adapter_ids"]
    return np.asarray(wide["y"] + (wide["x"] @ wide["A"][ids]) @ wide["B"][ids])


def call(opened: onnxruntime.InferenceSession, given: Arrays) -> NDArray[Any]:
    """The result of the call."""
    result: NDArray[Any] = opened.run(None, given)[0]
    return result


def load(path: Path) -> onnx.ModelProto:
    """The ONNX file without its weights."""
    return onnx.load(path, load_external_data=False)
