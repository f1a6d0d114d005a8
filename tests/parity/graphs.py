"""Two-node ONNX models, and the same computation in numpy, for tests of comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VOCABULARY, HIDDEN, LABELS = 40, 8, 6


def weights(
    labels: int = LABELS, vocabulary: int = VOCABULARY
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return an embedding [vocabulary, hidden] and a head [hidden, labels]."""
    random = np.random.default_rng(5)
    embedding = random.standard_normal((vocabulary, HIDDEN)).astype(np.float32)
    return embedding, random.standard_normal((HIDDEN, labels)).astype(np.float32)


def token_model(
    place: Path,
    *,
    labels: int = LABELS,
    vocabulary: int = VOCABULARY,
    dtype: str = "float32",
    error: float = 0.0,
    names: Sequence[str] = ("input_ids", "logits"),
    extra: bool = False,
) -> Path:
    """Write a model: ids [batch, sequence] → logits [batch, sequence, labels].

    With `extra`, the hidden states are an output too. `error` is added to one weight. Weights are
    stored as `dtype`; inputs and outputs stay float32, as onnxruntime's converter to float16 does.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    E, W = weights(labels, vocabulary)
    W = W.copy()
    W[0, 0] += error
    ids, logits = names
    nodes = [
        helper.make_node("Gather", ["E", ids], ["found"]),
        helper.make_node("MatMul", ["found", "W"], ["product"]),
        helper.make_node("Cast", ["found"], ["hidden"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["product"], [logits], to=TensorProto.FLOAT),
    ]
    shape: list[Any] = ["batch", "sequence"]
    outputs = [helper.make_tensor_value_info(logits, TensorProto.FLOAT, [*shape, labels])]
    if extra:
        outputs.append(helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [*shape, HIDDEN]))
    graph = helper.make_graph(
        nodes,
        "tokens",
        [helper.make_tensor_value_info(ids, TensorProto.INT64, shape)],
        outputs,
        [numpy_helper.from_array(values.astype(dtype), n) for n, values in (("E", E), ("W", W))],
    )
    opset = [helper.make_opsetid("", 21)]
    place.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opset), place)
    return place


def in_numpy(feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Compute the logits of `token_model` in numpy."""
    E, W = weights()
    return {"logits": E[feeds["input_ids"]] @ W}
