"""`loradeploy doctor`."""

from __future__ import annotations

from dataclasses import asdict

import click

from loradeploy.cli.console import json_option, print_json, print_rows, say

_MARKS = {"ok": "ok", "note": "note", "problem": "PROBLEM"}


@click.command(
    name="doctor",
    short_help="Check versions, execution providers and known problems.",
    epilog="Example: loradeploy doctor",
)
@json_option
def command(as_json: bool) -> int:
    """Report what is installed, which execution providers start, and the problems found.

    The exit status is 1 if there is a problem.
    """
    from loradeploy.runtime.devices.environment import examine

    findings = examine()
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_rows(
            "This machine",
            ("", "", ""),
            [(_MARKS[f.status], f.name, f.detail) for f in findings],
        )
        for finding in findings:
            if finding.advice:
                say(f"{finding.name}: {finding.advice}")
    return int(any(finding.status == "problem" for finding in findings))
