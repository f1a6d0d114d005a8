"""Read frozen dataclasses from the JSON of a manifest; fields are checked by their annotations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType, NoneType
from typing import Any, Final, Literal, TypeVar, get_args, get_origin, get_type_hints

from loradeploy.bundle.names import MANIFEST_NAME
from loradeploy.errors import BundleError, shortened, shown

# The largest plausible size.
LARGEST: Final = 2**31 - 1

Mode = Literal["side-inputs", "merged"]
BaseKind = Literal["checkpoint", "onnx"]
Record = TypeVar("Record")


def record(kind: type[Record], value: object, where: str = "") -> Record:
    """The dataclass `kind` in a JSON object; `where` is its name in the file.

    Fields may be other such dataclasses, tuples of them, or mappings of names to them.

    Raises:
        BundleError: a field is missing, unknown or of another type than its annotation.
    """
    values = dict(_object(value, where or "the file"))
    label = f"{where}." if where else ""
    types = _types(kind)  # type: ignore[arg-type]
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise BundleError(f"{MANIFEST_NAME}: the field {label}{shortened(name)} is unknown")
    for name, f in known.items():
        if name in values:
            values[name] = _field(types[name], values[name], f"{label}{name}", str(f.type))
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise BundleError(f"{MANIFEST_NAME}: the field {label}{name} is missing")
    return kind(**values)


@cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _field(kind: Any, value: object, where: str, expected: str) -> Any:
    """The value of a field of the type `kind`, which is written as `expected`."""
    parts = get_args(kind) or (kind,)
    inner: Any = next(filter(dataclasses.is_dataclass, parts), None)
    if inner is None and kind != Mapping[str, str]:
        read = tuple(value) if isinstance(value, list) else value
        if not _is(kind, read):
            raise BundleError(f"{MANIFEST_NAME}: {where} is {shown(read)}, expected {expected}")
        return read
    if value is None and NoneType in parts:
        return None
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise BundleError(f"{MANIFEST_NAME}: {where} is not a list")
        return tuple(record(inner, item, f"{where}[{index}]") for index, item in enumerate(value))
    if get_origin(kind) is not Mapping:
        return record(inner, value, where)
    named = _object(value, where)
    if inner is not None:
        return MappingProxyType({n: record(inner, v, f"{where}.{n}") for n, v in named.items()})
    if not all(isinstance(item, str) for item in named.values()):
        raise BundleError(f"{MANIFEST_NAME}: {where} is not an object of digests")
    return MappingProxyType(dict(named))


def _is(kind: Any, value: object) -> bool:
    """Whether a value is of the type `kind`. Numbers in tuples are sizes."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return value in parts
    if get_origin(kind) is Mapping:
        return isinstance(value, Mapping)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(kinds) == len(value) and all(
            _is(part, item) and (isinstance(item, str) or 0 <= item <= LARGEST)
            for part, item in zip(kinds, value, strict=True)
        )
    if parts:  # a union
        return any(_is(part, value) for part in parts)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if kind is float else kind)


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BundleError(f"{MANIFEST_NAME}: {where} is not an object")
    return value
