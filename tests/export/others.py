"""The tiny models exported and quantized by other tools."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

_TOKENS = ("input_ids", "attention_mask")
IDS = np.random.default_rng(3).integers(3, 512, (3, 11))


def export_with_torch(model: Path, place: Path, *, dynamo: bool, opset: int = 17) -> None:
    """Export an encoder by plain torch.onnx.export, with or without dynamo."""
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
        options |= {"dynamic_axes": dict.fromkeys([*given, made[0]], symbols)}
        options["opset_version"] = opset
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter is deprecated but still used
        torch.onnx.export(Plain(), (ids, torch.ones_like(ids)), place / "model.onnx", **options)


def export_as_optimum(model: Path, file: Path, *, masked: bool = False) -> None:
    """Export an encoder by torch.onnx's older exporter with a patched forward, as optimum does.

    `masked`: with the logits of its masked language model.
    """
    import torch
    from transformers import AutoModel, AutoModelForMaskedLM

    kind = AutoModelForMaskedLM if masked else AutoModel
    encoder = kind.from_pretrained(model, attn_implementation="eager").eval()
    given, original = ["input_ids", "attention_mask"], encoder.forward
    encoder.forward = lambda *tensors: tuple(
        original(**dict(zip(given, tensors, strict=True)), return_dict=False)
    )[:1]
    file.parent.mkdir(parents=True)
    ids = torch.from_numpy(IDS)
    made = ["logits" if masked else "last_hidden_state"]
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


def export_decoder(
    model: Path, place: Path, *, cache: bool, positions: bool = False, layout: str = "heads first"
) -> None:
    """Export a decoder by torch.onnx's older exporter, with or without a cache, as scripts do.

    `layout` of the cache: "heads first", "tokens first" or "stacked" in one tensor.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import DynamicCache

    decoder = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    config = decoder.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = config.hidden_size // config.num_attention_heads
    layers = range(config.num_hidden_layers if cache else 0)
    plain = ["input_ids", "attention_mask", *(["position_ids"] if positions else [])]

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, *given: torch.Tensor) -> Any:
            feeds: dict[str, Any] = dict(zip(plain, given, strict=False))
            past = given[len(plain) :]
            if layout == "stacked":  # [layers, 2, batch, heads, past, size]
                past = tuple(part for layer in past[0] for part in layer)
            elif layout == "tokens first":
                past = tuple(part.transpose(1, 2) for part in past)
            held = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
            if cache:
                feeds["past_key_values"] = held
            logits = self.decoder(**feeds, use_cache=cache).logits
            made = [part for layer in held.layers for part in (layer.keys, layer.values)]
            if layout == "stacked":
                return logits, torch.stack(made).unflatten(0, (len(layers), 2))
            return logits, *(p.transpose(1, 2) if layout == "tokens first" else p for p in made)

    place.mkdir(parents=True)
    parts = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    pasts, presents = [f"past_key_values.{p}" for p in parts], [f"present.{p}" for p in parts]
    batch_axis, past_axis = {"tokens first": (0, 1), "stacked": (2, 4)}.get(layout, (0, 2))
    if layout == "stacked":
        pasts, presents = ["past_key_values"], ["present"]
    axes = {key: {0: "batch", 1: "sequence"} for key in [*plain, "logits"]}
    axes |= {"attention_mask": {0: "batch", 1: "total" if cache else "sequence"}}
    axes |= {key: {batch_axis: "batch", past_axis: "past"} for key in pasts}
    axes |= {key: {batch_axis: "batch", past_axis: "total"} for key in presents}
    ids, before = torch.tensor([[5, 6, 7], [8, 9, 10]]), 4 if cache else 0
    given: list[torch.Tensor] = [ids, torch.ones(2, 3 + before, dtype=torch.int64)]
    if positions:
        given.append(torch.arange(3).repeat(2, 1) + before)
    shape = (2, before, heads, size) if layout == "tokens first" else (2, heads, before, size)
    caches = [torch.ones(shape) for _ in parts]
    given += [torch.stack(caches).unflatten(0, (-1, 2))] if layout == "stacked" else caches
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Plain(),
            tuple(given),
            place / "model.onnx",
            input_names=[*plain, *pasts],
            output_names=["logits", *presents],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, place)


def without_mask(graph: Path, place: Path) -> None:
    """Remove the input attention_mask: every token is visible, including padding."""
    model = ir.load(graph)
    ids, mask = (next(v for v in model.graph.inputs if v.name == n) for n in _TOKENS)
    shape = ir.node("Shape", [ids], name="ids_shape")
    one = ir.tensor(np.ones(1, np.int64), name="one")
    ones = ir.node("ConstantOfShape", [shape.outputs[0]], attributes={"value": one}, name="ones")
    ones.outputs[0].name, shape.outputs[0].name = "all_seen", "ids_shape"
    for node, index in list(mask.uses()):
        node.replace_input_with(index, ones.outputs[0])
    model.graph.insert_before(model.graph[0], [shape, ones])
    model.graph.inputs.remove(mask)
    place.mkdir(parents=True)
    ir.save(model, place / "model.onnx")


def with_int32(graph: Path, place: Path, *, output: str) -> None:
    """Change integer inputs to int32, and rename the first output to `output`."""
    model = ir.load(graph)
    for value in model.graph.inputs:
        if value.dtype == ir.DataType.INT64:
            to_long = {"to": int(ir.DataType.INT64)}
            cast = ir.node("Cast", [value], attributes=to_long, name=f"{value.name}_64")
            cast.outputs[0].name = cast.name
            for node, index in list(value.uses()):
                if node is not cast:
                    node.replace_input_with(index, cast.outputs[0])
            model.graph.insert_before(model.graph[0], cast)
            value.dtype = ir.DataType.INT32
    model.graph.outputs[0].name = output
    place.mkdir(parents=True)
    ir.save(model, place / "model.onnx")


def without_names(graph: Path, place: Path) -> None:
    """Rename nodes and weights to numbers and remove the metadata."""
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
    """Quantize by onnxruntime's static quantization (QuantizeLinear, DequantizeLinear)."""
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
    """Quantize by onnxruntime's dynamic quantization, as optimum does (MatMulInteger)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    place.mkdir(parents=True)
    target = place / "model.onnx"
    quantize_dynamic(graph, target, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])


def pack(graph: Path, place: Path, *, bits: int, symmetric: bool, block: int = 16) -> None:
    """Quantize by onnxruntime to MatMulNBits with the biases as inputs, like its fusion."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(graph), bits=bits, block_size=block, is_symmetric=symmetric, accuracy_level=0
    )
    quantizer.process()
    model = quantizer.model.model
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


def dequantise_in_blocks(graph: Path, place: Path) -> None:
    """Quantize by onnxruntime to 4 bits in blocks (DequantizeLinear)."""
    import logging

    import onnx
    from onnxruntime.quantization import QuantFormat

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    root.handlers[:] = handlers
    root.setLevel(level)
    config = DefaultWeightOnlyQuantConfig(
        block_size=16, is_symmetric=True, quant_format=QuantFormat.QDQ
    )
    quantizer = MatMulNBitsQuantizer(onnx.load(graph), algo_config=config)
    quantizer.process()
    place.mkdir(parents=True)
    quantizer.model.save_model_to_file(str(place / "model.onnx"))


def copy_of(directory: Path, place: Path) -> Path:
    """Copy a directory for a test that modifies it."""
    return Path(shutil.copytree(directory, place))
