"""Trace the first layers of a deep model, and repeat them in the traced program.

torch.export takes most of the time of an export, and the time is proportional to the layers. If all
layers of a model are alike, four are traced:

    layers 0 and 1    may have nodes that later layers share, and other numbers in names
    layers 2 and 3    have the same nodes, up to the numbers in their names
    layer i > 3       gets the nodes of layer 3 with its own parameters, after layer i - 1

The program is that of a trace of all layers, except for numbers in names. If this is not certain
(another architecture, layers that differ in anything, nodes that do not correspond), all layers are
traced.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from loradeploy.export.trace.program.alike import TRACED, equal

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Node

_THIRD, _FOURTH = TRACED - 2, TRACED - 1
_PAST: Final = re.compile(r"past_(\d+)_\d+")
_NUMBER: Final = re.compile(r"(_\d+)+$")


class NotAlikeError(Exception):
    """The layers of a program do not correspond."""


def extend(program: ExportedProgram, wrapper: torch.nn.Module, path: str, count: int) -> None:
    """Extend `program`, of the first layers, to the program of `wrapper`, which has `count` layers.

    `path`: that of the layers in `wrapper`.

    Raises:
        NotAlikeError: the layers do not correspond, or torch's program has an unknown structure.
            Changed internals of torch may also raise any other error. `program` is invalid then.
    """
    from torch.fx import GraphModule

    repeated = _Repeated(program, path, count)
    every = dict(wrapper.state_dict(keep_vars=True))
    module = GraphModule(program.graph_module, repeated.graph)
    module.meta.update(program.graph_module.meta)
    program._graph_module = module
    program._graph_signature = repeated.signature
    program._constants = repeated.constants
    program._state_dict = every
    expected = (module, repeated.signature, repeated.constants, every)
    given = (program.graph_module, program.graph_signature, program.constants, program.state_dict)
    if any(a is not b for a, b in zip(given, expected, strict=True)):
        raise NotAlikeError("the parts of a program are not where they were in torch")
    program.validate()  # type: ignore[no-untyped-call]


class _Repeated:
    """The graph, signature and constants of a program with more layers."""

    def __init__(self, program: ExportedProgram, path: str, count: int) -> None:
        from torch.fx import Graph

        self._path, self._count = path, count
        self._old = list(program.graph.nodes)
        specs = program.graph_signature.input_specs
        self._specs = dict(zip((n for n in self._old if n.op == "placeholder"), specs, strict=True))
        self._old_constants = program.constants
        self._owners = self._find_owners()
        self._blocks = list(self._find_blocks())
        # The corresponding node of the next layer.
        self._partners: dict[Node, Node] = {}
        for *_, second, third, fourth in self._blocks:
            self._partners.update(zip(third, fourth, strict=True))
            pairs = list(zip(second, third, strict=False))
            if len(second) == len(third) and all(self._alike(a, b, _THIRD) for a, b in pairs):
                self._partners.update(pairs)
        for *_, third, fourth in self._blocks:
            for a, b in zip(third, fourth, strict=True):
                self._check(a, b)
        # The new node for each old one, and for one of the fourth layer in a later layer.
        self._copies: dict[Node, Node] = {}
        self._in_layer: dict[tuple[Node, int], Node] = {}
        self._input_specs: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.graph = Graph()
        self.graph._codegen = program.graph._codegen
        self._write()
        for name, value in self._old_constants.items():
            self.constants.setdefault(name, value)  # those without a placeholder
        outputs = self._outputs(program.graph_signature.output_specs)
        self.signature = dataclasses.replace(
            program.graph_signature, input_specs=self._input_specs, output_specs=outputs
        )

    # -- the layer of each node ------------------------------------------------------------

    def _find_owners(self) -> dict[Node, int]:
        """The layer of each node that belongs to one."""
        owners: dict[Node, int] = {}
        of_constants: set[Node] = set()
        begun = False
        for node in self._old:
            given = [n for n in node.all_input_nodes if n in owners]
            found: int | None = None
            if node.op == "placeholder":
                spec = self._specs[node]
                past = _PAST.fullmatch(node.name)
                found = self._layer_in(str(spec.target or ""))
                if found is None and past is not None:
                    found = int(past[1])
                if spec.kind.name == "CONSTANT_TENSOR":
                    of_constants.add(node)
            elif node.op == "call_function":
                stack = node.meta.get("nn_module_stack") or {}
                found = next(
                    (i for p, _ in stack.values() if (i := self._layer_in(f"{p}.")) is not None),
                    None,
                )
                begun = begun or found is not None
                if found is None and not begun and given and "sym_size" not in str(node.target):
                    whose = {owners[n] for n in given}
                    if len(whose) > 1:
                        raise NotAlikeError(f"{node.name} is of several layers")
                    (found,) = whose
                if node.all_input_nodes and of_constants.issuperset(node.all_input_nodes):
                    of_constants.add(node)
            if found is not None:
                owners[node] = found
        for node in reversed(self._old):
            if node in of_constants and node not in owners:
                whose = {owners.get(user, -1) for user in node.users}
                if len(whose) == 1 and -1 not in whose:
                    (owners[node],) = whose
        return owners

    def _layer_in(self, path: str) -> int | None:
        begin = f"{self._path}."
        if not path.startswith(begin):
            return None
        number = path.removeprefix(begin).partition(".")[0]
        return int(number) if number.isdigit() else None

    def _find_blocks(self) -> Iterator[list[list[Node]]]:
        """Runs of nodes in the order of layers, by layer, if they have nodes of the last two."""
        block: list[list[Node]] = [[] for _ in range(TRACED)]
        last = -1
        for node in [*self._old, None]:
            owner = -1 if node is None else self._owners.get(node, -1)
            if owner < last:
                if block[_THIRD] or block[_FOURTH]:
                    if len(block[_THIRD]) != len(block[_FOURTH]):
                        raise NotAlikeError("layers of different lengths")
                    yield block
                block = [[] for _ in range(TRACED)]
            if owner >= 0 and node is not None:
                block[owner].append(node)
            last = owner

    # -- whether two layers are the same ---------------------------------------------------

    def _check(self, a: Node, b: Node) -> None:
        """Raise NotAlikeError unless `b` in the fourth layer corresponds to `a` in the third."""
        if not self._alike(a, b, _FOURTH):
            raise NotAlikeError(f"{a.name} and {b.name} have different values or modules")
        if not self._same(a.args, b.args) or not self._same(a.kwargs, b.kwargs):
            raise NotAlikeError(f"{a.name} and {b.name} have different inputs")
        if a.op == "placeholder":
            one, other = self._specs[a], self._specs[b]
            moved = _moved(str(one.target), self._path, _THIRD, _FOURTH)
            constants = one.kind.name == "CONSTANT_TENSOR"
            if one.kind != other.kind or (moved != str(other.target) and not constants):
                raise NotAlikeError(f"{a.name} and {b.name} are different inputs")
            if constants and not equal(
                self._old_constants[str(one.target)], self._old_constants[str(other.target)]
            ):
                raise NotAlikeError(f"{a.name} and {b.name} are different constants")

    def _alike(self, a: Node, b: Node, layer: int) -> bool:
        """Whether `b` in `layer` is like `a` in the layer before, apart from their inputs."""
        if a.op != b.op or (a.op != "placeholder" and a.target != b.target):
            return False
        return _value(a) == _value(b) and self._stack(a, layer - 1) == self._stack(b, layer)

    def _stack(self, node: Node, layer: int) -> list[tuple[str, str]]:
        stack = node.meta.get("nn_module_stack") or {}
        return [(_moved(str(p), self._path, layer, 0), str(kind)) for p, kind in stack.values()]

    def _same(self, a: Any, b: Any) -> bool:
        from torch.fx import Node

        if isinstance(a, Node) and isinstance(b, Node):
            owner = self._owners.get(b)
            if owner is None or owner < _THIRD:  # shared by all layers
                return a is b
            if self._owners.get(a) != owner - 1:
                return False
            return self._partners.get(a) is b
        if isinstance(a, tuple | list) and isinstance(b, tuple | list):
            return len(a) == len(b) and all(map(self._same, a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            return list(a) == list(b) and all(self._same(a[k], b[k]) for k in a)
        return type(a) is type(b) and bool(a == b)

    # -- the new graph ---------------------------------------------------------------------

    def _write(self) -> None:
        ends = {fourth[-1]: fourth for *_, fourth in self._blocks}
        for node in self._old:
            if node.op == "output":
                self._write_output(node)
                continue
            after = self._owners.get(node) is None and self._owners_begun(node)
            moved = self._moved if after else self._copies.__getitem__
            self._copies[node] = self._add(node, node.name, moved, _FOURTH)
            if node in ends:
                for layer in range(TRACED, self._count):
                    for one in ends[node]:
                        self._repeat(one, layer)

    def _owners_begun(self, node: Node) -> bool:
        """Whether `node` uses the layers' results; sizes of inputs do not count."""
        behind = False
        for given in node.all_input_nodes:
            if (owner := self._owners.get(given)) is not None and given.op != "placeholder":
                if owner != _FOURTH:
                    raise NotAlikeError(f"{node.name} is behind an inner layer")
                behind = True
        return behind

    def _moved(self, node: Node) -> Node:
        """The new node for `node`: in the last layer, if it is of the fourth."""
        last = self._in_layer.get((node, self._count - 1))
        return self._copies[node] if last is None else last

    def _repeat(self, node: Node, layer: int) -> None:
        """Add `node` of the fourth layer to a later layer."""

        def moved(given: Node) -> Node:
            owner = self._owners.get(given)
            if owner is None or owner < _THIRD:
                return self._copies[given]
            at = given if owner == _FOURTH else self._partners[given]
            where = layer - (_FOURTH - owner)
            return self._copies[at] if where == _FOURTH else self._in_layer[at, where]

        made = self._add(node, _NUMBER.sub("", node.name), moved, layer)
        self._in_layer[node, layer] = made
        if stack := node.meta.get("nn_module_stack"):
            made.meta["nn_module_stack"] = {
                self._in(key, layer): (self._in(path, layer), kind)
                for key, (path, kind) in stack.items()
            }

    def _in(self, path: str, layer: int) -> str:
        """A path in the fourth layer, moved to another layer."""
        return _moved(path, self._path, _FOURTH, layer)

    def _add(self, node: Node, name: str, moved: Callable[[Node], Node], layer: int) -> Node:
        """Copy `node` with other inputs. Names differ from torch's, see `tidy._number_names`."""
        from torch.fx import map_arg

        args, kwargs = map_arg(node.args, moved), map_arg(node.kwargs, moved)
        made = self.graph.create_node(node.op, node.target, args, kwargs, name, node.type)
        made.meta = dict(node.meta)
        if node.op == "placeholder":
            made.target = made.name
            self._add_spec(node, made, layer)
        return made

    def _add_spec(self, node: Node, made: Node, layer: int) -> None:
        spec = self._specs[node]
        target = spec.target
        if spec.kind.name == "CONSTANT_TENSOR":
            value = self._old_constants[str(target)]
            target = made.name.removeprefix("c_")
            self.constants[target] = value
        elif target is not None:
            target = self._in(target, layer)
        arg = dataclasses.replace(spec.arg, name=made.name)
        self._input_specs.append(dataclasses.replace(spec, arg=arg, target=target))

    def _write_output(self, node: Node) -> None:
        given: Any = node.args[0]
        blocks = _runs([self._owners.get(item, -1) for item in given])
        found: list[Node] = []
        for begin, end in blocks:
            items = list(given[begin:end])
            whose = [self._owners.get(item, -1) for item in items]
            if -1 in whose or set(whose) == {_FOURTH}:
                new = [self._moved(item) for item in items]
            else:
                by_layer = [
                    [n for n, w in zip(items, whose, strict=True) if w == i] for i in range(TRACED)
                ]
                if [self._partners.get(n) for n in by_layer[_THIRD]] != by_layer[_FOURTH]:
                    raise NotAlikeError("the outputs of layers do not correspond")
                later = range(TRACED, self._count)
                new = [self._copies[item] for item in items]
                new += [self._in_layer[n, i] for i in later for n in by_layer[_FOURTH]]
            found += new
        made = self.graph.create_node("output", "output", (tuple(found),), {}, node.name, node.type)
        made.meta = dict(node.meta)
        made.meta.pop("val", None)
        self._found = found

    def _outputs(self, specs: Sequence[Any]) -> list[Any]:
        """A specification for each output; they differ only in their names."""
        first = specs[0]
        if any(spec.kind != first.kind or spec.target is not None for spec in specs):
            raise NotAlikeError("the program has outputs of several kinds")
        return [
            dataclasses.replace(first, arg=dataclasses.replace(first.arg, name=node.name))
            for node in self._found
        ]


def _runs(owners: Sequence[int]) -> list[tuple[int, int]]:
    """The begin and end of each run of ascending layers."""
    found, begin = [], 0
    for index in range(1, len(owners) + 1):
        if index == len(owners) or owners[index] < owners[index - 1] or owners[index - 1] < 0:
            found.append((begin, index))
            begin = index
    return found


def _value(node: Node) -> Any:
    """The shape, strides and dtype of a node's result."""
    import torch

    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return (tuple(map(str, value.shape)), tuple(map(str, value.stride())), value.dtype)
    if isinstance(value, tuple | list):
        return [str(v) for v in value]
    return str(value)


def _moved(path: str, layers: str, before: int, after: int) -> str:
    """`path` in layer `before`, moved to layer `after`."""
    for end in (".", "@", ""):
        begin = f"{layers}.{before}{end}"
        if path == begin or (end and path.startswith(begin)):
            return f"{layers}.{after}{end}{path.removeprefix(begin)}"
    return path
