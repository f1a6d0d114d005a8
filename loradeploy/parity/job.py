"""Runs a whole check in order: the PyTorch reference once, then the other backends."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import gc
import time
from collections.abc import Mapping, Sequence
from typing import Final

from loradeploy.adapter.files.digest import short
from loradeploy.parity.backends.table import REFERENCE_TITLE, Backend
from loradeploy.parity.checks.check import Progress, adapter_facts, run_backends
from loradeploy.parity.checks.controls import Controls, run_controls
from loradeploy.parity.checks.repeat import second_run
from loradeploy.parity.context import CheckContext
from loradeploy.parity.diagnose.localize import localizations
from loradeploy.parity.diagnose.shrink import shrink_failures
from loradeploy.parity.environment import environment
from loradeploy.parity.inputs.tokens import MOST_TRAINED
from loradeploy.parity.reference.pytorch import (
    Reference,
    load_base,
    load_model,
    make_reference,
    size_of,
    take_weights,
)
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


def run(
    context: CheckContext,
    backends: Sequence[Backend],
    *,
    base_digest: str,
    digests: tuple[str, str | None],
    files: Mapping[str, str],
    seed: int,
    controls: bool,
    shrink: bool,
    held_out: Mapping[str | None, HeldOut],
    localize: bool | None,
    asked: Sequence[str],
) -> ParityReport:
    """Run the reference, then every backend, and return the report.

    At most one PyTorch model is in memory at a time, and none together with an ONNX session.

    `digests`: those of the bundle's graph and of its data file; `files`: digests of its other
    files, by name. `held_out`: the evaluation data of the base (None) and of each adapter.
    `shrink`, `localize`: see `loradeploy.parity`. `asked`: backends that the user requested by
    name; the check fails if one of them is not run.
    """
    started = time.monotonic()
    started_on = start(context.bundle, context.variants)
    context = dataclasses.replace(context, crashed=started_on.crashed)
    running = [one for one in context.variants.each if one.provider not in started_on.crashed]
    if running:  # whatever runs in one variant only uses the first
        context = context.at(running[0])
    logger.info("loading %s", context.model)
    model = load_model(context)
    answered = score_reference(context, model, held_out)
    base = take_weights(context, model)
    logger.info("reference: %s", REFERENCE_TITLE)
    reference = make_reference(context, base)
    made = Controls()
    localized: tuple[Localization, ...] = ()
    smallest: tuple[Counterexample, ...] = ()
    scores: tuple[Score, ...] = ()
    remarks: tuple[str, ...] = ()
    results: list[Result] = []
    nondeterministic = second_run(context, reference, base)
    if nondeterministic is not None:
        results.append(nondeterministic)
    else:
        if controls:
            logger.info("controls")
            made = run_controls(context, reference, base)
        progress = Progress(backends, context)
        in_torch = [backend for backend in backends if backend.on_torch]
        results += run_backends(in_torch, context, reference, base.model, progress)
        large = size_of(model) > _LARGE
        del base, model
        if large:  # a full collection is slow; small models may stay until the next automatic one
            gc.collect()
        in_onnx = [backend for backend in backends if not backend.on_torch]
        results += run_backends(in_onnx, context, reference, None, progress)
        if running:
            scores = score_backends(in_onnx, context, held_out, answered)
        # The base is loaded again only if the diagnosis of a failure needs it.
        again = functools.cache(lambda: load_base(context))
        if localize is not False:
            localized = localizations(
                context, reference, backends, results, again, always=bool(localize)
            )
        if shrink:
            smallest, remarks = shrink_failures(in_onnx, context, reference, results, again)
    manifest, cases = context.manifest, context.cases
    return ParityReport(
        bundle=str(context.bundle),
        task=manifest.task,
        mode=manifest.mode,
        precision=manifest.precision,
        base=manifest.base.name,
        base_digest=base_digest,
        graph_digest=digests[0],
        data_digest=digests[1],
        inputs=Inputs(
            source=cases.source,
            prompts=len(cases.prompts) - cases.fuzz - cases.edges,
            prompt_tokens=sum(map(len, cases.prompts)),
            generated=cases.generated,
            seed=seed,
            fuzz=cases.fuzz,
            edges=cases.edges,
        ),
        environment=environment(started_on.providers),
        created=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        results=tuple(results),
        adapters=adapter_facts(context, reference),
        controls=made.made,
        localizations=localized,
        notes=(
            *_notes(context, reference),
            *started_on.notes,
            *made.notes,
            *remarks,
            *score_notes(context, held_out),
        ),
        seconds=round(time.monotonic() - started, 1),
        files=files,
        counterexamples=smallest,
        scores=scores,
        asked=tuple(asked),
    )


def _notes(context: CheckContext, reference: Reference) -> list[str]:
    """Return the limitations of this check that a reader of the report must know."""
    notes = list(reference.notes)
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
