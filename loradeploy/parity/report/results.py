"""What a parity check found: nouns, and their JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from loradeploy.bundle.proof.certificate import FORMAT as FORMAT
from loradeploy.bundle.proof.certificate import SCHEMA_VERSION as SCHEMA_VERSION
from loradeploy.bundle.proof.provider import ProviderFacts
from loradeploy.files import json_values
from loradeploy.parity.figures.metrics import Figures
from loradeploy.parity.names import REPEAT

BASE_LABEL: Final = "base"
# The mode of a report on two models that were compared with each other, and its backends.
COMPARED: Final = "compared"
REFERENCE, CANDIDATE = "reference", "candidate"

Outcome = Literal["passed", "failed", "not run"]


def outcome_of(failure: str | None) -> Outcome:
    """Passed where there is no reason to fail."""
    return "passed" if failure is None else "failed"


@dataclass(frozen=True)
class Check:
    """One figure compared with its limit. `reason` is the limit's."""

    metric: str
    title: str
    value: float
    limit: float
    passed: bool
    reason: str


@dataclass(frozen=True)
class Variant:
    """How onnxruntime runs a graph: the execution provider, and how far the graph is optimized.

    `provider`: the name on the command line; the report's environment has an entry of this name.
    `optimization`: onnxruntime's level, one of "disable", "basic", "extended", "all".
    """

    provider: str
    optimization: str

    def __str__(self) -> str:
        return f"{self.provider}, {self.optimization}"


@dataclass(frozen=True)
class Result:
    """One backend, with one adapter (None is the base), in one phase, or of two models one aspect.

    A backend that was not opened has no phase. Of two models that are compared there is neither
    adapter nor phase; `aspect` is an output's name, "runs", "label map" or "vocabulary".
    `message` is one line: why it failed or was not run, or a remark. `figures` are None where
    nothing could be compared. `variant` is None where onnxruntime has no part in it.
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
    variant: Variant | None = None
    aspect: str | None = None

    @property
    def adapter_label(self) -> str:
        """The adapter's name, or a word for the base; nothing where neither was run."""
        if self.phase is None:
            return ""
        return BASE_LABEL if self.adapter is None else self.adapter

    @property
    def part(self) -> str:
        """The phase, or the aspect; nothing where there is neither."""
        return self.phase or self.aspect or ""


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
class Step:
    """A module's output on both sides, on the way through the model.

    `module`: its path in the PyTorch model; what it gives on to a module within it counts too.
    `layer`: the number of the block that it is in, None outside of all. `node`, `op`: the graph's
    node that gives it; of a backend in PyTorch, none and the module's class. `error`: largest
    absolute difference at the position where it is worst, of values that reach `scale` there.
    `share`: error / scale.
    """

    module: str
    layer: int | None
    node: str
    op: str
    error: float
    scale: float
    share: float


@dataclass(frozen=True)
class Heatmap:
    """Largest relative error (error / scale) by module and position: `values` [modules, positions].

    NaN stands where one of the sides is not finite.
    """

    modules: tuple[str, ...]
    positions: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Localization:
    """Where a backend parts from the reference, on one case.

    `steps`: the blocks, what is outside of them, and the modules inside the first block that
    diverges, in the order of execution. `first`: the first that diverges, None where none does.
    `before`: the last that agrees ahead of it. `offenders`: those at which the error grows most,
    the worst first. `unmatched`: modules without a counterpart.
    """

    backend: str
    title: str
    adapter: str | None
    case: int
    tokens: int
    steps: tuple[Step, ...]
    first: Step | None = None
    before: Step | None = None
    offenders: tuple[Step, ...] = ()
    heatmap: Heatmap | None = None
    unmatched: tuple[str, ...] = ()
    message: str | None = None


@dataclass(frozen=True)
class Counterexample:
    """The smallest input that was found to fail still.

    `tokens`: the ids, `text` what they are where there is a tokenizer. `error`: the largest there.
    `tried`: how many inputs were tried on the way; `length`: of the input that it came from.
    """

    backend: str
    title: str
    adapter: str | None
    tokens: tuple[int, ...]
    text: str | None
    error: float
    message: str
    length: int
    tried: int


# The task metrics of which less is better.
LOWER_IS_BETTER: Final = ("perplexity", "rmse", "wer")


