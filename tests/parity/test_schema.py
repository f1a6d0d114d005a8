"""The JSON report keeps to its schema, and the schema is the nouns'."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from loradeploy.parity.report.results import ParityReport
from loradeploy.parity.report.schema import SCHEMA_FILE, report_schema
from tests.parity.reports import FULL, PASSED

TYPES: dict[str, Any] = {
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
    "array": list,
    "object": dict,
}


def problems(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "$") -> list[str]:
    """What is wrong with `value` by as much of JSON Schema as the report's needs."""
    if "$ref" in schema:
        return problems(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, at)
    if "anyOf" in schema:
        found = [problems(value, option, root, at) for option in schema["anyOf"]]
        return min(found, key=len)
    if "const" in schema or "enum" in schema:
        allowed = schema.get("enum", [schema.get("const")])
        return [] if value in allowed else [f"{at}: {value!r} is none of {allowed}"]
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    fits = any(isinstance(value, TYPES[name]) for name in names)
    if not fits or (isinstance(value, bool) and "boolean" not in names):
        return [f"{at}: {value!r} is no {' or '.join(names)}"]
    found = []
    if isinstance(value, dict):
        own = schema.get("properties", {})
        found += [
            f"{at}: {name} is missing" for name in schema.get("required", ()) if name not in value
        ]
        other = schema["additionalProperties"]
        for name, part in value.items():
            if name in own or other is not False:
                found += problems(part, own.get(name, other), root, f"{at}.{name}")
            else:
                found.append(f"{at}: {name} is unknown")
    if isinstance(value, list):
        parts = schema.get("prefixItems")
        if parts is not None and len(parts) != len(value):
            return [f"{at}: {len(value)} items for {len(parts)}"]
        for number, item in enumerate(value):
            part = schema["items"] if parts is None else parts[number]
            found += problems(item, part, root, f"{at}[{number}]")
    return found


def check(value: Any) -> list[str]:
    schema = report_schema()
    return problems(value, schema, schema)


def test_the_shipped_schema_is_that_of_the_nouns() -> None:
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == report_schema(), (
        f"run python -m loradeploy.parity.report.schema > {SCHEMA_FILE.name}"
    )
    assert report_schema()["title"].endswith("schema version 2")


@pytest.mark.parametrize("report", [PASSED, FULL], ids=["passed", "with everything"])
def test_a_report_keeps_to_it(report: ParityReport) -> None:
    assert check(json.loads(json.dumps(report.to_json()))) == []


def test_a_certificate_keeps_to_it(certified_bundle: Path) -> None:
    assert check(json.loads((certified_bundle / "parity.json").read_text())) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.pop("graph_digest"), "$: graph_digest is missing"),
        (lambda v: v.update(more=1), "$: more is unknown"),
        (lambda v: v.update(schema_version=1), "$.schema_version: 1 is none of [2]"),
        (lambda v: v["results"][0].update(outcome="fine"), "$.results[0].outcome: 'fine' is none"),
        (lambda v: v["results"][0].update(seconds="1"), "$.results[0].seconds: '1' is no number"),
        (lambda v: v["results"][0]["figures"].update(distribution=[[1.0]]), "1 items for 2"),
        (lambda v: v["files"].update(a=1), "$.files.a: 1 is no string"),
        (lambda v: v.update(passed=1), "$.passed: 1 is no boolean"),
    ],
)
def test_what_is_no_report_does_not(change: Any, said: str) -> None:
    value = copy.deepcopy(FULL.to_json())
    value = json.loads(json.dumps(value))
    change(value)
    assert any(said in problem for problem in check(value)), check(value)


def test_a_validator_of_the_field_agrees() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    jsonschema.Draft202012Validator.check_schema(report_schema())
    jsonschema.validate(json.loads(json.dumps(FULL.to_json())), report_schema())
