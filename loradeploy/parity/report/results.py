"""The report of a parity check as dataclasses, and its JSON form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from loradeploy.bundle.proof.certificate import FORMAT as FORMAT
from loradeploy.bundle.proof.certificate import SCHEMA_VERSION as SCHEMA_VERSION
from loradeploy.bundle.proof.provider import ProviderFacts
from loradeploy.files import json_values
from loradeploy.parity.figures.metrics import Figures
from loradeploy.parity.names import REPEAT

BASE_LABEL: Final = "base"
# The mode of a report on two models that were compared with each other, and its two sides.
COMPARED: Final = "compared"
REFERENCE, CANDIDATE = "reference", "candidate"

Outcome = Literal["passed", "failed", "not run"]


def outcome_of(failure: str | None) -> Outcome:
    """Return "passed" if `failure` is None, else "failed"."""
    return "passed" if failure is None else "failed"


@dataclass(frozen=True)
class Check:
    """One figure compared with its limit. `reason`: why the limit is what it is."""

    metric: str
    title: str
    value: float
    limit: float
    passed: bool
    reason: str


def no_more_than_rounding(checks: Sequence[Check], effect: float | None) -> bool:
    """Whether errors only fail next to an effect that is itself within the limit of errors."""
    failed = [check.metric for check in checks if not check.passed]
    allowed = next((check.limit for check in checks if check.metric == "max_abs"), 0.0)
    return failed == ["effect_share"] and effect is not None and effect <= allowed


@dataclass(frozen=True)
class Variant:
    """How onnxruntime runs a graph: the execution provider, and how far the graph is optimized.

    `provider`: its name as in the report's environment, such as "cuda" or "cuda:1".
    `optimization`: onnxruntime's level, one of "disable", "basic", "extended", "all".
    """

    provider: str
    optimization: str

    def __str__(self) -> str:
        return f"{self.provider}, {self.optimization}"


@dataclass(frozen=True)
class Result:
    """The result of one backend with one adapter in one phase, or of one aspect of two models.

    `adapter`: None is the base. `phase`: None if the backend was not opened. When two models are
    compared, there is neither adapter nor phase, and `aspect` is an output's name, "runs", "label
    map" or "vocabulary".
    `message`: one line, why it failed or was not run, or a remark. `figures`: None if nothing could
    be compared. `variant`: None if the backend does not use onnxruntime.
    """

    backend: str
    title: str
    adapter: str | None
    phase: str | None
    outcome: Outcome
    message: str | None
    figures: Figures | None = None
    checks: tuple[Check, ...] = ()
    effect: float | None = None
    seconds: float = 0.0
    variant: Variant | None = None
    aspect: str | None = None

    @property
    def nearly_untrained(self) -> bool:
        """Whether it failed only because the adapter's effect is no larger than rounding errors."""
        return no_more_than_rounding(self.checks, self.effect)

    @property
    def adapter_label(self) -> str:
        """The adapter's name, or "base"; empty if nothing was run."""
        if self.phase is None:
            return ""
        return BASE_LABEL if self.adapter is None else self.adapter

    @property
    def part(self) -> str:
        """The phase or the aspect; empty if there is neither."""
        return self.phase or self.aspect or ""


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter and its effect on the reference's outputs.

    `effect`: the largest |adapter − base| over the outputs of all prompts; `mean_effect`: the mean.
    `message`: the failure if `failed`, otherwise a remark or None.
    """

    name: str
    digest: str
    effect: float
    mean_effect: float
    failed: bool = False
    message: str | None = None


@dataclass(frozen=True)
class Control:
    """A negative control: a deliberate mistake, and whether the check caught it."""

    name: str
    meaning: str
    adapter: str
    caught: bool
    error: float
    effect: float


@dataclass(frozen=True)
class Step:
    """The output of one module inside the model, compared on both sides.

    `module`: its path in the PyTorch model; values it passes to its submodules are included.
    `layer`: the number of its transformer block, None outside of all blocks. `node`, `op`: the
    graph's node that computes the output; for a backend in PyTorch, `node` is empty and `op` is the
    module's class. `error`: the largest absolute difference at the worst position. `scale`: the
    largest absolute value there. `share`: error / scale.
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

    NaN where one of the sides is not finite.
    """

    modules: tuple[str, ...]
    positions: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Localization:
    """Where a backend diverges from the reference, for one prompt.

    `steps`: the blocks, the modules outside of them, and the modules inside the first block that
    diverges, in order of execution. `first`: the first step that diverges, if any. `before`: the
    last step before it that agrees. `offenders`: the steps at which the error grows most, the worst
    first. `unmatched`: modules without a counterpart in the backend.
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
    """The smallest input found that still fails.

    `tokens`: token ids. `text`: the decoded tokens, if there is a tokenizer. `error`: the largest
    error on this input. `tried`: number of inputs tried. `length`: tokens of the original input.
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


# The task metrics for which lower is better.
LOWER_IS_BETTER: Final = ("perplexity", "rmse", "wer")


@dataclass(frozen=True)
class Score:
    """A task metric on held-out data, of a backend and of the reference.

    `metric`: one of `score.measures.MEASURES`, such as "accuracy". `difference`: value − reference.
    `low`, `high`: its 95 % confidence interval over the examples, paired. `limit`: by how much the
    value may be worse than the reference.
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
    """A figure that is worse than in the baseline, or a result that is missing now."""

    where: str
    metric: str
    before: float | str
    now: float | str
    message: str


@dataclass(frozen=True)
class Environment:
    """The environment of the check: package versions, the machine, the execution providers."""

    versions: Mapping[str, str]
    platform: Mapping[str, str]
    providers: tuple[ProviderFacts, ...]


@dataclass(frozen=True)
class Inputs:
    """The inputs of the check, with everything needed to reproduce them.

    `fuzz`: number of rows of random tokens. `edges`: number of rows of extreme lengths and of
    tokens that adapters trained. Both are in addition to `prompts`. `prompt_tokens`: number of
    prompt tokens of all rows.
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
    """The verdict on a bundle, or on two models that were compared, and its evidence.

    When two models are compared, `task` is None, `mode` is COMPARED, `bundle` is the candidate and
    `base` the reference.
    `graph_digest`, `data_digest`, `files` (by name): digests of the bundle's files at the check.
    `baseline`: the earlier report that `regressions` refer to. `asked`: the backends that the user
    requested by name; the check fails if one of them is not run.
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
        """Whether something ran and everything that ran agrees with the reference."""
        return not self.failures

    @property
    def mutation_score(self) -> float | None:
        """The fraction of the negative controls that were caught; None if none were run."""
        caught = sum(control.caught for control in self.controls)
        return caught / len(self.controls) if self.controls else None

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object; numbers that are not finite become null."""
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
        f"{result.title} was requested but not run: {result.message}"
        for result in report.results
        if result.backend in report.asked and result.backend not in ran
    ]
    found += [f"{regression.where}: {regression.message}" for regression in report.regressions]
    found += [
        f"control {control.name!r} with {control.adapter} was not caught: its error of"
        f" {control.error:.2g} is within the limits"
        for control in report.controls
        if not control.caught
    ]
    # The phase "repeat" compares a backend with itself, not with the reference.
    if not any(r.outcome == "passed" and r.phase != REPEAT for r in report.results):
        found.append("nothing agrees with the reference")
    return found


def _where(result: Result) -> str:
    """Return the backend, adapter, phase or aspect, and variant of a result, if present."""
    variant = None if result.variant is None else str(result.variant)
    return ", ".join(filter(None, (result.title, result.adapter_label, result.part, variant)))
