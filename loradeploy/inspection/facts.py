"""Convert descriptions to JSON values, for JSON output and tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

# Metadata of a field: KEY: its name in JSON, if that is reserved in Python; IF_KNOWN: it is omitted
# from JSON if it is None; INLINE: it is a description whose fields are inserted instead of it.
KEY: Final = "key"
IF_KNOWN: Final[Mapping[str, bool]] = {"if_known": True}
INLINE: Final[Mapping[str, bool]] = {"inline": True}


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """A tensor, or an input or output of a graph.

    `shape`: numbers, symbols, and "?" for a dimension without a name; "?" if the shape is unknown.
    """

    name: str
    dtype: str
    shape: list[Any] | str


def as_facts(description: Any) -> dict[str, Any]:
    """The fields of a description as JSON values, by their names in JSON."""
    facts: dict[str, Any] = {}
    for field in dataclasses.fields(description):
        value = getattr(description, field.name)
        if field.metadata == INLINE:
            facts.update(as_facts(value))
        elif value is not None or field.metadata != IF_KNOWN:
            facts[field.metadata.get(KEY, field.name)] = _json_value(value)
    return facts


def _json_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return as_facts(value)
    if isinstance(value, Mapping):
        return {name: _json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(part) for part in value]
    return value


def tensor_facts(name: str, values: Any) -> TensorFacts:
    """Describe an array, or a tensor in a file."""
    return TensorFacts(name=name, dtype=str(values.dtype), shape=list(values.shape))


# numpy's names, as in a manifest.
_NUMPY: Final[Mapping[str, str]] = {"float": "float32", "double": "float64"}


def spec_facts(name: str, dtype: str | None, shape: Any) -> TensorFacts:
    """Describe an input or output of a graph; `dtype` and `shape` as named by any library."""
    known = "unknown" if dtype is None else dtype.lower()
    if isinstance(shape, str):
        return TensorFacts(name=name, dtype=known, shape=shape)
    dims = [dim if isinstance(dim, int) else _symbol(dim) for dim in shape]
    return TensorFacts(name=name, dtype=_NUMPY.get(known, known), shape=dims)


def _symbol(dim: Any) -> str:
    return str(getattr(dim, "value", dim) or "?")
