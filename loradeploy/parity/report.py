"""What a parity check found: nouns, and their JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from loradeploy.files import plain
from loradeploy.parity.metrics import Figures

FORMAT: Final = "loradeploy-parity"
SCHEMA_VERSION: Final = 1
BASE_LABEL: Final = "base"

Outcome = Literal["passed", "failed", "not run"]


@dataclass(frozen=True)
class Check:
    """One figure held against its limit. `reason` is the limit's."""

    metric: str
    title: str
    value: float
    limit: float
    passed: bool
    reason: str


@dataclass(frozen=True)
class Result:
    """One backend, with one adapter (None is the base), in one phase.

    `message` is one line: why it failed or was not run, or None where it passed. `figures` are None
    where nothing could be compared.
    """

    backend: str
    title: str
    adapter: str | None
    phase: str | None
    outcome: Outcome
    message: str | None = None
    figures: Figures | None = None
    checks: tuple[Check, ...] = ()
    effect: float | None = None
    seconds: float = 0.0

    @property
    def subject(self) -> str:
        """The adapter's name, or a word for the base."""
        return BASE_LABEL if self.adapter is None else self.adapter


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter and what it does to the reference.

    `effect`: max abs |adapter − base| over the prompts' outputs, `mean_effect` the mean.
    `message`: a failure where `failed`, else a remark, else None.
    """

    name: str
    digest: str
    effect: float
    mean_effect: float
    failed: bool = False
    message: str | None = None


@dataclass(frozen=True)
class Control:
    """A mistake that was made on purpose, and whether the check saw it."""

    name: str
    meaning: str
    adapter: str
    caught: bool
    error: float
    effect: float


@dataclass(frozen=True)
class Environment:
    """Where the check ran: package versions, the machine, onnxruntime's providers."""

    versions: Mapping[str, str]
    platform: Mapping[str, str]
    providers: tuple[str, ...]


@dataclass(frozen=True)
class Inputs:
    """What was fed: enough to feed the same again."""

    source: str
    prompts: int
    prompt_tokens: int
    generated: int
    seed: int


@dataclass(frozen=True)
class ParityReport:
    """The verdict on a bundle, with all that it stands on.

    `graph_digest`, `data_digest`: of the bundle's files as they were checked. `merged`: digest of
    the adapter that a merged bundle claims to hold.
    """

    bundle: str
    task: str
    mode: str
    precision: str
    base: str
    base_digest: str | None
    graph_digest: str
    data_digest: str | None
    inputs: Inputs
    environment: Environment
    created: str
    results: tuple[Result, ...]
    adapters: tuple[AdapterFacts, ...] = ()
    controls: tuple[Control, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    failures: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "failures", tuple(_failures(self)))

    @property
    def passed(self) -> bool:
        """Whether everything that ran agrees with the reference, and something ran."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object; numbers that are not finite become null."""
        head = {"format": FORMAT, "schema_version": SCHEMA_VERSION, "passed": self.passed}
        return {**head, **plain(self)}


def _failures(report: ParityReport) -> list[str]:
    found = [f"{facts.name}: {facts.message}" for facts in report.adapters if facts.failed]
    found += [
        f"{result.title}, {result.subject}{f', {result.phase}' if result.phase else ''}:"
        f" {result.message}"
        for result in report.results
        if result.outcome == "failed"
    ]
    found += [
        f"control {control.name!r} with {control.adapter} was not caught"
        for control in report.controls
        if not control.caught
    ]
    if not any(result.outcome == "passed" for result in report.results):
        found.append("nothing was found to agree with the reference")
    return found
