"""Invalid ONNX files are refused by name before anything is derived from them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from loradeploy.errors import ModelError
from loradeploy.export.graph.file import load_graph
from loradeploy.export.graph.sound import check_opens
from loradeploy.export.match.observe import open_model
from tools.fuzzing.seeds import make_graph

Change = Callable[[Any, Path], object]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An encoder with a single product."""
    return make_graph(tmp_path)


def changed(file: Path, change: Change) -> Path:
    model = onnx.load(file)
    change(model, file.parent)
    file.write_bytes(model.SerializeToString())
    return file


def outside(model: Any, place: Path, location: str = "w.bin", offset: str = "0") -> None:
    """Move the second weight to the external file `w.bin`."""
    tensor = model.graph.initializer[1]
    (place / "w.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", "256")):
        tensor.external_data.add(key=key, value=value)


def linked(model: Any, place: Path) -> None:
    outside(model, place)
    os.link(place / "w.bin", place / "other.bin")


def functions(model: Any, count: int, calls: Callable[[int], int]) -> None:
    """Add `count` functions that each call another function twice; the first one calls Neg."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
    for number in range(count):
        name, domain = (f"F{calls(number)}", "f") if number else ("Neg", "")
        nodes = [
            helper.make_node(name, [a], [b], domain=domain) for a, b in (("x", "t"), ("t", "y"))
        ]
        model.functions.append(helper.make_function("f", f"F{number}", ["x"], ["y"], nodes, opsets))
    model.graph.node[-1].output[0] = "last"
    call = helper.make_node(f"F{count - 1}", ["last"], ["last_hidden_state"], domain="f")
    model.graph.node.append(call)
    model.opset_import.append(opsets[1])


BROKEN: dict[str, tuple[Change, str]] = {
    "fewer bytes than the shape": (
        lambda m, _: setattr(m.graph.initializer[1], "raw_data", b"abcd"),
        "has 4 bytes, its shape needs 256",
    ),
    "a size below zero": (lambda m, _: m.graph.initializer[1].dims.__setitem__(0, -8), "shape"),
    "a size without end": (lambda m, _: m.graph.initializer[1].dims.extend([2**62]), "shape"),
    "a dtype that there is not": (
        lambda m, _: setattr(m.graph.initializer[1], "data_type", 99),
        "ONNX model",
    ),
    "a loose end": (
        lambda m, _: m.graph.node[1].input.__setitem__(0, "no"),
        "which is not defined",
    ),
    "an output of nothing": (lambda m, _: m.graph.node.pop(), "is not defined"),
    "a node of nothing": (lambda m, _: m.graph.node[2].output.pop(), "ONNX model"),
    "a circle": (lambda m, _: m.graph.node[2].input.__setitem__(1, "p"), "form a cycle"),
    "an input without end": (
        lambda m, _: m.graph.input[0].type.tensor_type.shape.dim.add(dim_value=2**40),
        "its input input_ids",
    ),
    "a null byte in a path": (lambda m, p: outside(m, p, "w\0.bin"), "not a file path"),
    "a name that is too long": (lambda m, p: outside(m, p, "w" * 5000), "not a file path"),
    "a way out": (lambda m, p: outside(m, p, "../w.bin"), "is outside"),
    "data that ends early": (lambda m, p: outside(m, p, offset="8"), "too short"),
    "data before its file": (lambda m, p: outside(m, p, offset="-8"), "ONNX model|before"),
    "data of several names": (linked, "hard links"),
    "functions that grow": (lambda m, _: functions(m, 40, lambda n: n - 1), "nodes with its func"),
    "functions in a circle": (lambda m, _: functions(m, 3, lambda n: 2), "calls itself"),
    "functions in a row": (lambda m, _: functions(m, 2000, lambda n: n - 1), "ONNX model"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_invalid_file_is_refused(what: str, file: Path) -> None:
    change, message = BROKEN[what]
    with pytest.raises(ModelError, match=message) as raised:
        load_graph(changed(file, change))
    assert "\n" not in str(raised.value)


def test_unusual_but_valid_graphs_are_read(file: Path) -> None:
    def unsorted(model: Any, place: Path) -> None:
        outside(model, place)
        functions(model, 4, lambda number: number - 1)  # 2⁴ nodes, as Neg cancels itself
        nodes = [*model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend(reversed(nodes))

    expected = onnx.load(file).graph.initializer[1]
    model = load_graph(changed(file, unsorted))
    weight = model.graph.initializers["q_proj.weight"].const_value
    assert weight is not None
    assert np.array_equal(weight.numpy(), onnx.numpy_helper.to_array(expected))
    check_opens(file)


def test_an_if_before_the_values_that_its_branches_use_is_read(file: Path) -> None:
    """onnxruntime's quantizers sort nodes without regard to the branches of an If."""

    def captured(model: Any, _: Path) -> None:
        last = model.graph.node[-1]
        name, last.output[0] = last.output[0], "before"
        shape = helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, None)
        copy = [helper.make_node("Identity", ["before"], ["b"])]
        body = helper.make_graph(copy, "body", [], [shape])
        true = onnx.numpy_helper.from_array(np.array(True), "true")
        model.graph.initializer.append(true)
        node = helper.make_node("If", ["true"], [name], then_branch=body, else_branch=body)
        model.graph.node.insert(0, node)

    check_opens(changed(file, captured))
    assert [node.op_type for node in load_graph(file).graph][-1] == "If"


def test_weights_behind_the_links_of_the_hubs_cache_are_read(file: Path, tmp_path: Path) -> None:
    expected = onnx.numpy_helper.to_array(onnx.load(file).graph.initializer[1])
    changed(file, outside)
    repository = tmp_path / "models--me--mine"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc" / "onnx"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for digest, path in (("1f", file), ("2e", file.parent / "w.bin")):
        path.rename(blobs / digest)
        (snapshot / path.name).symlink_to(blobs / digest)
    graph = snapshot / file.name
    check_opens(graph)
    model = load_graph(graph)
    weight = model.graph.initializers["q_proj.weight"].const_value
    assert weight is not None
    assert np.array_equal(weight.numpy(), expected)
    session = open_model(model, snapshot)
    feeds = {value.name: np.array([[1, 2, 3]]) for value in session.get_inputs()}
    assert session.run(None, feeds)[0].shape[:2] == (1, 3)


@pytest.mark.parametrize("what", ["graph", "data"])
def test_a_pointer_of_git_lfs_is_named(what: str, file: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n"
    changed(file, outside)
    (file if what == "graph" else file.parent / "w.bin").write_text(pointer)
    with pytest.raises(
        ModelError, match=r"is a pointer of Git LFS, not the file: run git lfs pull"
    ):
        load_graph(file)


def test_contradictory_graphs_are_refused_by_onnxruntime(file: Path) -> None:
    def other_rank(model: Any, _: Path) -> None:
        model.graph.initializer[1].dims[:] = [2, 4, 8]

    changed(file, other_rank)
    with pytest.raises(ModelError, match="onnxruntime"):
        check_opens(file)
