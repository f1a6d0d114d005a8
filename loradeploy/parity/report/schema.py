"""The JSON Schema of a report, generated from its dataclasses.

schema.json beside this file is the output of `python -m loradeploy.parity.report.schema`.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Final, Literal

from loradeploy.parity.report.results import FORMAT, SCHEMA_VERSION, ParityReport

SCHEMA_FILE: Final = Path(__file__).with_name("schema.json")
_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_PLAIN: Final[dict[Any, dict[str, Any]]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": ["number", "null"]},  # null: a number that is not finite
    type(None): {"type": "null"},
}


def report_schema() -> dict[str, Any]:
    """Return the schema of `ParityReport.to_json()` in this version."""
    nouns: dict[str, Any] = {}
    report = _object(ParityReport, nouns)
    head = {
        "format": {"const": FORMAT},
        "schema_version": {"const": SCHEMA_VERSION},
        "passed": {"type": "boolean"},
        "mutation_score": {"type": ["number", "null"]},
    }
    return {
        "$schema": _DIALECT,
        "title": f"loradeploy parity report, schema version {SCHEMA_VERSION}",
        **report,
        "properties": {**head, **report["properties"]},
        "required": [*head, *report["required"]],
        "$defs": dict(sorted(nouns.items())),
    }


def _object(noun: type, nouns: dict[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(noun)
    names = [field.name for field in dataclasses.fields(noun)]
    return {
        "description": (noun.__doc__ or "").partition("\n")[0],
        "type": "object",
        "properties": {name: _schema(hints[name], nouns) for name in names},
        "required": names,
        "additionalProperties": False,
    }


def _schema(hint: Any, nouns: dict[str, Any]) -> dict[str, Any]:
    if hint in _PLAIN:
        return dict(_PLAIN[hint])
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        if hint.__name__ not in nouns:
            nouns[hint.__name__] = {}  # reserves the name, in case the class refers to itself
            nouns[hint.__name__] = _object(hint, nouns)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(part, nouns) for part in inner]}
    if origin is collections.abc.Mapping:
        return {"type": "object", "additionalProperties": _schema(inner[1], nouns)}
    if origin is tuple and inner[-1] is Ellipsis:
        return {"type": "array", "items": _schema(inner[0], nouns)}
    if origin is tuple:
        parts = [_schema(part, nouns) for part in inner]
        return {"type": "array", "prefixItems": parts, "minItems": len(parts), "items": False}
    raise TypeError(f"a report cannot have {hint}: it has no form in JSON")


if __name__ == "__main__":
    print(json.dumps(report_schema(), indent=2, ensure_ascii=False))
