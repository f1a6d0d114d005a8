"""Prepare an exported program for torch.onnx without tracing it again, if possible."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

logger = logger_of(__name__)

# Operators that torch.onnx adds if an operator's arguments are of different types.
_PROMOTIONS: Final = frozenset({"aten::_to_copy", "aten::scalar_tensor"})
_PLAIN: Final = frozenset({"placeholder", "call_function", "output"})  # nodes without a graph
# Operators that torch.export's decompositions do not change, because torch.onnx translates them. A
# program with other operators is decomposed.
_TRANSLATED: Final = frozenset(
    {
        *("aten::add.Tensor", "aten::arange", "aten::arange.start", "aten::bitwise_and.Tensor"),
        *("aten::bitwise_not", "aten::bitwise_or.Tensor", "aten::cat", "aten::clone", "aten::cos"),
        *("aten::cumsum", "aten::div.Tensor", "aten::embedding", "aten::eq.Scalar"),
        *("aten::eq.Tensor", "aten::expand", "aten::gather", "aten::ge.Scalar", "aten::ge.Tensor"),
        *("aten::gelu", "aten::gt.Scalar", "aten::gt.Tensor", "aten::layer_norm"),
        *("aten::le.Scalar", "aten::le.Tensor", "aten::linear", "aten::lt.Scalar"),
        *("aten::lt.Tensor", "aten::matmul"),
        *("aten::mean.dim", "aten::mul.Scalar", "aten::mul.Tensor", "aten::ne.Scalar"),
        *("aten::neg", "aten::new_ones", "aten::pow.Tensor_Scalar", "aten::relu", "aten::rsqrt"),
        *("aten::rsub.Scalar", "aten::scaled_dot_product_attention", "aten::select.int"),
        *("aten::sigmoid", "aten::silu", "aten::sin", "aten::slice.Tensor", "aten::softmax.int"),
        *("aten::split.Tensor", "aten::split_with_sizes", "aten::squeeze.dim", "aten::sub.Tensor"),
        *("aten::sum.dim_IntList", "aten::sym_size.int", "aten::tanh", "aten::transpose.int"),
        *("aten::unsqueeze", "aten::view"),
    }
)


@contextlib.contextmanager
def lowered(program: ExportedProgram) -> Iterator[None]:
    """Make torch.onnx skip the decomposition of `program`, and operators that it does not have.

    torch.onnx traces a program a second and third time to decompose it, which takes longer than the
    first trace. A program whose operators would not change, or have a simple equivalent in
    evaluation, is rewritten node by node instead; torch.onnx decomposes any other.
    """
    if not _rewritten(program):
        yield
        return
    with _registered_operators(program), _known_values():
        # An instance attribute: torch.onnx calls this method of the program.
        program.run_decompositions = lambda *_, **__: program
        try:
            yield
        finally:
            del program.run_decompositions


def _rewritten(program: ExportedProgram) -> bool:
    """Rewrite `program` in place; return False without changes if it has unknown operators."""
    graph = program.graph_module.graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    others = sorted({_name(node) for node in nodes} - _REWRITES.keys() - _TRANSLATED - {""})
    nested = any(node.op not in _PLAIN for node in graph.nodes)
    if others or nested or not all(map(_evaluates, nodes)):
        logger.debug("decomposing the program for %s", ", ".join(others))
        return False
    for node in nodes:
        if (rewrite := _REWRITES.get(_name(node))) is not None:
            rewrite(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return True


def _name(node: Node) -> str:
    """The operator's qualified name; "" for Python's operators, which compute sizes."""
    from torch._ops import OpOverload

    target: Any = node.target
    if isinstance(target, OpOverload):
        name: str = target.name()  # type: ignore[no-untyped-call]
        return name
    return "" if getattr(target, "__module__", "") in ("_operator", "math") else str(target)


def _evaluates(node: Node) -> bool:
    """Whether the node is not a dropout in training mode."""
    return not _name(node).endswith("dropout") or not node.args[2]


def _erase(node: Node) -> None:
    node.graph.erase_node(node)


def _skip(node: Node) -> None:
    """Replace `node` by its first argument; an output keeps its name, used by the signature."""
    if any(user.op == "output" for user in node.users):
        _copy(node)
        return
    node.replace_all_uses_with(_argument(node))
    node.graph.erase_node(node)


def _cast(node: Node) -> None:
    import torch

    given, dtype = _argument(node), node.meta["val"].dtype
    if dtype == given.meta["val"].dtype:
        _skip(node)
        return
    node.target, node.args = torch.ops.aten._to_copy.default, (given,)
    node.kwargs = {"dtype": dtype}


def _copy(node: Node) -> None:
    """Make `node` a contiguous copy of its first argument.

    torch.onnx runs the program on tensors without values, whose strides have to allow each view.
    """
    import torch

    node.target, node.args = torch.ops.aten.clone.default, (_argument(node),)
    node.kwargs = {"memory_format": torch.contiguous_format}


def _reshape(node: Node) -> None:
    """Make `node` a view of a contiguous copy."""
    import torch

    given = _argument(node)
    with node.graph.inserting_before(node):
        laid_out = node.graph.call_function(torch.ops.aten.clone.default, (given,))
    value = given.meta["val"].clone(memory_format=torch.contiguous_format)
    laid_out.meta = {**node.meta, "val": value}
    _copy(laid_out)
    node.target, node.args = torch.ops.aten.view.default, (laid_out, *node.args[1:])


def _rename(node: Node, name: str) -> None:
    """Make `node` call another operator with the same arguments."""
    import torch

    packet, _, overload = name.partition(".")
    node.target = getattr(getattr(torch.ops.aten, packet), overload)


def _argument(node: Node) -> Any:
    return node.args[0]


# What is changed in a node of each operator that torch.onnx does not have; in evaluation, those
# with `_skip` return their first argument.
_REWRITES: Final[Mapping[str, Callable[[Node], None]]] = {
    "aten::_assert_tensor_metadata": _erase,
    "aten::alias": _skip,
    "aten::detach": _skip,
    "aten::detach_": _skip,
    "aten::dropout": _skip,
    "aten::feature_dropout": _skip,
    "aten::lift_fresh_copy": _skip,
    "aten::to.device": _cast,
    "aten::to.dtype": _cast,
    "aten::to.dtype_layout": _cast,
    "aten::type_as": _cast,
    "aten::contiguous": _copy,
    "aten::reshape": _reshape,
    "aten::__and__.Tensor": partial(_rename, name="bitwise_and.Tensor"),
    "aten::__or__.Tensor": partial(_rename, name="bitwise_or.Tensor"),
}


@contextlib.contextmanager
def _known_values() -> Iterator[None]:
    """Limit the type promotion of torch.onnx to the nodes that it changes.

    Otherwise it runs the whole program on tensors without values, to find shapes and dtypes that
    the trace already stored with every node.
    """
    from torch.fx import Interpreter
    from torch.onnx._internal.fx.passes import type_promotion

    interpreter: Any = type_promotion._TypePromotionInterpreter

    def run_node(self: Any, node: Node) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return Interpreter.run_node(self, node)
        rule = type_promotion.get_type_promotion_rule(node, self.type_promotion_table)
        if rule is not None:
            with self._set_current_node(node):
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    every = interpreter.run_node
    interpreter.run_node = run_node
    try:
        yield
    finally:
        interpreter.run_node = every


@contextlib.contextmanager
def _registered_operators(program: ExportedProgram) -> Iterator[None]:
    """Limit onnxscript's registry to the operators of `program`, because torch.onnx parses all."""
    from onnxscript.function_libs.torch_lib import ops, registration

    del ops  # registers them
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    # With all overloads: promoted arguments may need another one.
    used = {name.partition(".")[0] for name in (*map(_name, nodes), *_PROMOTIONS)}
    every = registration.default_registry
    fewer = registration.Registry()
    for name, functions in every.items():
        if name.partition(".")[0] in used or not name.startswith("aten::"):
            for function in functions.overloads:
                fewer.register(function, name)
            for function in functions.complex:
                fewer.register(function, name, complex=True)
    registration.default_registry = fewer
    try:
        yield
    finally:
        registration.default_registry = every
