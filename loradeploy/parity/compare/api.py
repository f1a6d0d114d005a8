"""`loradeploy.compare`: compares any two models with each other."""

from __future__ import annotations

import datetime as dt
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.bundle.graph_form import DEFAULT_PRECISION
from loradeploy.bundle.names import INPUT_IDS
from loradeploy.disk import scratch_directory
from loradeploy.errors import UsageError, first_line, listed_names
from loradeploy.files import check_file
from loradeploy.parity.compare.feeds import Fed, FeedsPlace, make_feeds, read_feeds
from loradeploy.parity.compare.opening import open_side
from loradeploy.parity.compare.outputs import LimitsOf, Outputs
from loradeploy.parity.compare.runs import Runs, kept_in
from loradeploy.parity.compare.sides import Side
from loradeploy.parity.environment import environment
from loradeploy.parity.figures.tolerances import ASSUMED, METRICS, Limit, assumed
from loradeploy.parity.inputs.prompts import CASES
from loradeploy.parity.report.finish import Ending, finish
from loradeploy.parity.report.results import (
    CANDIDATE,
    COMPARED,
    REFERENCE,
    Inputs,
    ParityReport,
    Result,
    outcome_of,
)
from loradeploy.paths import takes_paths

if TYPE_CHECKING:
    from loradeploy.parity.compare.feeds import Feed
    from loradeploy.parity.compare.opening import Comparable
    from loradeploy.parity.compare.sides import Given
    from loradeploy.runtime.devices.providers import Provider

Tolerances = str | Mapping[str, float | Limit]

_LISTED: Final = 5


@takes_paths("report", "baseline")
def compare(
    reference: Comparable,
    candidate: Comparable,
    inputs: FeedsPlace | None = None,
    *,
    cases: int = CASES,
    seed: int = 0,
    tolerances: Tolerances | None = None,
    names: Mapping[str, str] | None = None,
    providers: Sequence[Provider] | None = None,
    report: Iterable[str | os.PathLike[str]] | str | os.PathLike[str] = (),
    baseline: str | os.PathLike[str] | None = None,
) -> ParityReport:
    """Compare `candidate` with `reference`, output by output, and return the report.

    Each is an ONNX file, a bundle (its base, or the merged model), a `torch.nn.Module`, a function
    that maps feeds (numpy arrays by name) to outputs (by name, or a sequence in the order of the
    other side's outputs), or the name "module:function" of such a function. Outputs are matched by
    name. The comparison fails for an output of only one side, different shapes, values that are not
    finite, a side that raises, and a side that returns different results when the first case is run
    again.

    Args:
        inputs: feeds, one mapping of names to arrays for each case; an .npz file or a directory of
            them; None generates them at random for the inputs that an ONNX side declares.
        cases: number of generated cases; the second has 1 for every dynamic dimension.
        seed: seed of the generated cases.
        tolerances: a precision whose limits to use, or limits by metric, which replace those of the
            candidate's precision; by default the limits of the candidate's precision.
        names: the candidate's names of the reference's inputs and outputs, where they differ.
        providers: onnxruntime's execution providers, the CPU's by default.
        report: files to write, as in `loradeploy.parity`.
        baseline: an earlier report (JSON); the check fails if a metric got worse.

    Raises:
        UsageError: a side that is not a model, missing inputs, unknown tolerances, or a baseline
            that is not comparable.
        ModelError, BundleError: a file that cannot be opened.
        DataError: inputs that cannot be read.
    """
    ending = Ending.of(report, baseline)
    started = time.monotonic()
    expected, actual = open_side(reference, providers), open_side(candidate, providers)
    _limits(actual.precision, tolerances)  # raises before anything runs
    renamed = dict(names or {})
    fed = _feeds(expected, actual, renamed, inputs, cases, seed)
    found = _compared(expected, actual, fed, renamed, tolerances)
    providers_used = {s.provider.provider: s.provider for s in (expected, actual) if s.provider}
    made = ParityReport(
        bundle=actual.title,
        task=None,
        mode=COMPARED,
        precision=found.precision,
        base=expected.title,
        base_digest=expected.digest,
        graph_digest=actual.digest,
        data_digest=actual.data_digest,
        inputs=Inputs(
            source=fed.source,
            prompts=len(fed.cases),
            prompt_tokens=sum(feed[INPUT_IDS].size for feed in fed.cases if INPUT_IDS in feed),
            generated=0,
            seed=seed,
        ),
        environment=environment(tuple(providers_used.values())),
        created=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        results=found.results,
        notes=(*fed.notes, *found.notes, *_unused_inputs(expected, actual, fed, renamed)),
        seconds=round(time.monotonic() - started, 1),
    )
    return finish(made, ending)


@dataclass(frozen=True, eq=False)
class _Compared:
    """The results of running both sides; `precision` is the candidate's."""

    precision: str
    results: tuple[Result, ...]
    notes: tuple[str, ...]


