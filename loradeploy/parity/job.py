"""Runs a whole check in order: the PyTorch reference once, then the other backends."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from loradeploy.adapter.files.digest import short
from loradeploy.parity.backends.table import REFERENCE_TITLE, Backend
from loradeploy.parity.bundle_files import BundleFiles
from loradeploy.parity.checks.check import run_backends
from loradeploy.parity.checks.controls import Controls, run_controls
from loradeploy.parity.checks.effects import adapter_facts
from loradeploy.parity.checks.files.bundle import differing_files, what_is_compared
from loradeploy.parity.checks.repeat import second_run
from loradeploy.parity.checks.runs import Progress
from loradeploy.parity.context import CheckContext
from loradeploy.parity.diagnose.localize import localizations
from loradeploy.parity.diagnose.shrink import shrink_failures
from loradeploy.parity.environment import environment
from loradeploy.parity.inputs.tokens import MOST_TRAINED, Cases
from loradeploy.parity.reference.loading import load_base, load_model, size_of, take_weights
from loradeploy.parity.reference.pytorch import Reference, make_reference
from loradeploy.parity.reference.quantized import QUANTIZED
from loradeploy.parity.report.results import (
    Counterexample,
    Inputs,
    Localization,
    ParityReport,
    Result,
    Score,
)
from loradeploy.parity.score.heldout import HeldOut
from loradeploy.parity.score.scores import score_backends, score_notes, score_reference
from loradeploy.parity.variants import start
from loradeploy.printable import logger_of

logger = logger_of(__name__)

# Size in bytes from which a PyTorch model is freed at once, before onnxruntime's sessions open.
_LARGE: Final = 1 << 26


@dataclass(frozen=True, eq=False)
class _Findings:
    """What the models computed: `results`, and what was found out about those that failed."""

    reference: Reference
    results: Sequence[Result]
    controls: Controls = field(default_factory=Controls)
    scores: tuple[Score, ...] = ()
    localizations: tuple[Localization, ...] = ()
    counterexamples: tuple[Counterexample, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Request:
    """What a check is asked for, besides its context.

    `held_out`: the evaluation data of the base (None) and of each adapter. `asked`: backends that
    the user requested by name; the check fails if one of them is not run. The others are the
    options of `loradeploy.parity`.
    """

    held_out: Mapping[str | None, HeldOut]
    asked: tuple[str, ...]
    seed: int
    controls: bool
    shrink: bool
    localize: bool | None


def run(
    context: CheckContext,
    backends: Sequence[Backend],
    request: Request,
    *,
    base_digest: str,
    files: BundleFiles,
) -> ParityReport:
    """Run the reference, then every backend, and return the report."""
    began = time.monotonic()
    started = start(context.bundle, context.variants)
    context = dataclasses.replace(context, crashed=started.crashed)
    running = [one for one in context.variants.each if one.provider not in started.crashed]
    if running:  # whatever runs in one variant only uses the first
        context = context.at(running[0])
    found = _compare(context, backends, request, scored=bool(running))
    manifest = context.manifest
    return ParityReport(
        bundle=str(context.bundle),
        task=manifest.task,
        mode=manifest.mode,
        precision=manifest.precision,
        base=manifest.base.name,
        base_digest=base_digest,
        graph_digest=files.graph,
        data_digest=files.data,
        inputs=_inputs(context.cases, request.seed),
        environment=environment(started.providers),
        created=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        results=tuple(found.results),
        adapters=adapter_facts(context, found.reference),
        controls=found.controls.made,
        localizations=found.localizations,
        notes=(
            *_notes(context, found.reference),
            *started.notes,
            *found.controls.notes,
            *found.notes,
            *score_notes(context, request.held_out),
        ),
        seconds=round(time.monotonic() - began, 1),
        files=files.others,
        counterexamples=found.counterexamples,
        scores=found.scores,
        asked=request.asked,
    )


def _compare(
    context: CheckContext,
    backends: Sequence[Backend],
    request: Request,
    *,
    scored: bool,
) -> _Findings:
    """Run the reference, then `backends` in PyTorch, then those in ONNX, then the diagnosis.

    At most one PyTorch model is in memory at a time, and none together with an ONNX session.
    """
    logger.info("loading %s", context.model)
    model = load_model(context)
    files = differing_files(context, model)
    answered = score_reference(context, model, request.held_out)
    base = take_weights(context, model)
    logger.info("reference: %s", REFERENCE_TITLE)
    reference = make_reference(context, base)
    nondeterministic = second_run(context, reference, base)
    if nondeterministic is not None:
        return _Findings(reference, [nondeterministic, *files])
    made = Controls()
    if request.controls:
        logger.info("controls")
        made = run_controls(context, reference, base)
    progress = Progress(backends, context)
    in_torch = [backend for backend in backends if backend.on_torch]
    results = list(run_backends(in_torch, context, reference, base.model, progress))
    large = size_of(model) > _LARGE
    del base, model
    if large:  # a full collection is slow; small models may stay until the next automatic one
        gc.collect()
    in_onnx = [backend for backend in backends if not backend.on_torch]
    results += run_backends(in_onnx, context, reference, None, progress)
    scores = score_backends(in_onnx, context, request.held_out, answered) if scored else ()
    # The base is loaded again only if the diagnosis of a failure needs it.
    again = functools.cache(lambda: load_base(context))
    localized: tuple[Localization, ...] = ()
    if request.localize is not False:
        always = bool(request.localize)
        localized = localizations(context, reference, backends, results, again, always=always)
    smallest: tuple[Counterexample, ...] = ()
    remarks: tuple[str, ...] = ()
    if request.shrink:
        smallest, remarks = shrink_failures(in_onnx, context, reference, results, again)
    results += files
    return _Findings(reference, results, made, scores, localized, smallest, remarks)


def _inputs(cases: Cases, seed: int) -> Inputs:
    return Inputs(
        source=cases.source,
        prompts=len(cases.given),
        prompt_tokens=sum(map(len, cases.prompts)),
        generated=cases.generated,
        seed=seed,
        fuzz=cases.fuzz,
        edges=cases.edges,
    )


def _notes(context: CheckContext, reference: Reference) -> list[str]:
    """Return the limitations of this check that a reader of the report must know."""
    notes = [*reference.notes, what_is_compared()]
    manifest = context.manifest
    if manifest.precision in QUANTIZED:
        notes.append(
            f"providers round the activations of {manifest.precision} products differently: the"
            f" verdict applies to {', '.join(context.variants.chains)}, not to other providers"
            f" (`loradeploy parity {context.bundle} --provider NAME` checks one)"
        )
    if not context.adapters:
        notes.append("no adapter is in the bundle or given: only the base was compared")
    if not context.merged and not reference.scale[None]:
        notes.append("all outputs of the base are zero (an untrained head), which proves nothing")
    if manifest.base.kind == "onnx":
        notes.append(
            "the bundle was made from an ONNX file: only the compared values show that it belongs"
            " to the given model"
        )
    if manifest.merge_error is not None:
        error = manifest.merge_error
        notes.append(
            f"{manifest.precision} kept {error.kept:.1%} of the merged update, with rounding noise"
            f" of {error.noise:.2g} times its size"
        )
    if context.cases.unfed:
        notes.append(
            f"{context.cases.unfed} tokens whose embedding or head rows an adapter changed were not"
            f" fed: the maximum is {MOST_TRAINED}"
        )
    claimed = manifest.merged_adapter
    for tested in context.adapters if claimed is not None else ():
        if claimed is not None and claimed.digest != tested.digest:
            notes.append(
                f"the manifest says that the graph contains the adapter {short(claimed.digest)},"
                f" {tested.name} is {short(tested.digest)}"
            )
    return notes
