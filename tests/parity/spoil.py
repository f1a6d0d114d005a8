"""Bundles with one thing wrong inside."""

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
    """A copy of `bundle` whose graph is changed, and whose manifest holds the graph for its own."""
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
    """The initializer `name`, or some of its last axis, times `by` and `plus` that."""

    def change(graph: ir.Graph) -> None:
        value = graph.initializers[name]
        numbers = constant_of(value).copy()
        numbers[..., columns] = numbers[..., columns] * by + plus
        set_constant(value, numbers)

    return change


def reads(operator: str, value: str) -> Callable[[ir.Node], bool]:
    """Whether a node is an `operator` that reads a value whose name ends so."""

    def reads(node: ir.Node) -> bool:
        names = [str(each.name) for each in node.inputs if each is not None]
        return node.op_type == operator and any(name.endswith(value) for name in names)

    return reads


def attribute(node: Callable[[ir.Node], bool], name: str, number: float) -> Change:
    """The attribute `name` of the one node that `node` picks."""

    def change(graph: ir.Graph) -> None:
        (found,) = (each for each in graph if node(each))
        found.attributes[name] = ir.AttrFloat32(name, number)

    return change


def operator(output: Callable[[ir.Node], bool], other: str) -> Change:
    """Another operator in the place of the one node that `output` picks."""

    def change(graph: ir.Graph) -> None:
        (found,) = (each for each in graph if output(each))
        found.op_type = other

    return change
