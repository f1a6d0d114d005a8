"""Finds the inputs and outputs of the PyTorch model's modules in a graph, and exposes them.

Nodes are assigned to modules by the same evidence as for adapters: the nodes' metadata, then their
names (naming.py), and the names that surgery gives to its own nodes. The output of a module is the
last value that is computed inside it and used outside; for a layer with side inputs, this is the
value after the low-rank update. The input of a module is a value that is computed elsewhere and
used inside it. If a module is called several times, the last call counts.
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
    is_step,
    module_of_output,
    module_of_step,
    modules_of_label,
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

# A norm fused with the residual addition before it: its last output is the input of the norm.
_SKIPPING: Final = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_SUM: Final = 3
# Operators that only rearrange values, which another operator has computed.
_LAYOUT: Final = ("Cast", "Identity", "Reshape", "Split", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True, eq=False)
class Probe:
    """A site in the graph: `value`, or the slice `part` of its last axis.

    `module`: the module that computes it; `node`, `op`: the node and operator that compute it.
    """

    site: Site
    value: ir.Value
    part: tuple[int, int] | None
    module: str
    node: str
    op: str


@dataclass(frozen=True, eq=False)
class ProbedGraph:
    """The loaded graph of a bundle, with the probes that were found in it.

    `unmatched`: the modules that were not found in the graph.
    """

    bundle: Path
    manifest: Manifest
    model: ir.Model
    probes: tuple[Probe, ...]
    unmatched: tuple[str, ...]

    def upstream(self) -> list[int]:
        """Return, for each probe, a bit set of the probes that its value is computed from."""
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
        """Write the bundle to `path`, with the probes as graph outputs, and return its manifest.

        The graph's weights are not copied, unless DoRA targets read them from the bundle. They
        cannot be linked: onnxruntime refuses symbolic links, and onnx-ir files with hard links.
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
            operators=(),
            logits_to_keep=False,
        )
        if manifest.encoder is not None:
            write_halves(path, manifest)
        write_json(path / MANIFEST_NAME, manifest.to_json())
        return manifest


def probe_graph(
    bundle: Path, manifest: Manifest, sites: Sequence[Site], modules: Modules
) -> ProbedGraph:
    """Find `sites` in the bundle's graph; of a graph with branches, in the branch with an adapter.

    Raises:
        ModelError: the graph cannot be read.
        ExportError: it does not have the branches that its manifest names.
    """
    model = load_bundle_graph(bundle, manifest)
    remove_choices(model, manifest)
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
    """The values of a graph, by the modules that compute them."""

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
        """Return the module that computes `value`."""
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Split" and (module := module_of_output(value)) is not None:
            return module
        return self._scopes.get(node)

    def candidates(
        self, site: Site, modules: Modules
    ) -> Iterator[tuple[ir.Value, tuple[int, int] | None]]:
        """Yield values that may be `site`, the best evidence first: modules without submodules."""
        own = [name for name in site.given_by if name in modules.leaves]
        for name in own:
            yield from self._given(name)
        for name in site.taken_by:
            yield from ((value, None) for value in self._taken(name))
        for name in site.given_by:
            if name not in own:
                yield from self._given(name)

    def _given(self, module: str) -> Iterator[tuple[ir.Value, tuple[int, int] | None]]:
        """Yield the outputs of `module`, the last first."""
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
        """Yield the inputs of `module`, those of its last call first."""
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
        """Record the modules of a fused scope such as parent.q_proj+k_proj+v_proj."""
        modules = modules_of_label(scope) if scope else []
        if len(modules) > 1:
            self._whole.update(dict.fromkeys(modules, str(scope)))

    def _find_fused(self, model: ir.Model, manifest: Manifest) -> dict[str, str]:
        """Record the slices of products that are fused in the graph itself.

        Return surgery's labels of such products, mapped to the scopes of the products.
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
    """Return the module path of a node, for nodes of surgery by their names."""
    found = module_of(node)
    if found is not None:
        return found[0]
    return module_of_step(node)


def _paths(scope: str | None) -> Iterator[str]:
    """Yield `scope` and all of its parents."""
    while scope:
        yield scope
        scope = scope.rpartition(".")[0]


def _within(scope: str | None, module: str) -> bool:
    return scope is not None and (scope == module or scope.startswith(f"{module}."))


def _fits(value: ir.Value, part: tuple[int, int] | None, shape: Sequence[int]) -> bool:
    """Whether `value` may have `shape`, possibly with its first two axes flattened."""
    if value.dtype is None or not value.dtype.is_floating_point() or value.shape is None:
        return False
    if len(value.shape) != len(shape) and (len(value.shape), len(shape)) != (2, 3):
        return False
    last = value.shape[-1]
    size = last if part is None else part[1] - part[0]
    return not isinstance(size, int) or size == shape[-1]


def _maker(value: ir.Value) -> ir.Node:
    """Return the node that computes `value`, skipping layout changes, updates and constants."""
    node = value.producer()
    assert node is not None
    while (source := _source(node)) is not None and (before := source.producer()) is not None:
        node = before
    return node


def _source(node: ir.Node) -> ir.Value | None:
    """Return the input that `node` only rearranges or adds an update or constant to, if any."""
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
    """Return the module that computes the input of `taker`, or the one that contains `taker`."""
    if scope in modules.names and scope != taker:
        return str(scope)
    around = (path for path in _paths(taker.rpartition(".")[0]) if path in modules.names)
    return next(around, taker)
