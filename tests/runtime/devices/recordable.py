"""A GroupQueryAttention bundle for which WebGPU has all kernels, so that its runs can be recorded.

onnxruntime-ep-webgpu 0.4.0 has no Cos and Sin of opset 22, and reads the size of a mask from the
host. Here angles come from a table, and the number of positions is a constant. Results are those
of the bundle; positions are few, as GroupQueryAttention is wrong from 32 on with SwiftShader.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np

from loradeploy.adapter.files.digest import bytes_digest
from loradeploy.bundle.names import MANIFEST_NAME
from tests.inputs.edits import edited_json

POSITIONS: Final = 24


def make_recordable(bundle: Path, place: Path) -> Path:
    """Rewrite `bundle` (rows layout, GroupQueryAttention, all logits) to the directory `place`."""
    import onnx
    from onnx import helper, numpy_helper

    shutil.copytree(bundle, place)
    with edited_json(place / "config.json") as config:
        config["max_position_embeddings"] = POSITIONS
    file = place / "model.onnx"
    whole = {i.name: i for i in onnx.load(file).graph.initializer}
    model = onnx.load(file, load_external_data=False)
    graph = model.graph
    made: dict[str, Any] = {output: node for node in graph.node for output in node.output}
    dropped: list[Any] = []

    def drop(node: Any) -> Any:
        """Remove `node` and all earlier nodes whose outputs only removed nodes read."""
        dropped.append(node)
        for name in node.input:
            readers = [other for other in graph.node if name in other.input]
            if name in made and all(reader in dropped for reader in readers):
                drop(made[name])
        return node

    tables = {}
    for operator, function in (("Cos", np.cos), ("Sin", np.sin)):
        (turned,) = [node for node in graph.node if node.op_type == operator]
        (angles,) = [made[name] for name in turned.input]
        (frequencies,) = [whole[name] for name in angles.input if name in whole]
        all_angles = np.arange(POSITIONS)[:, None] * numpy_helper.to_array(frequencies).ravel()
        tables[turned.output[0]] = function(all_angles).astype(np.float32)
    attentions = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    (total,) = {node.input[6] for node in attentions}
    for name in (*tables, total):
        drop(made[name])
    kept = [node for node in graph.node if node not in dropped]
    gathers = []
    for name, table in tables.items():
        graph.initializer.append(numpy_helper.from_array(table, f"{name}/table"))
        gathers.append(helper.make_node("Gather", [f"{name}/table", "position_ids"], [name]))
    graph.initializer.append(numpy_helper.from_array(np.array(POSITIONS, np.int32), total))
    del graph.node[:]
    graph.node.extend([*gathers, *kept])
    onnx.save(model, file)
    with edited_json(place / MANIFEST_NAME) as manifest:
        manifest["graph_digest"] = bytes_digest(file.read_bytes())
    return place
