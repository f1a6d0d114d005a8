"""JSON reports conform to their schema, and the schema matches the dataclasses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from loradeploy.parity.report.results import ParityReport
from loradeploy.parity.report.schema import SCHEMA_FILE, report_schema
from tests.parity.reports import FULL, PASSED

VALIDATOR = jsonschema.Draft202012Validator(report_schema())


def problems(value: Any) -> list[str]:
    """Return the schema violations of a report, each as one line: where and what."""
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(value)]


def as_read(report: ParityReport) -> Any:
    """Return the report as parsed from its JSON."""
    return json.loads(json.dumps(report.to_json()))


def test_the_shipped_schema_is_that_of_the_dataclasses() -> None:
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == report_schema(), (
        f"run python -m loradeploy.parity.report.schema > {SCHEMA_FILE.name}"
    )
    assert report_schema()["title"].endswith("schema version 3")


def test_the_schema_is_valid_in_its_dialect() -> None:
    jsonschema.Draft202012Validator.check_schema(report_schema())


@pytest.mark.parametrize("report", [PASSED, FULL], ids=["passed", "with everything"])
def test_a_report_conforms_to_the_schema(report: ParityReport) -> None:
    assert problems(as_read(report)) == []


def test_a_certificate_conforms_to_the_schema(certified_bundle: Path) -> None:
    assert problems(json.loads((certified_bundle / "parity.json").read_text())) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda v: v.pop("graph_digest"), "$: 'graph_digest' is a required property"),
        (lambda v: v.update(more=1), "$: Additional properties are not allowed ('more' was"),
        (lambda v: v.update(schema_version=1), "$.schema_version: 3 was expected"),
        (lambda v: v["results"][0].update(outcome="fine"), "$.results[0].outcome: 'fine' is not"),
        (lambda v: v["results"][0].update(seconds="1"), "$.results[0].seconds: '1' is not of type"),
        (
            lambda v: v["results"][0]["figures"].update(distribution=[[1.0]]),
            "$.results[0].figures: {",
        ),
        (lambda v: v["files"].update(a=1), "$.files.a: 1 is not of type 'string'"),
        (lambda v: v.update(passed=1), "$.passed: 1 is not of type 'boolean'"),
    ],
)
def test_invalid_reports_violate_the_schema(change: Any, problem: str) -> None:
    value = as_read(FULL)
    change(value)
    found = problems(value)
    assert any(line.startswith(problem) for line in found), found
