"""Graphs by other exporters and quantisers, of the same tiny models."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

IDS = np.random.default_rng(3).integers(3, 512, (3, 11))


def export_with_torch(model: Path, place: Path, *, dynamo: bool) -> None:
    """torch.onnx.export of an encoder, without a word from us: with or without dynamo."""
    import torch
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(model, attn_implementation="eager").eval()

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            given = {"input_ids": input_ids, "attention_mask": attention_mask}
            return tuple(self.encoder(**given, return_dict=False)[:2])

    place.mkdir(parents=True)
    ids = torch.from_numpy(IDS)
    given = ["input_ids", "attention_mask"]
    made = ["last_hidden_state", "pooler_output"]
    options: dict[str, Any] = {"input_names": given, "output_names": made, "dynamo": dynamo}
    if dynamo:
        sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
        options |= {"dynamic_shapes": (sizes, sizes), "verbose": False}
    else:
        symbols = {0: "batch", 1: "sequence"}
        options |= {"dynamic_axes": dict.fromkeys([*given, made[0]], symbols), "opset_version": 17}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter is deprecated, and in use
        torch.onnx.export(Plain(), (ids, torch.ones_like(ids)), place / "model.onnx", **options)


def export_as_optimum(model: Path, file: Path) -> None:
    """torch.onnx's older exporter on an encoder itself, its forward patched, as optimum does it."""
    import torch
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(model, attn_implementation="eager").eval()
    given, original = ["input_ids", "attention_mask"], encoder.forward
    encoder.forward = lambda *tensors: tuple(
        original(**dict(zip(given, tensors, strict=True)), return_dict=False)
    )[:1]
    file.parent.mkdir(parents=True)
    ids = torch.from_numpy(IDS)
    made = ["last_hidden_state"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            encoder,
            (ids, torch.ones_like(ids)),
            file,
            input_names=given,
            output_names=made,
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in [*given, *made]},
            opset_version=17,
            dynamo=False,
        )


def without_names(graph: Path, place: Path) -> None:
    """The same graph, its nodes and weights called by numbers and its metadata gone."""
    model = ir.load(graph)
    for number, node in enumerate(model.graph):
        node.name = f"n{number}"
        node.metadata_props.clear()
    for number, value in enumerate(list(model.graph.initializers.values())):
        model.graph.initializers.pop(str(value.name))
        value.name = f"w{number}"
        model.graph.register_initializer(value)
    place.mkdir(parents=True)
    ir.save(model, place / "model.onnx")


def quantise_statically(graph: Path, place: Path) -> None:
    """onnxruntime's own static quantisation, as QuantizeLinear and DequantizeLinear."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rest: Iterator[dict[str, Any]] = iter(
                [{"input_ids": IDS, "attention_mask": np.ones_like(IDS)}] * 2
            )

        def get_next(self) -> dict[str, Any] | None:
            return next(self._rest, None)

    place.mkdir(parents=True)
    quantize_static(
        graph,
        place / "model.onnx",
        Reader(),
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
    )


def quantise_dynamically(graph: Path, place: Path) -> None:
    """onnxruntime's own dynamic quantisation, as optimum offers it: MatMulInteger."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    place.mkdir(parents=True)
    target = place / "model.onnx"
    quantize_dynamic(graph, target, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])


def pack(graph: Path, place: Path, *, bits: int, symmetric: bool, block: int = 16) -> None:
    """onnxruntime's own MatMulNBits, each with its bias as an input, as its fusion writes them."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantiser = MatMulNBitsQuantizer(
        onnx.load(graph), bits=bits, block_size=block, is_symmetric=symmetric, accuracy_level=0
    )
    quantiser.process()
    model = quantiser.model.model
    constants = {value.name for value in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "MatMulNBits"]:
        (add,) = (each for each in model.graph.node if node.output[0] in each.input)
        bias = [name for name in add.input if name in constants]
        if add.op_type == "Add" and bias:
            node.input.extend([""] * (5 - len(node.input)) + bias)
            node.output[0] = add.output[0]
            model.graph.node.remove(add)
    place.mkdir(parents=True)
    onnx.save(model, place / "model.onnx")


def copy_of(directory: Path, place: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(directory, place))
