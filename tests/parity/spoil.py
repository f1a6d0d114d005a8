"""Copies of bundles with one deliberate fault in the graph."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from loradeploy.adapter.files.digest import file_digest
from loradeploy.bundle.manifest import read_manifest
from loradeploy.bundle.names import GRAPH_NAME, MANIFEST_NAME
from loradeploy.export.graph.edit import constant_of, set_constant
from loradeploy.files import write_json

Change = Callable[[ir.Graph], None]


def spoiled(bundle: Path, place: Path, change: Change) -> Path:
    """Copy `bundle` with a changed graph, and update the digest in its manifest."""
    shutil.copytree(bundle, place)
    model = ir.load(place / GRAPH_NAME)
    change(model.graph)
    ir.save(model, place / GRAPH_NAME)
    digest = file_digest(place / GRAPH_NAME)
    manifest = dataclasses.replace(read_manifest(bundle), graph_digest=digest)
    write_json(place / MANIFEST_NAME, manifest.to_json())
    return place


def weight(
    name: str, *, columns: slice = slice(None), by: float = 1.5, plus: float = 0.0
) -> Change:
    """Multiply the initializer `name`, or some columns of its last axis, by `by` and add `plus`."""

    def change(graph: ir.Graph) -> None:
        value = graph.initializers[name]
        numbers = constant_of(value).copy()
        numbers[..., columns] = numbers[..., columns] * by + plus
        set_constant(value, numbers)

    return change


def reads(operator: str, value: str) -> Callable[[ir.Node], bool]:
    """A predicate: is a node an `operator` that reads a value whose name ends in `value`?"""

    def reads(node: ir.Node) -> bool:
        names = [str(each.name) for each in node.inputs if each is not None]
        return node.op_type == operator and any(name.endswith(value) for name in names)

    return reads


def attribute(node: Callable[[ir.Node], bool], name: str, number: float) -> Change:
    """Set the attribute `name` of the one node that `node` selects to `number`."""

    def change(graph: ir.Graph) -> None:
        (found,) = (each for each in graph if node(each))
        found.attributes[name] = ir.AttrFloat32(name, number)

    return change


def operator(output: Callable[[ir.Node], bool], other: str) -> Change:
    """Replace the operator of the one node that `output` selects by `other`."""

    def change(graph: ir.Graph) -> None:
        (found,) = (each for each in graph if output(each))
        found.op_type = other

    return change
