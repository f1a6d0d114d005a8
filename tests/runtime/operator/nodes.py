"""Sessions of a single node: an operator of the library, or the standard node it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx import helper as make

from loradeploy.bundle.names import OPERATOR_DOMAIN

FLOAT, UINT8 = TensorProto.FLOAT, TensorProto.UINT8
BOOL, INT32, INT64 = TensorProto.BOOL, TensorProto.INT32, TensorProto.INT64
_VERSIONS: Final = {"": 23, "com.microsoft": 1, OPERATOR_DOMAIN: 1}


def single_node(
    name: str,
    domain: str,
    inputs: Mapping[str, int],
    outputs: Sequence[str],
    attributes: Mapping[str, Any],
    *,
    constants: Mapping[str, NDArray[Any]] | None = None,
    library: Path | None = None,
    threads: int = 1,
) -> onnxruntime.InferenceSession:
    """A session of one node; `inputs` have types and any shapes, outputs are float.

    The node's last inputs are `constants`.
    """
    constants = constants or {}
    names = [*inputs, *constants]
    node = make.make_node(name, names, list(outputs), domain=domain, **attributes)
    graph = make.make_graph(
        [node],
        "node",
        [make.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()],
        [make.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    imports = [make.make_opsetid(*each) for each in _VERSIONS.items()]
    model = make.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
