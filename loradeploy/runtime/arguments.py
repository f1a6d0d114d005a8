"""Check the arguments of a session's methods and of the tasks before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import onnxruntime

from loradeploy.errors import UsageError, shown
from loradeploy.given_numbers import checked_number
from loradeploy.runtime.adapters.resident import AdapterSpec

Adapters = AdapterSpec | Sequence[AdapterSpec | None] | None


def check_adapters(adapters: object) -> None:
    """Raise UsageError unless `adapters` is a valid choice; a set has no order, for example."""
    if adapters is None or isinstance(adapters, str | Mapping):
        return
    if not isinstance(adapters, Sequence) or isinstance(adapters, bytes):
        raise UsageError(
            f"adapters is {shown(adapters)}: give a name, a mapping of names to weights, or a list"
            " with one for each row"
        )
    for adapter in adapters:
        if not (adapter is None or isinstance(adapter, str | Mapping)):
            raise UsageError(
                f"an adapter is {shown(adapter)}: give a name, a mapping of names to weights, or"
                " None for the base"
            )


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether `value` has items in an order and a number: a list, a tuple or an array."""
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def check_flag(name: str, value: object) -> None:
    """Raise UsageError unless `value` is True or False: a text such as "no" would count as True."""
    if not isinstance(value, bool | np.bool_):
        raise UsageError(f"`{name}` is {shown(value)}: give True or False")


def check_probability(name: str, value: object) -> None:
    """Raise UsageError unless `value` is a number from 0 to 1; `name` is for the message."""
    number = checked_number(value)
    if number is None or not 0 <= number <= 1:
        raise UsageError(f"`{name}` is {shown(value)}: give a probability, from 0 to 1")


def each_row(adapters: Adapters, rows: int) -> list[AdapterSpec | None]:
    """The adapter of each of `rows` rows.

    Raises:
        UsageError: a sequence of another length, or not a valid choice of adapters.
    """
    check_adapters(adapters)
    if adapters is None or isinstance(adapters, str | Mapping):
        return [adapters] * rows
    check_rows(len(adapters), rows)
    return list(adapters)


def check_rows(adapters: int, rows: int) -> None:
    """Raise UsageError unless there is an adapter for each row."""
    if adapters != rows:
        raise UsageError(f"{adapters} adapters for a batch of {rows} rows: give one for each row")


def requested_outputs(output_names: object, outputs: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the outputs to compute, which are in `outputs`; None or an empty list means all.

    Raises:
        UsageError: not a list of names, or an unknown name.
    """
    if output_names is None:
        return outputs
    if isinstance(output_names, str) or not isinstance(output_names, Sequence):
        raise UsageError(f"the requested outputs are {shown(output_names)}: give a list of names")
    known = frozenset(outputs)
    for name in output_names:
        if not isinstance(name, str) or name not in known:
            raise UsageError(f"no output is named {shown(name)}: there are {outputs}")
    return tuple(output_names) or outputs


def check_buffers(buffers: object) -> None:
    """Raise UsageError unless `buffers` is a mapping to OrtValues."""
    if not isinstance(buffers, Mapping):
        raise UsageError(f"`buffers` is {shown(buffers)}: give a mapping of names to OrtValues")
    for name, value in buffers.items():
        if not isinstance(value, onnxruntime.OrtValue):
            raise UsageError(f"the buffer of {shown(name)} is {shown(value)}: give an OrtValue")


def check_name(name: object) -> None:
    """Raise UsageError unless `name` can be the name of an adapter."""
    if not isinstance(name, str) or not name:
        raise UsageError(f"an adapter needs a name that is not empty, not {shown(name)}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UsageError(f"an adapter's name is {name!a}, which is not valid Unicode") from None
