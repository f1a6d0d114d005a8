"""Describe an ONNX file: inputs, outputs and operators."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from loradeploy.errors import BundleError, first_line
from loradeploy.files import MAX_GRAPH_BYTES, check_file
from loradeploy.inspection.facts import IF_KNOWN, TensorFacts, spec_facts

_ERRORS_ONLY: Final = 3


@dataclass(frozen=True, kw_only=True)
class OperatorFacts:
    """The number of nodes of an operator in the graph and its subgraphs."""

    operator: str
    nodes: int


@dataclass(frozen=True, kw_only=True)
class GraphFacts:
    """An ONNX file. `side_inputs`: inputs with a default (overridable initializers).

    Without onnx_ir, fields that onnxruntime does not show are None.
    """

    kind: str = "ONNX file"
    bytes: int
    missing_data: list[str] | None = None
    producer: str | None
    opsets: list[str] | None = field(default=None, metadata=IF_KNOWN)
    initializers: int | None = field(default=None, metadata=IF_KNOWN)
    inputs: list[TensorFacts]
    outputs: list[TensorFacts]
    side_inputs: list[TensorFacts]
    operators: list[OperatorFacts] | None = field(default=None, metadata=IF_KNOWN)


def inspect_graph(path: Path) -> GraphFacts:
    """Describe an ONNX file with onnx_ir, or with onnxruntime if onnx_ir is not installed.

    Raises:
        BundleError: it is not an ONNX file, or onnxruntime cannot open it.
    """
    try:
        import onnx_ir
    except ImportError:
        return _by_onnxruntime(path)
    try:
        check_file(path, error=BundleError, limit=MAX_GRAPH_BYTES)
        model = onnx_ir.load(path)
    except Exception as problem:  # errors of protobuf and onnx_ir have no other common base class
        raise BundleError(f"{path} is not an ONNX file: {first_line(problem)}") from None
    if not model.opset_imports:  # an empty file is a valid protobuf
        raise BundleError(f"{path} is not an ONNX file: it has no opset")
    graph = model.graph
    weights = [value.const_value for value in graph.initializers.values()]
    files = {Path(weight.path) for weight in weights if isinstance(weight, onnx_ir.ExternalTensor)}
    ops = Counter(f"{n.domain}::{n.op_type}".removeprefix("::") for n in graph.all_nodes())

    def specs(values: Iterable[onnx_ir.Value]) -> list[TensorFacts]:
        return [
            spec_facts(
                str(value.name),
                None if value.dtype is None else value.dtype.name,
                "?" if value.shape is None else list(value.shape.dims),
            )
            for value in values
        ]

    return GraphFacts(
        bytes=sum(file.stat().st_size for file in {path, *files} if file.is_file()),
        missing_data=[str(file) for file in sorted(files) if not file.is_file()] or None,
        producer=model.producer_name or None,
        opsets=[f"{domain or 'ai.onnx'} {n}" for domain, n in model.opset_imports.items()],
        initializers=len(weights),
        inputs=specs(v for v in graph.inputs if v.name not in graph.initializers),
        outputs=specs(graph.outputs),
        side_inputs=specs(v for v in graph.inputs if v.name in graph.initializers),
        operators=[OperatorFacts(operator=op, nodes=count) for op, count in ops.most_common()],
    )


def _by_onnxruntime(path: Path) -> GraphFacts:
    import onnxruntime

    check_file(path, error=BundleError, limit=MAX_GRAPH_BYTES)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as problem:  # onnxruntime's exceptions have no other common base class
        raise BundleError(f"onnxruntime cannot open {path}: {first_line(problem)}") from None
    data = path.with_name(f"{path.name}.data")

    def specs(nodes: Any) -> list[TensorFacts]:
        return [
            spec_facts(node.name, re.sub(r"^tensor\((.*)\)$", r"\1", node.type), node.shape)
            for node in nodes
        ]

    return GraphFacts(
        bytes=path.stat().st_size + (data.stat().st_size if data.is_file() else 0),
        producer=session.get_modelmeta().producer_name or None,
        inputs=specs(session.get_inputs()),
        outputs=specs(session.get_outputs()),
        side_inputs=specs(session.get_overridable_initializers()),
    )