@dataclass(frozen=True)
class Score:
    """A task metric on held-out data, on both sides.

    `metric`: one of `score.measures.MEASURES`, such as "accuracy". `difference`: value − reference,
    and its 95 % confidence interval [low, high] over the examples, paired. `limit`: how much worse
    it may be.
    """

    backend: str
    title: str
    adapter: str | None
    metric: str
    examples: int
    reference: float
    value: float
    difference: float
    low: float
    high: float
    limit: float
    passed: bool
    message: str | None = None


@dataclass(frozen=True)
class Regression:
    """Something that an earlier report had better: a figure, or a backend that was not run."""

    where: str
    metric: str
    before: float | str
    now: float | str
    message: str


@dataclass(frozen=True)
class Environment:
    """Where the check ran: package versions, the machine, the execution providers."""

    versions: Mapping[str, str]
    platform: Mapping[str, str]
    providers: tuple[ProviderFacts, ...]


@dataclass(frozen=True)
class Inputs:
    """What was fed: enough to feed the same again.

    `fuzz`: rows of random tokens, `edges`: rows of extreme lengths and of tokens that adapters
    trained, both besides the `prompts`.
    `prompt_tokens`: of all rows together.
    """

    source: str
    prompts: int
    prompt_tokens: int
    generated: int
    seed: int
    fuzz: int = 0
    edges: int = 0


@dataclass(frozen=True)
class ParityReport:
    """The verdict on a bundle, or on two models that were compared, with all of its evidence.

    `task`: None of two models, whose `mode` is COMPARED: `bundle` is the candidate then and `base`
    the reference.
    `graph_digest`, `data_digest`, and `files` by name: of the bundle's files as they were checked.
    `baseline`: the earlier report that `regressions` are from. `asked`: the backends that were
    asked for by name, and may not be left out.
    """

    bundle: str
    task: str | None
    mode: str
    precision: str
    base: str
    base_digest: str | None
    graph_digest: str | None
    data_digest: str | None
    inputs: Inputs
    environment: Environment
    created: str
    results: tuple[Result, ...]
    adapters: tuple[AdapterFacts, ...] = ()
    controls: tuple[Control, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    localizations: tuple[Localization, ...] = ()
    counterexamples: tuple[Counterexample, ...] = ()
    scores: tuple[Score, ...] = ()
    regressions: tuple[Regression, ...] = ()
    baseline: str | None = None
    asked: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    failures: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "failures", tuple(_failures(self)))

    @property
    def passed(self) -> bool:
        """Whether everything that ran agrees with the reference, and anything ran."""
        return not self.failures

    @property
    def mutation_score(self) -> float | None:
        """The fraction of the deliberate mistakes that was caught; None if none were made."""
        caught = sum(control.caught for control in self.controls)
        return caught / len(self.controls) if self.controls else None

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object; numbers that are not finite become null."""
        head = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "passed": self.passed,
            "mutation_score": self.mutation_score,
        }
        return {**head, **json_values(self)}


def _failures(report: ParityReport) -> list[str]:
    found = [f"{facts.name}: {facts.message}" for facts in report.adapters if facts.failed]
    found += [
        f"{_where(result)}: {result.message}"
        for result in report.results
        if result.outcome == "failed"
    ]
    found += [
        f"{score.title}, {score.adapter or BASE_LABEL}: {score.metric} {score.message}"
        for score in report.scores
        if not score.passed
    ]
    ran = {result.backend for result in report.results if result.outcome != "not run"}
    found += [
        f"{result.title} was asked for and not run: {result.message}"
        for result in report.results
        if result.backend in report.asked and result.backend not in ran
    ]
    found += [f"{regression.where}: {regression.message}" for regression in report.regressions]
    found += [
        f"control {control.name!r} with {control.adapter} was not caught"
        for control in report.controls
        if not control.caught
    ]
    # A second run that equals the first is no agreement with the reference.
    if not any(r.outcome == "passed" and r.phase != REPEAT for r in report.results):
        found.append("nothing was found to agree with the reference")
    return found


def _where(result: Result) -> str:
    """The backend, the adapter, the phase or aspect, and the variant, as far as there are."""
    variant = None if result.variant is None else str(result.variant)
    return ", ".join(filter(None, (result.title, result.adapter_label, result.part, variant)))
