"""One graph in the forms that tools give it takes an adapter with the same results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from loradeploy.export.api import export
from tests.conftest import MakeAdapter, once
from tests.export import others
from tests.export.others import IDS
from tests.export.reference import difference, factors, onnx_output, torch_output
from tests.tolerances import tolerance

TASK = "feature-extraction"


def _matrices(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The weights of products, by name."""
    constants = {each.name: each for each in model.graph.initializer}
    used = {node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    return {name: each for name, each in constants.items() if name in used}


def _replace_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _constant_nodes(model: onnx.ModelProto) -> None:
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    _replace_nodes(model, [*nodes, *model.graph.node])
    del model.graph.initializer[:]


def _transposed(model: onnx.ModelProto) -> None:
    before = []
    for name, tensor in _matrices(model).items():
        turned = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
        tensor.CopyFrom(numpy_helper.from_array(turned, f"{name}.T"))
        before.append(helper.make_node("Transpose", [f"{name}.T"], [name], perm=[1, 0]))
    _replace_nodes(model, [*before, *model.graph.node])


def _stored_in_fp16(model: onnx.ModelProto) -> None:
    before = []
    for name, tensor in _matrices(model).items():
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
        before.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    _replace_nodes(model, [*before, *model.graph.node])


def _local_functions(model: onnx.ModelProto) -> None:
    (opset,) = (each for each in model.opset_import if each.domain == "")
    body = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model.functions.append(helper.make_function("own", "Linear", ["x", "w"], ["y"], body, [opset]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    weights = _matrices(model)
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            node.op_type, node.domain = "Linear", "own"


FORMS: dict[str, Callable[[onnx.ModelProto], None]] = {
    "constants as nodes": _constant_nodes,
    "weights transposed": _transposed,
    "weights in fp16": _stored_in_fp16,
    "local functions": _local_functions,
}


@pytest.fixture(scope="session")
def plain(shared: Path, tiny_bert: Path) -> Path:
    """The tiny BERT as optimum exports it."""
    place = shared / "encoder-as-optimum"
    return once(place, lambda out: others.export_as_optimum(tiny_bert, out / "model.onnx"))


@pytest.mark.parametrize("merge", [False, True], ids=["side inputs", "merged"])
@pytest.mark.parametrize("form", FORMS)
def test_a_graph_in_another_form_takes_an_adapter_with_the_same_results(
    form: str, merge: bool, plain: Path, tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model = onnx.load(plain / "model.onnx")
    FORMS[form](model)
    (tmp_path / "graph").mkdir()
    onnx.save(model, tmp_path / "graph" / "model.onnx")
    modules = ["query", "value", "output.dense"]
    adapter = make_adapter(tiny_bert, task=TASK, r=4, scale=0.2, target_modules=modules)
    bundle = tmp_path / "bundle"
    export(tmp_path / "graph", bundle, adapters={"a": adapter}, merge=merge, checkpoint=tiny_bert)
    found = onnx_output(bundle, IDS, side={} if merge else factors(bundle, adapter))
    expected = torch_output(tiny_bert, IDS, task=TASK, adapter=adapter)
    limit = "fp16-rounding" if form == "weights in fp16" else "torch-onnx-tiny"
    scale = np.abs(expected).max() if form == "weights in fp16" else 1.0
    assert difference(found, expected) <= tolerance(limit) * scale
    assert difference(expected, torch_output(tiny_bert, IDS, task=TASK)) > 0.1