def _compared(
    expected: Side,
    actual: Side,
    fed: Fed,
    renamed: Mapping[str, str],
    tolerances: Tolerances | None,
) -> _Compared:
    """Run both sides on `fed`, one after the other, and compare their outputs."""
    with scratch_directory("loradeploy-compare-") as scratch:
        expected_runs = Runs(expected, REFERENCE, fed, {})
        kept = [kept_in(given, scratch) for given in expected_runs]
        actual_runs = Runs(actual, CANDIDATE, fed, renamed)
        outputs = Outputs(kept, fed)
        for number, given in enumerate(actual_runs):
            outputs.add(number, given)
        precision = actual.precision or outputs.precision
        limits = _limits(precision, tolerances)
        results = (
            *(runs.result(limits) for runs in (expected_runs, actual_runs)),
            *_same_meaning(expected, actual),
            *outputs.results(actual.name, limits),
        )
    return _Compared(precision, results, (*expected_runs.notes, *actual_runs.notes))


# -- inputs and limits -----------------------------------------------------------------------------


def _feeds(
    expected: Side,
    actual: Side,
    renamed: Mapping[str, str],
    inputs: FeedsPlace | None,
    cases: int,
    seed: int,
) -> Fed:
    back = {theirs: name for name, theirs in renamed.items()}
    if inputs is not None:
        fed = read_feeds(inputs)
    else:
        if expected.inputs is None and actual.inputs is None:
            raise UsageError(
                f"neither {expected.title} nor {actual.title} declares its inputs: give inputs,"
                " an .npz file of arrays by name"
            )
        specs = {spec.name: spec for spec in expected.inputs or ()}
        for spec in actual.inputs or ():
            name = back.get(spec.name, spec.name)
            specs.setdefault(name, type(spec)(name, spec.dtype, spec.shape))
        known = [side.vocabulary for side in (expected, actual) if side.vocabulary is not None]

        def run(feed: Feed) -> Given:
            if expected.inputs is not None:
                return expected.run(feed)
            return actual.run({renamed.get(name, name): values for name, values in feed.items()})

        fed = make_feeds(
            tuple(specs.values()),
            count=cases,
            seed=seed,
            vocabulary=min(known, default=None),
            run=run,
        )
    for number, feed in enumerate(fed.cases, start=1):
        for side, own in ((expected, {}), (actual, back)):
            lacking = [
                spec.name for spec in side.inputs or () if own.get(spec.name, spec.name) not in feed
            ]
            if lacking:
                raise UsageError(
                    f"{fed.source}: case {number} has no {listed_names(lacking, _LISTED)}, which"
                    f" {side.title} takes"
                )
    return fed


def _unused_inputs(expected: Side, actual: Side, fed: Fed, renamed: Mapping[str, str]) -> list[str]:
    """Return a note for each fed input that an ONNX side does not take."""
    notes = []
    for side, own in ((expected, {}), (actual, renamed)):
        if side.inputs is not None:
            takes = {spec.name for spec in side.inputs}
            left = [name for name in fed.cases[0] if own.get(name, name) not in takes]
            notes += [f"{side.title} does not take {name}" for name in left]
    return notes


def _limits(precision: str | None, given: Tolerances | None) -> LimitsOf:
    """Return the function that maps the `scale` of values to their limits.

    Raises:
        UsageError: an unknown metric, or a precision without known limits.
    """
    if isinstance(given, str):
        assumed(given, scale=1.0)  # raises for an unknown precision
        return partial(assumed, given)
    own = dict(given or {})
    known = [metric.name for metric in METRICS]
    if unknown := [name for name in own if name not in known]:
        raise UsageError(f"no metric is named {unknown[0]!r}: there are {', '.join(known)}")
    stated = {
        name: limit if isinstance(limit, Limit) else Limit(float(limit), "given")
        for name, limit in own.items()
    }
    precision = precision or DEFAULT_PRECISION
    if precision not in ASSUMED and not own:
        raise UsageError(
            f"no limits are known for {precision} models of other tools: give tolerances, as"
            f" one of {', '.join(ASSUMED)} or by metric"
        )
    base = precision if precision in ASSUMED else DEFAULT_PRECISION
    return lambda *, scale: {**assumed(base, scale=scale), **stated}


# -- meanings --------------------------------------------------------------------------------------


def _same_meaning(expected: Side, actual: Side) -> list[Result]:
    """Compare label names and vocabularies, if both sides have them: numbers do not show those."""
    maps: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = []
    if expected.labels is not None and actual.labels is not None:
        maps.append(("label map", expected.labels, actual.labels))
    if expected.tokenizer is not None and actual.tokenizer is not None:
        maps.append(("vocabulary", _vocabulary(expected.tokenizer), _vocabulary(actual.tokenizer)))
    results = []
    for what, one, other in maps:
        differ = [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]
        message = None
        if differ:
            first = differ[0]
            message = (
                f"the {what} differs in {len(differ)} places: {first!r} is"
                f" {one.get(first)!r} in the reference and {other.get(first)!r} in the candidate"
            )
        results.append(
            Result(
                COMPARED,
                f"{CANDIDATE} {actual.name}",
                adapter=None,
                phase=None,
                outcome=outcome_of(message),
                message=message,
                aspect=what,
            )
        )
    return results


def _vocabulary(file: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    try:
        check_file(file, error=UsageError)
        found: dict[str, int] = Tokenizer.from_file(os.fspath(file)).get_vocab()
    except Exception as problem:  # the library raises nothing narrower
        raise UsageError(f"{file} is not a tokenizer: {first_line(problem)}") from None
    return dict(sorted(found.items(), key=lambda entry: entry[1]))
