"""Load graphs from files, with checks, digests and descriptions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.adapter.files.tensors import lfs_problem
from loradeploy.bundle.manifest import TensorSpec
from loradeploy.errors import (
    BundleError,
    MissingDependencyError,
    ModelError,
    first_line,
    shortened,
)
from loradeploy.export.graph.sound import check_sound
from loradeploy.files import MAX_GRAPH_BYTES, check_file, inside
from loradeploy.paths import resolved

if TYPE_CHECKING:
    import onnx_ir as ir

# The producer of graphs that were traced from a checkpoint, and not made from an ONNX file.
TRACED_BY: Final = "loradeploy"


def load_graph(file: Path) -> ir.Model:
    """The ONNX model in `file`; weights stay on disk until they are needed.

    Raises:
        ModelError: it is not an ONNX file, not a valid graph, or its external data is missing, too
            short or outside the directory.
        MissingDependencyError: onnx-ir is not installed.
    """
    try:
        import onnx_ir as ir
    except ImportError:
        raise MissingDependencyError(
            "changing a graph needs onnx-ir: pip install 'loradeploy[export]'"
        ) from None
    if not file.exists():
        raise ModelError(f"{file} does not exist")
    check_file(file, error=ModelError, limit=MAX_GRAPH_BYTES)
    try:
        model = ir.load(file)
    except Exception as problem:  # errors of protobuf, and of reading a broken graph
        if (pointer := lfs_problem(file)) is not None:
            raise ModelError(pointer) from None
        _refuse_sparse(file)
        cause: BaseException = problem
        while cause.__cause__ is not None:  # onnx-ir names the function that failed first
            cause = cause.__cause__
        raise ModelError(f"{file} is not a readable ONNX model: {first_line(cause)}") from None
    if not len(model.graph):
        raise ModelError(f"{file} is not a readable ONNX model: its graph is empty")
    try:
        check_sound(model, file)
    except ModelError:
        _refuse_sparse(file)
        raise
    for tensor in _external_tensors(model):
        _check_external(file, tensor)
    _follow_links(model, file)
    return model


def _follow_links(model: ir.Model, file: Path) -> None:
    """Let weights refer to the files that links lead to, which onnx-ir does not read otherwise.

    In the cache of the Hugging Face hub, a file of data is a link (see `files.inside`).
    """
    import onnx_ir as ir

    for value in (value for graph in model.graphs() for value in graph.initializers.values()):
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        data = inside(file.parent, str(tensor.location))
        if not data.is_relative_to(resolved(file.parent)):
            value.const_value = ir.ExternalTensor(
                data.name,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=str(tensor.name),
                base_dir=data.parent,
            )


def _refuse_sparse(file: Path) -> None:
    """Raise ModelError if the graph has sparse weights, which onnx-ir does not read."""
    import onnx

    try:
        graph = onnx.load(file, load_external_data=False).graph
    except Exception:  # not readable at all
        return
    names = [tensor.values.name for tensor in graph.sparse_initializer]
    names += [
        node.output[0]
        for node in graph.node
        if node.output and any(a.HasField("sparse_tensor") for a in node.attribute)
    ]
    if names:
        raise ModelError(
            f"{file}: the weight {shortened(names[0])} is stored as a sparse tensor, which is not"
            " supported: store it as a dense one"
        )


def graph_digest(model: ir.Model) -> str:
    """Digest of a base graph: of its initializers of rank 2 and higher, in name order."""
    digest = hashlib.sha256()
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and len(tensor.shape) > 1 and not value.is_graph_input():
            digest.update(f"\n{name}:{tensor.dtype.name}{list(tensor.shape.numpy())}:".encode())
            digest.update(tensor.tobytes())
    return f"sha256:{digest.hexdigest()}"


def required_inputs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """The inputs without a default, as in the manifest."""
    return tuple(spec_of(v) for v in model.graph.inputs if not v.is_initializer())


def outputs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """The outputs, as in the manifest."""
    return tuple(spec_of(value) for value in model.graph.outputs)


def opset_of(model: ir.Model) -> int:
    """The opset version of the graph's ONNX operators."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))


def spec_of(value: ir.Value) -> TensorSpec:
    """An input or output, as in the manifest."""
    shape = value.shape if value.shape is not None else ()
    return TensorSpec(
        name=str(value.name),
        dtype="unknown" if value.dtype is None else np.dtype(value.dtype.numpy()).name,
        shape=tuple(dim if isinstance(dim, int) else str(dim.value or "?") for dim in shape),
    )


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """External tensors of the model, including those of branches, loops and functions."""
    import onnx_ir as ir

    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
    bodies = [*model.graphs(), *model.functions.values()]
    for node in (node for body in bodies for node in body):
        for attribute in node.attributes.values():
            if isinstance(attribute.value, ir.ExternalTensor):
                yield attribute.value


def _check_external(file: Path, tensor: ir.ExternalTensor) -> None:
    try:
        data = inside(file.parent, str(tensor.location))
    except BundleError as problem:
        raise ModelError(f"{file}: the external data of {tensor.name}: {problem}") from None
    if tensor.length not in (None, tensor.nbytes):
        raise ModelError(
            f"{file}: the external data of {tensor.name} is declared to be {tensor.length} bytes"
            f" long, its shape takes {tensor.nbytes}"
        )
    if data.is_file() and data.stat().st_nlink > 1:
        raise ModelError(  # onnx and onnx-ir refuse to read it
            f"{file}: {data.name} has several names (hard links), which could refer to"
            f" a file elsewhere: replace it by a copy, cp {data.name} copy && mv copy {data.name}"
        )
    end = (tensor.offset or 0) + tensor.nbytes
    if (tensor.offset or 0) < 0:
        raise ModelError(f"{file}: the external data of {tensor.name} begins before its file")
    if data.is_file() and (pointer := lfs_problem(data)) is not None:
        raise ModelError(pointer)
    if not data.is_file() or data.stat().st_size < end:
        raise ModelError(
            f"{file}: the external data of {tensor.name} is not in {data.name}, which is"
            f" {'too short' if data.is_file() else 'missing'}"
        )
