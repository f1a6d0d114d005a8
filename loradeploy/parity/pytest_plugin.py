"""The pytest plugin: the fixture `assert_parity`, its options, and a summary at the end.

    def test_the_bundle(assert_parity):
        assert_parity("bundle", "SmolLM2-135M-Instruct", adapters=["adapters/sport"])

pytest loads it wherever loradeploy is installed (`-p no:loradeploy` disables it), so it imports
only pytest until the fixture is used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from loradeploy.parity.report.results import ParityReport

_PROPERTY: Final = "loradeploy_parity"
_LONGEST_NAME: Final = 100


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options `--parity-…`."""
    group = parser.getgroup("parity", "parity (loradeploy)")
    group.addoption(
        "--parity-report-dir",
        metavar="DIR",
        help="write the report of every assert_parity here, in every report format",
    )
    group.addoption(
        "--parity-baseline",
        metavar="DIR",
        help="fail if a metric is worse than in the reports of --parity-update-baseline here",
    )
    group.addoption(
        "--parity-update-baseline",
        action="store_true",
        help="instead, write the reports of the checks that pass to --parity-baseline",
    )
    group.addoption(
        "--parity-seed",
        type=int,
        metavar="N",
        help="seed of random tokens and randomly generated inputs, if the test gives none",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse options that cannot be combined."""
    if config.getoption("parity_update_baseline") and not config.getoption("parity_baseline"):
        raise pytest.UsageError("--parity-update-baseline needs --parity-baseline DIR")


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest) -> Callable[..., ParityReport]:
    """`loradeploy.parity.assert_parity` with the options of this pytest run."""
    calls = 0

    def check(candidate: Any, reference: Any = None, **options: Any) -> ParityReport:
        __tracebackhide__ = True
        nonlocal calls
        calls += 1
        return _check(request, calls, candidate, reference, options)

    return check


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print one line for every check, with the paths of its reports."""
    found = [
        (report.nodeid, json.loads(value))
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == _PROPERTY
    ]
    if not found:
        return
    from loradeploy.printable import printable

    terminalreporter.section("parity")
    for nodeid, shown in found:
        color = {"green" if shown["passed"] else "red": True}
        terminalreporter.write_line(printable(f"{nodeid}: {shown['headline']}"), **color)
        for line in shown["lines"]:
            terminalreporter.write_line(printable(f"    {line}"))


def _check(
    request: pytest.FixtureRequest,
    number: int,
    candidate: Any,
    reference: Any,
    options: dict[str, Any],
) -> ParityReport:
    __tracebackhide__ = True
    from loradeploy.parity.assertion import failure_text, run_check
    from loradeploy.parity.report.baseline import read_baseline
    from loradeploy.parity.report.finish import Ending, finish
    from loradeploy.parity.report.table import headline
    from loradeploy.parity.report.writers import WRITERS

    config = request.config
    seed, baselines = config.getoption("parity_seed"), config.getoption("parity_baseline")
    update = config.getoption("parity_update_baseline")
    name = _file_name(request.node.nodeid, number)
    kept = None if baselines is None else Path(baselines) / f"{name}.json"
    earlier = None
    if kept is not None and not update:
        if not kept.is_file():
            pytest.fail(f"{kept} does not exist: run once with --parity-update-baseline")
        earlier = read_baseline(kept)
    if seed is not None:
        options = {"seed": seed, **options}
    report = run_check(candidate, reference, **options)
    files, lines = [], []
    if update and kept is not None and report.passed:
        files.append(kept)
        lines.append(f"baseline {kept}")
    if (directory := config.getoption("parity_report_dir")) is not None:
        files += [Path(directory) / f"{name}{ending}" for ending in WRITERS]
        lines.append(f"report {Path(directory) / name}")
    report = finish(report, Ending(earlier, tuple(files)))
    shown = {"headline": headline(report), "passed": report.passed, "lines": lines}
    # Under xdist, pytest's test reports transfer user properties from the worker process.
    request.node.user_properties.append((_PROPERTY, json.dumps(shown)))
    if not report.passed:
        raise AssertionError(failure_text(report))
    return report


def _file_name(nodeid: str, number: int) -> str:
    """Return a file name that is unique and stable for a test, and valid on every system."""
    digest = hashlib.sha256(nodeid.encode()).hexdigest()[:8]
    readable = re.sub(r"[^\w.]+", "-", nodeid).strip("-")[-_LONGEST_NAME:]
    return f"{readable}-{digest}" + (f"-{number}" if number > 1 else "")
