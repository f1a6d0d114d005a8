"""The valid files that fuzzers mutate: a tiny bundle, an adapter for it, an ONNX file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tools.fuzzing.readers import Seeds
from tools.inputs.tiny_llama import tiny_llama


def make_seeds(place: Path) -> Seeds:
    """Write the seeds to the directory `place`; takes about ten seconds, mostly in PyTorch."""
    from loradeploy.export.api import export

    model = tiny_llama(place / "model")
    adapter = make_adapter(place / "adapter")
    bundle = place / "bundle"
    export(model, bundle, adapters={"own": adapter})
    return Seeds(adapter, bundle, bundle / "adapters" / "own.onnx_adapter", make_graph(place / "g"))


def make_adapter(place: Path) -> Path:
    """Write an adapter of rank 2 for the tiny Llama of two layers, hidden size 32."""
    from loradeploy.adapter.files.tensors import write_arrays

    place.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    arrays = {}
    for layer in range(2):
        for module, into, out in (("self_attn.q_proj", 32, 32), ("mlp.down_proj", 48, 32)):
            name = f"base_model.model.model.layers.{layer}.{module}"
            for half, shape in (("lora_A", (2, into)), ("lora_B", (out, 2))):
                arrays[f"{name}.{half}.weight"] = random.normal(size=shape).astype(np.float32)
    write_arrays(place / "adapter_model.safetensors", arrays, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "bias": "none",
        "use_dora": False,
    }
    (place / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return place


def make_graph(place: Path) -> Path:
    """Write an encoder with one linear layer in ONNX, as another exporter may write it."""
    import onnx
    from onnx import TensorProto, helper

    place.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    sizes = {"emb": (60, 8), "q_proj.weight": (8, 8), "norm.weight": (8,)}
    tensors = [
        onnx.numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name)
        for name, shape in sizes.items()
    ]
    nodes = [
        helper.make_node("Gather", ["emb", "input_ids"], ["e"]),
        helper.make_node("MatMul", ["e", "q_proj.weight"], ["q"], name="/q_proj/MatMul"),
        helper.make_node("Mul", ["q", "norm.weight"], ["n"]),
        helper.make_node("Transpose", ["n"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["n", "t"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "n"], ["last_hidden_state"]),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [
            helper.make_tensor_value_info(
                "last_hidden_state", TensorProto.FLOAT, ["batch", "sequence", 8]
            )
        ],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    file = place / "model.onnx"
    file.write_bytes(model.SerializeToString())
    return file
