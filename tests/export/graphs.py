"""Helpers to build and run minimal graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from loradeploy.bundle.manifest import BaseIdentity, Manifest
from loradeploy.bundle.proof.provider import EXACT_INTEGERS
from loradeploy.export.passes.side_inputs.inject import SideInputs
from tests.tolerances import tolerance

Arrays = dict[str, NDArray[Any]]
SCOPES = "pkg.torch.onnx.name_scopes"
IN, OUT = 6, 4


class Builder:
    """Builds a graph node by node."""

    def __init__(self) -> None:
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self._generator = np.random.default_rng(7)

    def input(
        self, name: str, shape: list[int | str], dtype: ir.DataType = ir.DataType.FLOAT
    ) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def constant(self, name: str, numbers: NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(numbers, name=name)
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(numbers.shape),
            const_value=tensor,
        )
        self.constants.append(value)
        return value

    def weight(self, name: str, *shape: int) -> ir.Value:
        return self.constant(name, self._generator.standard_normal(shape).astype(np.float32))

    def node(
        self,
        op: str,
        inputs: list[ir.Value],
        shape: list[int | str] | None = None,
        *,
        name: str = "",
        module: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        scopes = {} if module is None else {SCOPES: str(["", module, "linear"])}
        node = ir.node(
            op,
            inputs,
            attributes=attributes,
            name=name or None,
            metadata_props=scopes,
            domain=domain,
        )
        output = node.outputs[0]
        output.name = name or f"{op}_{len(self.nodes)}"
        output.type = ir.TensorType(ir.DataType.FLOAT)
        output.shape = None if shape is None else ir.Shape(shape)
        self.nodes.append(node)
        return output

    def model(self, *outputs: ir.Value) -> ir.Model:
        graph = ir.Graph(
            self.inputs,
            list(outputs),
            nodes=self.nodes,
            initializers=self.constants,
            opset_imports={"": 21},
            name="g",
        )
        return ir.Model(graph, ir_version=10)


def linear(module: str | None = "block.proj") -> ir.Model:
    """y = x W, x [batch, sequence, in]."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    w = b.weight("w", IN, OUT)
    y = b.node("MatMul", [x, w], ["batch", "sequence", OUT], module=module, name="y")
    return b.model(y)


def run(model: ir.Model, feeds: Arrays) -> NDArray[Any]:
    """Run the graph and return its first output."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(EXACT_INTEGERS, "1")
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    output: NDArray[Any] = session.run(None, feeds)[0]
    return output


def numbers(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Random float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ops(model: ir.Model) -> list[str]:
    """Return the operators of the graph, in order."""
    return [node.op_type for node in model.graph]


def use_elsewhere(model: ir.Model, value: ir.Value, by: str) -> None:
    """Make `value` an output of the graph, or let "another node" compute an output from it."""
    if by == "another node":
        node = ir.node("Neg", [value], name="negative")
        node.outputs[0].name, node.outputs[0].type = "negative", value.type
        model.graph.append(node)
        value = node.outputs[0]
    model.graph.outputs.append(value)


def manifest_of(added: SideInputs) -> Manifest:
    """Return the manifest of a graph with the side inputs `added`."""
    return Manifest(
        task="causal-lm",
        mode="side-inputs",
        base=BaseIdentity("b", None, "onnx"),
        precision="fp32",
        opset=21,
        inputs=(),
        outputs=(),
        targets=added.targets,
        saved=added.saved,
        changed=added.changed,
    )


def near(actual: NDArray[Any], expected: NDArray[Any]) -> bool:
    """Whether two results of tiny graphs differ by rounding at most."""
    return bool(np.abs(actual - expected).max() <= tolerance("torch-onnx-tiny"))
