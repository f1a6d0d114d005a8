"""`loradeploy.parity`: a bundle held against PyTorch, and the verdict."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from loradeploy.errors import UsageError

if TYPE_CHECKING:
    from loradeploy.parity.report import ParityReport


def parity(
    bundle: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | Iterable[str | os.PathLike[str]] | None = None,
    report: Iterable[str | os.PathLike[str]] | str | os.PathLike[str] = (),
    backends: Sequence[str] | None = None,
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    tokens: int | None = None,
    seed: int = 0,
    providers: Sequence[str] | None = None,
    controls: bool = False,
    localise: bool | None = None,
    certificate: bool = True,
) -> ParityReport:
    """Hold every way to run `bundle` against PyTorch, and return what was found.

    The reference is the base model in PyTorch with the adapter as LoRA layers, float32. Whether
    everything agrees is `ParityReport.passed`; a difference is no error.

    Args:
        bundle: a directory that `loradeploy.export` wrote.
        model: the base model's directory; by default the one that the bundle names, if it is here.
        adapters: by name, or a list of "[NAME=]DIR": besides those in the bundle, or the one that a
            merged bundle claims to hold.
        report: files to write, .json, .xml (JUnit), .md or .html.
        backends: names from `loradeploy.parity.backends.BACKENDS`; by default all that it has.
        prompts: a file (one prompt a line, or JSONL with `prompt`, `text` or `messages`), or texts.
        tokens: how many are generated after each prompt; by default `prompts.GENERATED`.
        seed: for the random tokens of a bundle without a tokenizer.
        providers: onnxruntime's execution providers, the CPU's by default.
        controls: make mistakes on purpose as well, and fail unless each is caught.
        localise: look for the first module that diverges, comparing values inside the model and
            the graph: None where something failed, True always, False never.
        certificate: write the verdict into the bundle, as parity.json.

    Raises:
        UsageError: options that do not go together, or an unknown report ending.
        ModelError: the model is missing or is not the bundle's base.
        AdapterError: an adapter is refused, or (AdapterMismatchError) does not fit.
        BundleError: the bundle is broken.
        DataError: the prompts cannot be read.
        MissingDependencyError: torch or transformers is not installed.
    """
    import tempfile
    from pathlib import Path

    from loradeploy.bundle.manifest import read_manifest
    from loradeploy.parity.backends import choose_backends
    from loradeploy.parity.inputs import make_cases
    from loradeploy.parity.job import run, write
    from loradeploy.parity.setting import Setting, find_model, find_subjects, graph_digests
    from loradeploy.parity.writers import check_reports

    place = Path(bundle)
    files = check_reports([report] if isinstance(report, str | os.PathLike) else report)
    manifest = read_manifest(place)
    chosen = choose_backends(manifest.mode, backends)
    if not chosen:
        raise UsageError("no backends are given: nothing would be compared")
    subjects = find_subjects(place, manifest, adapters)
    digests = graph_digests(place, manifest)
    directory, base = find_model(place, manifest, model)
    cases = make_cases(place, manifest, prompts=prompts, generated=tokens, seed=seed)
    with tempfile.TemporaryDirectory(prefix="loradeploy-parity-") as scratch:
        setting = Setting(
            bundle=place,
            manifest=manifest,
            model=directory,
            subjects=subjects,
            cases=cases,
            scratch=Path(scratch),
            providers=None if providers is None else tuple(providers),
        )
        found = run(
            setting,
            chosen,
            base_digest=base,
            digests=digests,
            seed=seed,
            controls=controls,
            localise=localise,
        )
    return write(found, files, place if certificate else None)
