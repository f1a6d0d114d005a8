"""Quantize weights to 8 or 4 bits with onnxruntime's quantizer, after surgery or merge.

Only products of the base are quantized: factors and heads are not constants. The quantizer gets
each weight in a separate model, so that the whole graph is never in memory twice and its other
nodes do not change.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.manifest import Manifest
from loradeploy.errors import ExportError, MissingDependencyError
from loradeploy.export.graph.edit import (
    add_constant,
    constant_of,
    free_name,
    name_of,
    remove_unused,
)
from loradeploy.export.graph.names import packed_names, weight_name
from loradeploy.export.match.linears import Linear, find_linears, output_head
from loradeploy.export.match.operators import MICROSOFT, check_operators
from loradeploy.export.match.quantized import packed_bits, unpack, unpacked

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

_BLOCK: Final = 32
_HEAD_BITS: Final = 8
# Activations are multiplied as int8, block by block: onnxruntime-genai's own choice on CPU.
_ACCURACY_LEVEL: Final = 4
# The indices of the zero points and the g_idx of a MatMulNBits.
_ZEROS, _GROUPS = 3, 4


def quantize(model: ir.Model, manifest: Manifest, bits: int) -> Manifest:
    """Quantize every product with a constant weight; return the manifest with the new names.

    Weights are quantized to `bits` bits, symmetrically, in blocks of 32 along the input; the output
    head, which loses most, to at least 8 bits. Embeddings (see embedding.py), and products with a
    bias input (Gemm), are not quantized.

    Raises:
        ExportError: nothing can be quantized. MissingDependencyError: onnx is not installed.
    """
    renamed: dict[str, str] = {}
    findings = find_linears(model)
    head = output_head(model, findings)
    for module, linear in findings.linears.items():
        name = str(linear.weight.name)
        if name in renamed:
            continue  # shared by several modules
        if not linear.quantized and all(node.op_type == "MatMul" for node in linear.nodes):
            own = max(bits, _HEAD_BITS) if module == head else bits
            renamed[name] = _quantize_linear(model.graph, linear, own)
    if not renamed:
        raise ExportError(f"the graph has no product that could be quantized to int{bits}")
    model.opset_imports.setdefault(MICROSOFT, 1)
    remove_unused(model.graph)
    return dataclasses.replace(
        manifest,
        targets=tuple(
            dataclasses.replace(target, weight=renamed[target.weight], transposed=True)
            if target.weight in renamed
            else target
            for target in manifest.targets
        ),
    )


def rounded(weight: NDArray[np.float32], bits: int, block: int = _BLOCK) -> NDArray[np.float32]:
    """A weight [out, in] after quantization and dequantization."""
    node, constants = _quantized(np.ascontiguousarray(weight.T), bits, block)
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    packed, scales = (constants[name] for name in node.input[1:3])
    result = unpacked(attributes, packed, scales, None, list(range(len(weight))))
    assert result is not None
    return result


def packed_rows(
    weight: NDArray[Any], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.floating[Any]]]:
    """A weight [out, in] as integers [out, blocks, bytes of a block] and scales [out, blocks]."""
    node, constants = _quantized(np.ascontiguousarray(weight.T), bits)
    packed, scales = (constants[name] for name in node.input[1:3])
    return packed, scales


def requantize_product(product: ir.Node, graph: ir.Graph, weight: NDArray[np.float32]) -> None:
    """Replace the weight [out, in] of the MatMulNBits `product`, in the same bits and blocks.

    If it has zero points, it gets new ones in the same form, packed or as floats. A g_idx is
    removed: the new blocks are of consecutive inputs. The bias and the rest do not change.

    Raises:
        ExportError: the node has an unknown input or attribute.
    """
    check_operators(name_of(product), [product])
    bits = packed_bits(product)
    block = product.attributes["block_size"].as_int()
    scales = product.inputs[2]
    zeros = product.inputs[_ZEROS] if len(product.inputs) > _ZEROS else None
    kind = np.float32 if scales is None or scales.dtype is None else scales.dtype.numpy()
    node, constants = _quantized(
        np.ascontiguousarray(weight.T).astype(kind), bits, block, symmetric=zeros is None
    )
    for index, name in enumerate(node.input[1:], start=1):
        old, own = product.inputs[index], constants[name]
        assert old is not None and old.const_value is not None
        if index == _ZEROS and old.const_value.dtype.is_floating_point():
            blocks = -(-weight.shape[1] // block)
            own = unpack(own.reshape(len(weight), -1), bits)[:, :blocks]
            own = own.astype(old.const_value.dtype.numpy())
        shape = old.const_value.shape.numpy()
        value = add_constant(graph, free_name(graph, f"{old.name}.merged"), own.reshape(shape))
        product.replace_input_with(index, value)
    if len(product.inputs) > _GROUPS:
        product.replace_input_with(_GROUPS, None)


def _quantize_linear(graph: ir.Graph, linear: Linear, bits: int) -> str:
    """Replace the linear's products by quantized ones; return the name of the new weight."""
    import onnx_ir as ir

    numbers = constant_of(linear.weight)
    weight = np.ascontiguousarray(numbers.T if linear.transposed else numbers)  # [in, out]
    node, constants = _quantized(weight, bits)
    names = packed_names(weight_name(linear.module), bits)
    inputs = [
        add_constant(graph, free_name(graph, own), constants[name])
        for own, name in zip(names, node.input[1:3], strict=False)
    ]
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    for product in linear.nodes:
        new = ir.node(
            node.op_type,
            [product.inputs[0], *inputs],
            attributes=attributes,
            domain=MICROSOFT,
            name=product.name,
            metadata_props=dict(product.metadata_props),
        )
        old = product.outputs[0]
        new.outputs[0].type, new.outputs[0].shape = old.type, old.shape
        name = old.name
        old.name = f"{name}/unpacked"
        new.outputs[0].name = name
        graph.insert_after(product, new)
        old.replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
        graph.remove(product, safe=True)
    return str(inputs[0].name)


def _quantized(
    weight: NDArray[Any], bits: int, block: int = _BLOCK, *, symmetric: bool = True
) -> tuple[onnx.NodeProto, dict[str, NDArray[Any]]]:
    """Quantize the product x `weight`, [in, out], with onnxruntime; return node and constants."""
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        raise MissingDependencyError(
            "quantizing weights needs onnx: pip install 'loradeploy[export]'"
        ) from None
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    into, out = weight.shape
    if kind not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        raise ExportError(f"weights in {weight.dtype} cannot be quantized: export in fp32")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"], name="product")],
        "one_product",
        [helper.make_tensor_value_info("x", kind, ["rows", into])],
        [helper.make_tensor_value_info("y", kind, ["rows", out])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    quantizer = _quantizer_class()(
        model,
        bits=bits,
        block_size=block,
        is_symmetric=symmetric,
        accuracy_level=_ACCURACY_LEVEL,
    )
    quantizer.process()
    result = quantizer.model.model.graph
    (node,) = (node for node in result.node if node.op_type == "MatMulNBits")
    return node, {t.name: numpy_helper.to_array(t) for t in result.initializer}


def _quantizer_class() -> Any:
    """onnxruntime's quantizer, whose import configures the root logger for INFO (1.31)."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return MatMulNBitsQuantizer
