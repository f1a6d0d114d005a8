"""A Jinja environment with limits, in which untrusted templates always terminate.

Nothing in a template is evaluated when it is compiled. While it is rendered, each iteration, each
call and, by size, each value is paid for from a budget. A template that exceeds its budget is
stopped, at the same point on every machine. Single operations are short because the sizes of values
are limited.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, cast

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.optimizer import Optimizer
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_WORK: Final = 1_000_000  # steps, about as many microseconds
_WORK_PER_INPUT: Final = 500
_LARGEST: Final = 1 << 20  # characters of a text, items of a list
_PER_STEP: Final = 16  # characters that are copied in a step
_WIDEST: Final = 1000  # the maximum width of a padded field
_BITS: Final = 4096  # the maximum size of a number
_PARTS: Final = 20_000  # the maximum number of nodes to compile, which takes longer than to parse

# Filters and methods with large results of unknown size, or with searches in quadratic time.
_NO_FILTERS: Final = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_NO_METHODS: Final = frozenset({"format_map", "maketrans", "translate", "striptags", "unescape"})
_PADDING: Final = frozenset(
    {"batch", "center", "expandtabs", "filesizeformat", "from_bytes", "indent", "ljust", "rjust"}
    | {"round", "slice", "to_bytes", "tojson", "truncate", "zfill"}
)
# Filters that consume a generator. It is converted to a list and paid for first.
_GATHERING: Final = (
    *("join", "list", "sort", "unique", "groupby", "reverse", "sum", "first", "last", "batch"),
    *("slice", "map", "select", "selectattr", "reject", "rejectattr", "min", "max"),
)
_WIDE: Final = re.compile(r"\d{4}|\*|\{[^{}]*\{")
_SIZED: Final = (str, bytes)
_CONTAINERS: Final = (list, tuple, set, frozenset)


class LimitError(jinja2.TemplateRuntimeError):
    """A template exceeds a limit of computation or output."""


class _Budget:
    def __init__(self, given: object) -> None:
        self.left = _WORK
        self.largest = _LARGEST
        size = _weight(given, self)
        self.left = _WORK + _WORK_PER_INPUT * size
        self.largest = _LARGEST + 4 * _PER_STEP * size


_BUDGET: Final[ContextVar[_Budget | None]] = ContextVar("budget", default=None)


@contextmanager
def limited(given: object) -> Iterator[int]:
    """Give templates in this thread a budget, which grows with the size of `given`.

    Yields the maximum number of characters of the output.
    """
    token = _BUDGET.set(budget := _Budget(given))
    try:
        yield budget.largest
    finally:
        _BUDGET.reset(token)


def _spend(steps: int) -> None:
    budget = _BUDGET.get()
    if budget is not None:
        budget.left -= steps
        if budget.left < 0:
            raise LimitError("it takes too many steps")


def _weight(value: object, budget: _Budget | None) -> int:
    """The number of steps to visit all parts of `value`."""
    most = _WORK if budget is None else budget.left
    total = 0
    waiting = [value]
    while waiting:
        one = waiting.pop()
        total += 1
        if isinstance(one, _SIZED):
            total += len(one) // _PER_STEP
        elif isinstance(one, int):
            total += one.bit_length() // 64
        elif isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, range):
            total += len(one)
        elif isinstance(one, (*_CONTAINERS, KeysView, ValuesView, ItemsView)):
            waiting += list(one)
        elif isinstance(one, Namespace):
            waiting += vars(one).values()
        if total + len(waiting) > most:
            raise LimitError("it takes too many steps")
    return total


def _pay(*values: object) -> None:
    _spend(_weight(values, _BUDGET.get()))


def _check_size(size: int) -> None:
    budget = _BUDGET.get()
    if size > (_LARGEST if budget is None else budget.largest):
        raise LimitError("it creates a text or list that is too large")
    _spend(size // _PER_STEP)


def _checked(value: Any) -> Any:
    """Return the new `value`; raises LimitError if it is too large."""
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise LimitError("it creates a number that is too large")
    if isinstance(value, (*_SIZED, *_CONTAINERS, dict)):
        _check_size(len(value))
    return value


def _check_replace(text: Any, old: Any, new: Any) -> None:
    if all(isinstance(part, _SIZED) for part in (text, old, new)):
        found = text.count(old)
        _check_size(len(text) + found * len(new))


def _check_join(glue: Any, items: list[Any]) -> None:
    _pay(items)
    if isinstance(glue, _SIZED):
        texts = sum(len(item) for item in items if isinstance(item, _SIZED))
        _check_size(texts + len(glue) * len(items))


def _check_format(form: object) -> None:
    if isinstance(form, _SIZED):
        text = form if isinstance(form, str) else form.decode("latin-1")
        if _WIDE.search(text) and ("%" in text or "{" in text):
            raise LimitError("it pads texts to a width that is too large or unknown")


def _check_widths(name: str, given: Any) -> None:
    if name in _PADDING:
        for value in given:
            size = len(value) if isinstance(value, _SIZED) else value
            if isinstance(size, int) and abs(size) > _WIDEST:
                raise LimitError(f"{name} gets a size of more than {_WIDEST}")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, in which templates pay from the budget of `limited`."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, finalize=_written, **options)
        self.code_generator_class = _Generator
        for name in _NO_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        for name, function in [*self.filters.items()]:
            self.filters[name] = _paid_filter(name, function)
        for name, function in [*self.tests.items()]:
            self.tests[name] = _paid(cast(Callable[..., Any], function))
        # A template cannot contain these names.
        self.filters |= {"tick!": _tick, "pay!": _paid_for, "concat!": _concat}

    def check_constants(self, source: str) -> None:
        """Raise LimitError if compiling `source` without limits would take too much computation.

        Jinja evaluates constants at compile time, even in branches that are never taken.
        """
        _Constants(self).visit(super()._parse(source, None, None))

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter, whose calls are paid for, too."""
        self.filters[name] = _paid_filter(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        priced = _Priced()
        tree: nodes.Template = priced.visit(super()._parse(source, name, filename))
        if priced.steps > _PARTS:
            raise LimitError(f"it has more than {_PARTS:,} parts")
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As in the sandbox, without the methods whose results are unbounded."""
        return attr not in _NO_METHODS and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """As in the sandbox, with a limit on the widths of fields."""
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None
        form = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_format(form)
            _pay(args, kwargs)
            _check_size(len(form))
            text: str = _checked(formatted(*args, **kwargs))
            return text

        return bounded

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """As in the sandbox, with a limit on the size of the result."""
        _pay(left, right)
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, (*_SIZED, *_CONTAINERS)) and isinstance(other, int):
                    _check_size(len(one) * max(other, 0))
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                _check_power(left, right)
        elif operator == "%":
            _check_format(left)
        elif operator == "+" and isinstance(left, (*_SIZED, *_CONTAINERS)):
            _check_size(len(left) + (len(right) if hasattr(right, "__len__") else 0))
        return _checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """As in the sandbox, with a limit on the size of the result."""
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        _pay(owner if isinstance(owner, (*_SIZED, *_CONTAINERS, dict)) else None, args, kwargs)
        if owner is not None:
            _check_widths(name, (*args, *kwargs.values()))
        if isinstance(owner, _SIZED):
            if name == "join" and args:
                args = ([*args[0]], *args[1:])
                _check_join(owner, args[0])
            elif name == "replace" and len(args) > 1:
                _check_replace(owner, args[0], args[1])
            elif name == "expandtabs":
                tabs = owner.count("\t") if isinstance(owner, str) else owner.count(b"\t")
                _check_size(len(owner) + _WIDEST * tabs)
        return _checked(super().call(__context, __obj, *args, **kwargs))


def _check_power(base: int, exponent: int) -> None:
    if base.bit_length() * exponent > _BITS:
        raise LimitError("it creates a number that is too large")


def _paid(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        _pay(args, kwargs)
        return _checked(function(*args, **kwargs))

    return paid


def _paid_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # Jinja passes its context to some functions as the first argument.
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        _pay(args, kwargs)
        before, value, rest = args[:first], args[first], args[first + 1 :]
        arguments = (*rest, *kwargs.values())
        _check_widths(name, arguments)
        known = isinstance(value, (*_SIZED, *_CONTAINERS, dict, jinja2.Undefined))
        if name in _GATHERING and not known:
            value = [*value]
            _pay(value)
        if name == "join":
            glue = (*rest, kwargs.get("d", ""))[0]
            _check_join(glue, [*value])
        elif name == "replace":
            texts = (*rest, *(kwargs[n] for n in ("old", "new") if n in kwargs))
            _check_replace(str(value), *(str(one) for one in texts[:2]))
        elif name == "format":
            _check_format(value)
        elif name == "indent":
            _check_size(len(str(value)) + _WIDEST * str(value).count("\n"))
        elif name == "sum" and any(not isinstance(one, int | float | str) for one in arguments):
            raise LimitError("sum only adds numbers")
        return _checked(function(*before, value, *rest, **kwargs))

    return paid


def _written(value: Any) -> str:
    """The text that is written for `value`."""
    _pay(value)
    text: str = _checked(value if isinstance(value, str) else str(value))
    return text


def _tick(steps: int) -> None:
    _spend(steps)


def _paid_for(value: Any) -> Any:
    _pay(value)
    return value


def _concat(values: list[Any]) -> str:
    texts = [_written(value) for value in values]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


class _Generator(CodeGenerator):
    """Compiles without evaluating constant expressions."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> str:
        if isinstance(node, nodes.TemplateData):
            return super()._output_child_to_const(node, frame, finalize)
        raise nodes.Impossible


class _Constants(Optimizer):
    """Evaluates the constants that Jinja's optimizer would, within the limits."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if isinstance(node, nodes.Filter) and node.name in _NO_FILTERS:
            raise LimitError(f"it uses {node.name}")
        node = NodeTransformer.generic_visit(self, node, *args, **kwargs)
        try:
            return nodes.Const.from_untrusted(self._value(node), node.lineno, self.environment)
        except LimitError:
            raise
        except Exception as problem:  # not a constant, or one that cannot be evaluated
            if isinstance(problem.__context__, LimitError):  # in a filter or test
                raise problem.__context__ from None
            return node

    def _value(self, node: nodes.Node) -> Any:
        if not isinstance(node, nodes.Expr):
            raise nodes.Impossible
        environment = cast(LimitedEnvironment, self.environment)
        if isinstance(node, nodes.BinExpr) and node.operator in environment.intercepted_binops:
            left, right = node.left.as_const(), node.right.as_const()
            value = environment.call_binop(None, node.operator, left, right)
        else:
            value = node.as_const()
        _pay(value)
        return _checked(value)


class _Priced(NodeTransformer):
    """Inserts payments into a template, for loops, macros and blocks, comparisons and slices."""

    def __init__(self) -> None:
        self.steps = 0

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        self.steps += 1
        if isinstance(node, nodes.TemplateData):
            self.steps += len(node.data) // _PER_STEP
        return super().generic_visit(node, *args, **kwargs)

    def _body(self, node: Any) -> nodes.Node:
        before = self.steps
        self.generic_visit(node)
        tick = _filter(nodes.Const(self.steps - before), "tick!")
        node.body = [nodes.ExprStmt(tick, lineno=node.lineno), *node.body]
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = visit_Block = _body

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja2's name
        self._body(node)
        node.iter = _filter(node.iter, "pay!")
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _filter(node.expr, "pay!")
        for operand in node.ops:
            operand.expr = _filter(operand.expr, "pay!")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter(node.node, "pay!")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "concat!")


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
