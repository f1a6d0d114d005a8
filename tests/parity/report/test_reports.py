"""Reports on disk and on a terminal."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from rich.console import Console

from loradeploy.errors import UsageError
from loradeploy.parity.figures.metrics import Comparison
from loradeploy.parity.figures.tolerances import assumed
from loradeploy.parity.report.results import (
    SCHEMA_VERSION,
    AdapterFacts,
    Control,
    Environment,
    Inputs,
    ParityReport,
    Result,
)
from loradeploy.parity.report.table import print_report
from loradeploy.parity.report.writers import WRITERS, check_reports, junit, markdown, write_report
from loradeploy.parity.verdict import judge
from tests.parity.reports import FULL, ON_CPU, PASSED


def result(error: float = 0.0) -> Result:
    comparison = Comparison(scale=1.0, logits=True)
    comparison.add(np.array([[1.0, 0.0]]), np.array([[1.0 + error, 0.0]]))
    verdict = judge(comparison.figures(), assumed("fp32", scale=1.0), effect=0.5)
    return verdict.result(backend="onnx", title="ONNX", adapter="a|b", phase="prefill", effect=0.5)


REPORT = ParityReport(
    bundle="bundle",
    task="causal-lm",
    mode="side-inputs",
    precision="fp32",
    base="tiny",
    base_digest="sha256:00",
    graph_digest="sha256:11",
    data_digest=None,
    inputs=Inputs("built-in prompts", 16, 500, 32, 0),
    environment=Environment({"python": "3.12"}, {"machine": "x86_64"}, (ON_CPU,)),
    created="2026-01-01T00:00:00+00:00",
    results=(result(), Result("peft", "PEFT", None, None, "not run", "peft is not installed")),
    adapters=(AdapterFacts("a|b", "sha256:22", 0.5, 0.1),),
    controls=(Control("doubled alpha", "twice", "a|b", True, 0.4, 0.5),),
)
FAILED = dataclasses.replace(REPORT, results=(*REPORT.results, result(0.1)))


def test_a_report_passes_if_everything_that_ran_passed() -> None:
    assert REPORT.passed
    assert REPORT.failures == ()


@pytest.mark.parametrize(
    "change",
    [
        {"results": FAILED.results},
        {"results": REPORT.results[1:]},
        {"results": ()},
        {"adapters": (dataclasses.replace(REPORT.adapters[0], failed=True, message="none"),)},
        {"controls": (dataclasses.replace(REPORT.controls[0], caught=False),)},
    ],
    ids=["a difference", "nothing that ran", "nothing", "no effect", "a control that passed"],
)
def test_a_report_fails_with(change: dict[str, object]) -> None:
    report = dataclasses.replace(REPORT, **change)  # type: ignore[arg-type]
    assert not report.passed
    assert report.failures


def test_json_has_its_schema_version_the_verdict_and_the_figures(tmp_path: Path) -> None:
    write_report(FAILED, tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["format"], result["schema_version"]) == ("loradeploy-parity", SCHEMA_VERSION)
    assert result["passed"] is False
    assert result["results"][2]["figures"]["max_abs"] == pytest.approx(0.1)
    assert result["results"][2]["checks"][0]["reason"]


def test_json_has_no_nan_or_infinity(tmp_path: Path) -> None:
    facts = dataclasses.replace(REPORT.adapters[0], effect=float("nan"))
    write_report(dataclasses.replace(REPORT, adapters=(facts,)), tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["adapters"][0]["effect"] is None


def test_junit_counts_what_failed_and_what_was_not_run(tmp_path: Path) -> None:
    write_report(FAILED, tmp_path / "r.xml")
    suite = ET.parse(tmp_path / "r.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("5", "1", "1")
    skipped = suite.find("testcase/skipped")
    assert skipped is not None
    assert skipped.get("message") == "peft is not installed"
    failed = suite.find("testcase/failure")
    assert failed is not None
    assert "max abs 0.1" in str(failed.get("message"))


def test_junit_is_valid_xml_for_any_name(tmp_path: Path) -> None:
    report = dataclasses.replace(REPORT, bundle="a\x00<b>\x1b", results=(result(),))
    write_report(report, tmp_path / "r.xml")
    assert "<b>" in str(ET.parse(tmp_path / "r.xml").getroot().get("name"))


def test_markdown_keeps_its_table_for_any_name() -> None:
    text = markdown(FAILED)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace(r"\|", "").count("|") for line in table} == {13}
    assert r"a\|b" in text
    assert "❌" in text
    assert "❌" not in markdown(REPORT)


def test_an_unknown_ending_is_refused_before_anything_runs() -> None:
    with pytest.raises(UsageError, match=r"report\.pdf: a report ends in one of"):
        check_reports(["report.json", "report.pdf"])


@pytest.mark.parametrize("ending", WRITERS)
def test_a_report_that_cannot_be_written_says_so(tmp_path: Path, ending: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_report(REPORT, tmp_path / "file" / f"r{ending}")


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_ends_with_the_verdict(terminal: bool) -> None:
    out = io.StringIO()
    print_report(FAILED, Console(file=out, force_terminal=terminal, color_system=None, width=160))
    lines = out.getvalue().splitlines()
    assert lines[0].split()[:2] == ["backend", "adapter"]
    assert lines[-1].startswith("parity FAILED: bundle")
    assert "not run: PEFT: peft is not installed" in lines


def table_of(report: ParityReport) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, color_system=None, width=200))
    return out.getvalue()


# -- optional parts of a report --------------------------------------------------------------------

FORMS = pytest.mark.parametrize("form", [table_of, markdown, junit], ids=["table", "md", "junit"])


@FORMS
@pytest.mark.parametrize(
    "message",
    [
        "model.layers.6.self_attn.q_proj (MatMul) is the first to diverge",
        "model.layers.6.mlp.down_proj",
        "no module is shown by both sides",
        "Shares fell",
        "(17, 402, 9)",
        "is worse by 1.71, at most 0.25 is allowed",
        "5.4 times what it was",
        "it was run before",
        "missing target",
        "cpu, disable",
    ],
)
def test_every_form_contains(form: Callable[[ParityReport], str], message: str) -> None:
    assert message in form(FULL).replace("\\", "")


@pytest.mark.parametrize("form", [table_of, markdown], ids=["table", "md"])
def test_forms_for_people_show_scores_with_their_intervals(
    form: Callable[[ParityReport], str],
) -> None:
    text = form(FULL).replace("\\", "")
    assert "0.9145 (PyTorch 0.912), +0.0025 [95 %: -0.006 to +0.011] on 400 examples" in text
    assert "controls: 1 of 2 mistakes caught, mutation score 50.0 %" in text
    assert "baseline main.json: 2 worse" in text


@pytest.mark.parametrize("form", [table_of, markdown], ids=["table", "md"])
def test_variants_are_a_column_if_there_are_several(
    form: Callable[[ParityReport], str],
) -> None:
    assert "variant" in form(FULL)
    assert "variant" not in form(PASSED)


def test_a_comment_folds_a_long_table() -> None:
    assert "<details>" not in markdown(PASSED)
    long = dataclasses.replace(PASSED, results=PASSED.results * 3)
    text = markdown(long)
    assert "<details><summary>15 results</summary>\n\n| backend" in text
    assert text.count("<details>") == text.count("</details>") == 1


def test_a_comment_stays_short_however_much_fails() -> None:
    failed = dataclasses.replace(PASSED, results=(FULL.results[-2],) * 50)
    text = markdown(failed)
    assert "- and 31 more" in text
    assert len(text) < 65_536  # GitHub's limit, of 50 results and more


def test_a_score_and_a_regression_are_separate_junit_cases(tmp_path: Path) -> None:
    write_report(FULL, tmp_path / "r.xml")
    suite = ET.parse(tmp_path / "r.xml").getroot()
    cases = {(c.get("classname"), c.get("name")): c for c in suite.iter("testcase")}
    assert len(cases) == int(str(suite.get("tests")))
    assert cases["parity.score", "accuracy, ONNX merged, sport"].find("failure") is None
    assert cases["parity.score", "perplexity, ONNX mixed, tech"].find("failure") is not None
    assert cases["parity.baseline", "PEFT, outcome"].find("failure") is not None
    assert ("parity.onnx-merged", "sport, prefill, cpu, disable") in cases
