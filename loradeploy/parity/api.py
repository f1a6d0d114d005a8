"""`loradeploy.parity`: compares a bundle with PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from loradeploy.errors import UsageError
from loradeploy.parity.inputs.prompts import EXAMPLES
from loradeploy.paths import takes_paths

if TYPE_CHECKING:
    from loradeploy.parity.backends.others import Others
    from loradeploy.parity.inputs.tokens import Prompts
    from loradeploy.parity.report.results import ParityReport
    from loradeploy.parity.score.heldout import DataByAdapter
    from loradeploy.runtime.devices.providers import Provider


@takes_paths(
    "bundle", "model", "adapters", "report", "operator", "genai_python", "sign", "baseline"
)
def parity(
    bundle: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | Iterable[str | os.PathLike[str]] | None = None,
    report: Iterable[str | os.PathLike[str]] | str | os.PathLike[str] = (),
    backends: Sequence[str] | None = None,
    phases: Sequence[str] | None = None,
    prompts: Prompts | None = None,
    tokens: int | None = None,
    seed: int = 0,
    fuzz: int = 0,
    providers: Sequence[Provider] | None = None,
    optimization: Sequence[str] | None = None,
    capture_graphs: bool = False,
    operator: str | os.PathLike[str] | None = None,
    genai_python: str | os.PathLike[str] | None = None,
    controls: bool = False,
    shrink: bool = True,
    evaluate: DataByAdapter | None = None,
    examples: int = EXAMPLES,
    localize: bool | None = None,
    certificate: bool = True,
    sign: str | os.PathLike[str] | None = None,
    others: Others = (),
    baseline: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> ParityReport:
    """Compare every backend that can run `bundle` with PyTorch, and return the report.

    The reference is the base model in PyTorch with the adapter as LoRA layers, in float32.
    `ParityReport.passed` says whether everything agrees; a difference does not raise an error.

    Args:
        bundle: a directory that `loradeploy.export` wrote.
        model: the base model's directory; by default the one that the bundle names, if it is
            available.
        adapters: adapters by name, or a list of "[NAME=]DIR", in addition to those in the bundle.
            For a merged bundle: the one adapter that is merged into it.
        report: files to write, .json, .xml (JUnit), .md or .html.
        backends: names from the table of backends in docs/parity.md; by default all that the bundle
            has and that can run here.
        phases: names such as "prefill" or "chunked prefill"; by
            default all that the task has.
        prompts: a file (one prompt a line, or JSONL with `prompt`, `text`, `text` and `text_pair`,
            or `messages`), or a list of texts, pairs of texts, and objects of the same form.
        tokens: number of generated tokens after each prompt; by default `prompts.GENERATED`.
        seed: seed of random tokens: those of `fuzz`, and those for a bundle without a tokenizer.
        fuzz: number of additional rows of random tokens.
        providers: execution providers as `AdapterSession` takes them, such as "cuda", "cuda:1" or
            ("cuda", {"use_tf32": 1}); the graphs run on each, with its fallback providers; task
            metrics are computed, and `others` run, on the first. The CPU by default.
        optimization: levels of onnxruntime's graph optimization; the graphs run at each: "disable",
            "basic", "extended" or "all"; "all" by default.
        capture_graphs: also check captured runs, on the providers that support them (CUDA graphs,
            `AdapterSession(…, capture_graphs=True)`). An adapter without a replayed run is not
            certified for captured runs.
        operator: also check the bundle with this library of the operator, on the CPU
            (`AdapterSession(…, operator=…)`).
        genai_python: the Python interpreter that has onnxruntime-genai; by default this one, if it
            has it.
        controls: also run negative controls (deliberate mistakes); fail unless each is caught.
        shrink: if a backend fails, search for the smallest input that still fails.
        evaluate: held-out data to compute the task metrics on (accuracy, F1, RMSE and correlations,
            perplexity), in the formats of training data; or one per adapter, as a mapping by name
            or a list of "NAME=DATA".
        examples: number of examples to sample from the data.
        localize: search for the first module that diverges, comparing values inside the model and
            the graph. None: if something failed; True: always; False: never.
        certificate: write the verdict into the bundle, as parity.json.
        sign: a PEM file with an ed25519 key. If the check passes, the signature is written to
            parity.json.sig.
        others: other models to compare with PyTorch (see docs/parity.md).
        baseline: an earlier report (JSON); the check fails if a metric got worse.
        trust_remote_code: run the Python files that the config of `model` names, which can do
            anything. By default, such a model is refused. Does not apply to a model that the bundle
            names.

    Raises:
        UsageError: options that cannot be combined, an unknown report file extension, or a baseline
            that is not comparable.
        ModelError: the model is missing or is not the bundle's base.
        AdapterError: an adapter is refused, or (AdapterMismatchError) does not fit.
        BundleError: the bundle is broken.
        OperatorError: as `AdapterSession`.
        DataError: the prompts or the held-out data cannot be read, or are for another task.
        MissingDependencyError: torch or transformers is not installed.
    """
    from pathlib import Path

    from loradeploy.bundle.manifest import check_is_bundle, read_manifest
    from loradeploy.disk import scratch_directory
    from loradeploy.lora.base.loading import custom_code
    from loradeploy.parity.backends.others import other_backends
    from loradeploy.parity.backends.table import default_backends
    from loradeploy.parity.bundle_files import BundleFiles
    from loradeploy.parity.context import (
        CheckContext,
        digest_of_base,
        find_adapters,
        find_model,
    )
    from loradeploy.parity.inputs.row_feeds import check_inputs
    from loradeploy.parity.inputs.tokens import make_cases
    from loradeploy.parity.inputs.trained import trained_tokens
    from loradeploy.parity.job import Request, run
    from loradeploy.parity.phases.outputs import check_shape
    from loradeploy.parity.plan import make_plan
    from loradeploy.parity.report.baseline import check_comparable
    from loradeploy.parity.report.finish import Ending, finish
    from loradeploy.parity.score.heldout import check_data, read_held_out, with_types
    from loradeploy.parity.score.scores import check_scored
    from loradeploy.snapshot import Snapshot

    if trust_remote_code and model is None:
        raise UsageError(
            "`trust_remote_code` needs `model`: a bundle may name any model as its base"
        )
    path = Path(bundle)
    ending = Ending.of(report, baseline, bundle=path if certificate else None, sign=sign)
    check_is_bundle(path)
    snapshot = Snapshot.take(path)
    manifest = read_manifest(path)
    check_inputs(manifest)
    check_shape(manifest)
    plan = make_plan(
        path,
        manifest,
        backends=backends,
        phases=phases,
        providers=providers,
        optimization=optimization,
        capture_graphs=capture_graphs,
        operator=operator,
        genai_python=genai_python,
    )
    if evaluate is not None:
        check_scored(plan.backends, manifest.precision)
    tested = find_adapters(path, manifest, adapters)
    check_data(manifest, tested, evaluate, examples)
    chosen = plan.backends + other_backends(others, manifest, tested, plan.providers)
    with custom_code(trust_remote_code), scratch_directory("loradeploy-parity-") as scratch:
        directory = find_model(path, manifest, model)
        cases = make_cases(
            path,
            manifest,
            prompts=prompts,
            generated=tokens,
            seed=seed,
            fuzz=fuzz,
            trained=trained_tokens([each.adapter for each in tested], directory),
        )
        held_out = read_held_out(
            path, manifest, directory, tested, evaluate, examples=examples, seed=seed
        )
        # What takes long is last: the weights are read for their digests.
        base_digest = digest_of_base(path, manifest, directory)
        if ending.baseline is not None:
            check_comparable(
                ending.baseline,
                base=manifest.base.name,
                base_digest=base_digest,
                task=manifest.task,
                mode=manifest.mode,
                precision=manifest.precision,
            )
        files = BundleFiles.read(manifest, snapshot)
        context = CheckContext(
            bundle=path,
            manifest=manifest,
            model=directory,
            adapters=tested,
            cases=with_types(cases, held_out),
            scratch=scratch,
            providers=plan.providers,
            variants=plan.variants,
            phases=plan.phases,
            genai_python=plan.genai_python,
        )
        running = default_backends(chosen, context, plan.requested)
        request = Request(held_out, tuple(backends or ()), seed, controls, shrink, localize)
        found = run(context, running, request, base_digest=base_digest, files=files)
    files.check_unchanged()
    return finish(found, ending)
