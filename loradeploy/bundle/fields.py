"""Read frozen dataclasses from the JSON of a manifest; fields are checked by their annotations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal, TypeGuard, TypeVar, get_args

from loradeploy.adapter.adapter import Kind
from loradeploy.bundle.names import MANIFEST_NAME
from loradeploy.errors import BundleError, shortened, shown

# The largest plausible size.
LARGEST: Final = 2**31 - 1

Mode = Literal["side-inputs", "merged"]
BaseKind = Literal["checkpoint", "onnx"]
Noun = TypeVar("Noun")

# The annotations are strings (PEP 563); each names one of these checks.
_CHECKS: Final[Mapping[str, Any]] = {
    "str": lambda v: isinstance(v, str),
    "str | None": lambda v: v is None or isinstance(v, str),
    "int": lambda v: _is_integer(v),
    "float": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "bool": lambda v: isinstance(v, bool),
    "tuple[int | str, ...]": lambda v: (
        isinstance(v, tuple) and all(isinstance(d, str) or _is_size(d) for d in v)
    ),
    "tuple[int, ...]": lambda v: isinstance(v, tuple) and all(_is_size(d) for d in v),
    "tuple[str, ...]": lambda v: _all(v, str),
    "tuple[str, ...] | None": lambda v: v is None or _all(v, str),
    "tuple[int, int] | None": lambda v: (
        v is None or (isinstance(v, tuple) and len(v) == 2 and all(_is_size(d) for d in v))
    ),
    "Mapping[str, Any]": lambda v: isinstance(v, Mapping),
    "Mode": lambda v: v in get_args(Mode),
    "BaseKind": lambda v: v in get_args(BaseKind),
    "Kind": lambda v: v in get_args(Kind),
}


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: object) -> bool:
    return _is_integer(value) and 0 <= value <= LARGEST


def _all(value: object, kind: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, kind) for item in value)


def json_object(value: object, where: str) -> Mapping[str, Any]:
    """`value`, which must be an object; `where` is its name in the file."""
    if not isinstance(value, Mapping):
        raise BundleError(f"{MANIFEST_NAME}: {where} is not an object")
    return value


def nouns(kind: type[Noun], value: object, where: str) -> tuple[Noun, ...]:
    """Build one dataclass `kind` from each object of a JSON list."""
    if not isinstance(value, list):
        raise BundleError(f"{MANIFEST_NAME}: {where} is not a list")
    return tuple(noun(kind, item, f"{where}[{index}]") for index, item in enumerate(value))


def digests(value: object, where: str) -> Mapping[str, str]:
    """An object of digests by name."""
    found = json_object(value, where)
    if not all(isinstance(digest, str) for digest in found.values()):
        raise BundleError(f"{MANIFEST_NAME}: {where} is not an object of digests")
    return MappingProxyType(dict(found))


def noun(kind: type[Noun], value: object, where: str) -> Noun:
    """Build the dataclass `kind` from a JSON object; checks each field against its annotation."""
    values = dict(json_object(value, where or "the file"))
    label = f"{where}." if where else ""
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise BundleError(f"{MANIFEST_NAME}: the field {label}{shortened(name)} is unknown")
    for name, f in known.items():
        if name not in values:
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise BundleError(f"{MANIFEST_NAME}: the field {label}{name} is missing")
            continue
        if isinstance(values[name], list):
            values[name] = tuple(values[name])
        check = _CHECKS.get(str(f.type))
        if check is not None and not check(values[name]):
            raise BundleError(
                f"{MANIFEST_NAME}: {label}{name} is {shown(values[name])}, expected {f.type}"
            )
    return kind(**values)
