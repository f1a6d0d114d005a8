"""Changes of a bundle's graph or weights that also update the digests in its manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from loradeploy.adapter.files.digest import file_digest
from loradeploy.bundle.fingerprint import file_fingerprint

GRAPH = "model.onnx"
DATA = "model.onnx.data"


def change_graph(bundle: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    """Apply `change` to the graph of the bundle in place."""
    model = onnx.load(bundle / GRAPH, load_external_data=False)
    change(model.graph)
    (bundle / GRAPH).write_bytes(model.SerializeToString())
    _update_digests(bundle, graph_digest=file_digest(bundle / GRAPH))


def see_the_future_in_chunks(graph: onnx.GraphProto) -> None:
    """Remove the causal mask where there is a past: correct for one new token, wrong for more."""
    (compare,) = (node for node in graph.node if node.op_type == "LessOrEqual")
    (greater,) = compare.output
    for node in graph.node:
        node.input[:] = [f"{greater}.wrong" if name == greater else name for name in node.input]
    past = "past_key_values.0.key"
    added = [
        helper.make_node("Shape", [past], ["past_length"], start=2, end=3),
        helper.make_node("Greater", ["past_length", "no_past"], ["has_past"]),
        helper.make_node("Or", [greater, "has_past"], [f"{greater}.wrong"]),
    ]
    _insert_after(graph, compare, added)
    graph.initializer.append(numpy_helper.from_array(np.array([0]), "no_past"))


def leave_dropout_on(share: float) -> Callable[[onnx.GraphProto], None]:
    """Add `share` to a random half of the logits, selected by the mask of a Dropout node."""

    def change(graph: onnx.GraphProto) -> None:
        (last,) = (node for node in graph.node if "logits" in node.output)
        last.output[:] = ["quiet" if name == "logits" else name for name in last.output]
        added = [
            helper.make_node("Dropout", ["quiet", "half", "training"], ["dropped", "kept"]),
            helper.make_node("Cast", ["kept"], ["ones"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", ["ones", "share"], ["noise"]),
            helper.make_node("Add", ["quiet", "noise"], ["logits"]),
        ]
        _insert_after(graph, last, added)
        values = {"half": np.float32(0.5), "training": np.bool_(True), "share": np.float32(share)}
        graph.initializer.extend(
            numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()
        )

    return change


def change_embedding(bundle: Path, token: int) -> None:
    """Change the float32 embedding of one token."""
    model = onnx.load(bundle / GRAPH, load_external_data=False)
    (weight,) = (t for t in model.graph.initializer if t.name == "model.embed_tokens.weight")
    place = {entry.key: entry.value for entry in weight.external_data}
    width = weight.dims[1]
    with (bundle / DATA).open("r+b") as file:
        file.seek(int(place["offset"]) + token * width * 4)
        file.write(np.linspace(-1, 1, width, dtype=np.float32).tobytes())
    data = bundle / DATA
    _update_digests(bundle, data_digest=file_digest(data), data_fingerprint=file_fingerprint(data))


def _insert_after(graph: onnx.GraphProto, node: onnx.NodeProto, added: list[Any]) -> None:
    at = list(graph.node).index(node) + 1
    nodes = [*graph.node[:at], *added, *graph.node[at:]]
    del graph.node[:]
    graph.node.extend(nodes)


def _update_digests(bundle: Path, **digests: str) -> None:
    file = bundle / "loradeploy.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **digests}))
