"""Fix the dimensions of a graph, for providers that compile it for its shapes.

    batch, sequence, past, …   →   the given sizes; total is past + sequence

Nodes do not change, and the sizes of side inputs stay dynamic: only a merged graph is fully static.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from loradeploy.errors import UsageError, listed_names

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.bundle.manifest import TensorSpec

_PAST, _SEQUENCE, _TOTAL = "past", "sequence", "total"


def use_static_shapes(graph: ir.Graph, sizes: Mapping[str, int]) -> None:
    """Replace the symbols of dimensions by `sizes`, in all values of the graph.

    Raises:
        UsageError: no input has a dimension of that name, or the sizes contradict each other.
    """
    import onnx_ir as ir

    inputs = [value for value in graph.inputs if not value.is_initializer()]
    known = {str(dim.value): None for value in inputs for dim in _symbols(value)}
    sizes = _complete(sizes, known)
    for name, size in sizes.items():
        if name not in known:
            has = listed_names(known, none="no open dimension")
            raise UsageError(f"`fixed`: the graph has no dimension {name!r}, it has {has}")
        if size < (name != _PAST):
            raise UsageError(f"`fixed`: {name} is {size}: give 1 or more")
    for value in _values(graph):
        if any(str(dim.value) in sizes for dim in _symbols(value)):
            assert value.shape is not None
            value.shape = ir.Shape(
                [
                    dim if isinstance(dim, int) else sizes.get(str(dim.value), dim)
                    for dim in value.shape
                ]
            )


def static_specs(specs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> tuple[TensorSpec, ...]:
    """`specs` with fixed dimensions; sizes whose names they lack are ignored."""
    known = {str(size): None for spec in specs for size in spec.shape if isinstance(size, str)}
    whole = _complete(sizes, known) if sizes else {}
    return tuple(
        dataclasses.replace(
            spec,
            shape=tuple(
                whole.get(size, size) if isinstance(size, str) else size for size in spec.shape
            ),
        )
        for spec in specs
    )


def _complete(sizes: Mapping[str, int], known: Mapping[str, None]) -> dict[str, int]:
    """`sizes` with the third of past, sequence and total, if two are given."""
    result = dict(sizes)
    if not {_PAST, _SEQUENCE, _TOTAL} <= known.keys():
        return result
    past, sequence, total = (sizes.get(name) for name in (_PAST, _SEQUENCE, _TOTAL))
    if past is not None and sequence is not None:
        result.setdefault(_TOTAL, past + sequence)
    elif sequence is not None and total is not None:
        result[_PAST] = total - sequence
    elif past is not None and total is not None:
        result[_SEQUENCE] = total - past
    if len(result.keys() & {_PAST, _SEQUENCE, _TOTAL}) == 3 and (
        result[_PAST] + result[_SEQUENCE] != result[_TOTAL] or result[_PAST] < 0
    ):
        raise UsageError(
            f"`fixed`: {result[_PAST]} past and {result[_SEQUENCE]} new positions are not"
            f" {result[_TOTAL]} in total"
        )
    return result


def _symbols(value: ir.Value) -> Iterator[ir.SymbolicDim]:
    for dimension in value.shape or ():
        if not isinstance(dimension, int) and dimension.value is not None:
            yield dimension


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    import onnx_ir as ir

    yield from graph.inputs
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from node.outputs
