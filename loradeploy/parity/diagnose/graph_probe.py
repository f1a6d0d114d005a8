"""Which values of a graph the modules of the PyTorch model give and take, and a way to see them.

The evidence is what finds layers for adapters: the nodes' metadata, then node names (naming.py),
and the names that surgery gives to its own nodes. A module gives the last value that is computed
within it and used outside of it, so that of a layer with side inputs it is the one behind the
low-rank update; it takes the value that is computed elsewhere and used within it. Of a module that
is called several times, the last call counts.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import (
    CERTIFICATE_NAME,
    ENCODER_NAME,
    GRAPH_DATA_NAME,
    GRAPH_NAME,
    MANIFEST_NAME,
)
from loradeploy.export.graph.halves import (
    load_bundle_graph,
    with_encoder_outputs,
    write_halves,
)
from loradeploy.export.graph.names import (
    HEAD_ADD,
    LORA_ADD,
    OFFSET_ADD,
    SCALE_MUL,
    called_after,
    is_step,
    module_of_output,
    module_of_step,
)
from loradeploy.export.match.linears import find_linears
from loradeploy.export.match.modules.naming import module_of
from loradeploy.export.passes.fuse import came_fused, products_of
from loradeploy.export.passes.undo import remove_choices
from loradeploy.export.read.regular import complete_shapes
from loradeploy.files import write_json

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.parity.diagnose.torch_probe import Modules, Site

# A norm that adds what it skips first: its last output is what a norm alone would take.
_SKIPPING: Final = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_SUM: Final = 3
# What only rearranges numbers: the operator that made them stands before it.
_LAYOUT: Final = ("Cast", "Identity", "Reshape", "Split", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True, eq=False)
class Probe:
    """A site in the graph: `value`, or the `part` of its last axis.

    `module`, `node`, `op`: whose computation it is, and the operator that makes it.
    """

    site: Site
    value: ir.Value
    part: tuple[int, int] | None
    module: str
    node: str
    op: str


@dataclass(frozen=True, eq=False)
class ProbedGraph:
    """A bundle's graph, loaded, with the probes that were found in it.

    `unmatched`: the modules that nothing in the graph could be identified as.
    """

    bundle: Path
    manifest: Manifest
    model: ir.Model
    probes: tuple[Probe, ...]
    unmatched: tuple[str, ...]

    def upstream(self) -> list[int]:
        """For each probe the probes that its value is computed from, as bits."""
        numbers: dict[ir.Value, int] = {}
        for number, probe in enumerate(self.probes):
            numbers[probe.value] = numbers.get(probe.value, 0) | 1 << number
        behind: dict[ir.Value, int] = {}
        for node in self.model.graph:
            bits = 0
            for value in node.inputs:
                if value is not None:
                    bits |= behind.get(value, 0) | numbers.get(value, 0)
            behind.update(dict.fromkeys(node.outputs, bits))
        return [behind.get(probe.value, 0) for probe in self.probes]

    def write(self, path: Path) -> Manifest:
        """Write the bundle to `path`, its graph giving the probes' values too; its manifest.

        The graph's weights stay where they are: onnxruntime refuses those behind a symbolic link,
        and onnx-ir a file that has hard links. Only what DoRA reads them for gets a copy.
        """
        import onnx_ir as ir

        given = set(self.model.graph.outputs)
        for value in dict.fromkeys(probe.value for probe in self.probes):
            if value not in given:
                self.model.graph.outputs.append(value)
        left = [GRAPH_NAME, ENCODER_NAME, MANIFEST_NAME, CERTIFICATE_NAME]
        if all(target.stored is None for target in self.manifest.targets):
            left.append(GRAPH_DATA_NAME)
        shutil.copytree(self.bundle, path, ignore=shutil.ignore_patterns(*left))
        ir.save(self.model, path / GRAPH_NAME)
        manifest = dataclasses.replace(
            with_encoder_outputs(self.model, self.manifest),
            graph_digest=None,
            branches=False,
            logits_to_keep=False,
        )
        if manifest.encoder is not None:
            write_halves(path, manifest)
        write_json(path / MANIFEST_NAME, manifest.to_json())
        return manifest


def probe_graph(
    bundle: Path, manifest: Manifest, sites: Sequence[Site], modules: Modules
) -> ProbedGraph:
    """Find `sites` in the bundle's graph. Of a graph with branches it is the one with an adapter.

    Raises:
        ModelError: the graph cannot be read. ExportError: it lacks the branches it should have.
    """
    model = load_bundle_graph(bundle, manifest)
    remove_choices(model.graph, manifest)
    complete_shapes(model)
    graph = _Graph(model, manifest)
    probes: list[Probe] = []
    unmatched: list[str] = []
    claimed: set[tuple[ir.Value, tuple[int, int] | None]] = set()
    for site in sites:
        found = next(
            (
                (value, part)
                for value, part in graph.candidates(site, modules)
                if (value, part) not in claimed and _fits(value, part, site.shape)
            ),
            None,
        )
        if found is None:
            unmatched += [site.given_by[0]] if site.given_by else []
            continue
        claimed.add(found)
        node = _maker(found[0])
        module = (
            site.given_by[0]
            if site.given_by
            else _computing(graph.scope_of(node.outputs[0]), site.taken_by[0], modules)
        )
        probes.append(Probe(site, *found, module, node.name or "", node.op_type))
    return ProbedGraph(bundle, manifest, model, tuple(probes), tuple(unmatched))


class _Graph:
    """The values of a graph by the modules that they are of."""

    def __init__(self, model: ir.Model, manifest: Manifest) -> None:
        self._scopes: dict[ir.Node, str | None] = {}
        self._nodes: dict[str, list[ir.Node]] = {}
        self._parts: dict[str, tuple[str, tuple[int, int]]] = {}
        self._whole: dict[str, str] = {}
        fused = self._find_fused(model, manifest)
        for node in model.graph:
            scope = _scope(node)
            scope = fused.get(scope, scope) if scope else scope
            self._scopes[node] = scope
            self._take_apart(scope)
            for path in _paths(scope):
                self._nodes.setdefault(path, []).append(node)

    def scope_of(self, value: ir.Value) -> str | None:
        """The module that computes `value`."""
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Split" and (module := module_of_output(value)) is not None:
            return module
        return self._scopes.get(node)

    def candidates(
        self, site: Site, modules: Modules
    ) -> Iterator[tuple[ir.Value, tuple[int, int] | None]]:
        """What may be `site`, by the best evidence first: modules without others inside."""
        own = [name for name in site.given_by if name in modules.leaves]
        for name in own:
            yield from self._given(name)
        for name in site.taken_by:
            yield from ((value, None) for value in self._taken(name))
        for name in site.given_by:
            if name not in own:
                yield from self._given(name)

    def _given(self, module: str) -> Iterator[tuple[ir.Value, tuple[int, int] | None]]:
        """What leaves `module`, the last first."""
        if module in self._parts:
            whole, part = self._parts[module]
            yield from ((value, part) for value, _ in self._given(whole))
            return
        nodes = self._nodes.get(module) or self._nodes.get(self._whole.get(module, ""), [])
        for node in reversed(nodes):
            for value in node.outputs if node.op_type == "Split" else node.outputs[:1]:
                if _within(self.scope_of(value), module) and self._leaves(value, module):
                    yield value, None

    def _leaves(self, value: ir.Value, module: str) -> bool:
        users = (self._scopes.get(use.node) for use in value.uses())
        return value.is_graph_output() or any(not _within(scope, module) for scope in users)

    def _taken(self, module: str) -> Iterator[ir.Value]:
        """What comes from elsewhere into `module`, into its last call first."""
        scope = module if module in self._nodes else self._whole.get(module, module)
        for node in reversed(self._nodes.get(scope, [])):
            if node.op_type in _SKIPPING:
                yield from (value for value in node.outputs[_SUM:] if value.name)
                continue
            for value in node.inputs:
                if value is None or value.is_initializer() or value.is_graph_input():
                    continue
                if not _within(self.scope_of(value), scope):
                    yield value

    def _take_apart(self, scope: str | None) -> None:
        """Note which modules a scope like parent.q_proj+k_proj+v_proj is of."""
        modules = called_after(scope) if scope else []
        if len(modules) > 1:
            self._whole.update(dict.fromkeys(modules, str(scope)))

    def _find_fused(self, model: ir.Model, manifest: Manifest) -> dict[str, str]:
        """Note the parts of products that are fused in the graph itself; surgery's labels of them.

        The labels are mapped to the scopes of the products.
        """
        for linear in find_linears(model).linears.values():
            scope = _scope(linear.nodes[0]) if linear.slice is not None else None
            if scope is not None and linear.slice is not None:
                self._parts[linear.module] = (scope, linear.slice)
                self._whole[linear.module] = scope
        return {
            label: self._whole[first]
            for label, members in products_of(manifest.targets)
            if came_fused(label, members) and (first := members[0].module) in self._whole
        }


def _scope(node: ir.Node) -> str | None:
    """The module path of a node, or what surgery called it after."""
    found = module_of(node)
    if found is not None:
        return found[0]
    return module_of_step(node)


def _paths(scope: str | None) -> Iterator[str]:
    """`scope` and all that it is in."""
    while scope:
        yield scope
        scope = scope.rpartition(".")[0]


def _within(scope: str | None, module: str) -> bool:
    return scope is not None and (scope == module or scope.startswith(f"{module}."))


def _fits(value: ir.Value, part: tuple[int, int] | None, shape: Sequence[int]) -> bool:
    """Whether `value` may be numbers of `shape`, its first axes laid out in one or not."""
    if value.dtype is None or not value.dtype.is_floating_point() or value.shape is None:
        return False
    if len(value.shape) != len(shape) and (len(value.shape), len(shape)) != (2, 3):
        return False
    last = value.shape[-1]
    size = last if part is None else part[1] - part[0]
    return not isinstance(size, int) or size == shape[-1]


def _maker(value: ir.Value) -> ir.Node:
    """The node that makes the numbers of `value`: past layout, updates and constants added."""
    node = value.producer()
    assert node is not None
    while (source := _source(node)) is not None and (before := source.producer()) is not None:
        node = before
    return node


def _source(node: ir.Node) -> ir.Value | None:
    """What `node` only carries on: rearranged, with an update or a constant."""
    inputs: list[ir.Value] = [value for value in node.inputs if value is not None]
    if node.op_type in _LAYOUT or is_step(node, LORA_ADD, SCALE_MUL):
        return inputs[0]
    if node.op_type != "Add":
        return None
    computed = [value for value in inputs if not value.is_initializer()]
    if is_step(node, OFFSET_ADD, HEAD_ADD):
        return inputs[0]
    return computed[0] if len(computed) == 1 else None


def _computing(scope: str | None, taker: str, modules: Modules) -> str:
    """The module that computes what `taker` takes: by the graph, or the one that `taker` is in."""
    if scope in modules.names and scope != taker:
        return str(scope)
    around = (path for path in _paths(taker.rpartition(".")[0]) if path in modules.names)
    return next(around, taker)
