"""The order of a check: PyTorch first, once, then ONNX Runtime; then what is written."""

from __future__ import annotations

import dataclasses
import datetime as dt
import gc
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from loradeploy.adapter.digest import short
from loradeploy.bundle.certificate import FILES
from loradeploy.bundle.certificate import digests as file_digests
from loradeploy.bundle.names import CERTIFICATE_NAME
from loradeploy.files import write_json
from loradeploy.parity.backends import REFERENCE_TITLE, Backend
from loradeploy.parity.check import adapter_facts, run_backends
from loradeploy.parity.controls import run_controls
from loradeploy.parity.environment import environment
from loradeploy.parity.localise import localisations
from loradeploy.parity.report import Control, Inputs, Localisation, ParityReport
from loradeploy.parity.setting import Setting
from loradeploy.parity.torch_side import Reference, load_base, make_reference
from loradeploy.parity.writers import write_report

logger = logging.getLogger(__name__)


def run(
    setting: Setting,
    backends: Sequence[Backend],
    *,
    base_digest: str,
    digests: tuple[str, str | None],
    seed: int,
    controls: bool,
    localise: bool | None = None,
) -> ParityReport:
    """The reference, then every backend. One PyTorch model at a time, and none beside ONNX's.

    `digests`: of the bundle's graph and of its data file. `localise`: see `loradeploy.parity`.
    """
    started = time.monotonic()
    logger.info("loading %s", setting.model)
    base = load_base(setting)
    logger.info("reference: %s", REFERENCE_TITLE)
    reference = make_reference(setting, base)
    made: tuple[Control, ...] = ()
    if controls:
        logger.info("controls")
        made = run_controls(setting, reference, base.model)
    in_torch = [backend for backend in backends if backend.on_torch]
    results = run_backends(in_torch, setting, reference, base.model)
    del base
    gc.collect()
    in_onnx = [backend for backend in backends if not backend.on_torch]
    results += run_backends(in_onnx, setting, reference, None)
    places: tuple[Localisation, ...] = ()
    if localise is not False:
        places = localisations(setting, reference, backends, results, always=bool(localise))
    manifest, cases = setting.manifest, setting.cases
    return ParityReport(
        bundle=str(setting.bundle),
        task=manifest.task,
        mode=manifest.mode,
        precision=manifest.precision,
        base=manifest.base.name,
        base_digest=base_digest,
        graph_digest=digests[0],
        data_digest=digests[1],
        inputs=Inputs(
            source=cases.source,
            prompts=len(cases.prompts),
            prompt_tokens=sum(map(len, cases.prompts)),
            generated=cases.generated,
            seed=seed,
        ),
        environment=environment(setting.providers),
        created=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        results=tuple(results),
        adapters=adapter_facts(setting, reference),
        controls=made,
        localisations=places,
        notes=tuple(_notes(setting, reference)),
        seconds=round(time.monotonic() - started, 1),
        files=file_digests(setting.bundle, FILES),
    )


def write(report: ParityReport, files: Sequence[Path], bundle: Path | None) -> ParityReport:
    """Write the certificate into `bundle`, unless it is None, and the reports to `files`.

    A bundle that cannot be written to gets no certificate, and the report says so.
    """
    if bundle is not None:
        try:
            write_json(bundle / CERTIFICATE_NAME, report.to_json())
        except OSError as problem:
            said = f"no certificate was written: {problem.strerror or problem}"
            report = dataclasses.replace(report, notes=(*report.notes, said))
    for file in files:
        write_report(report, file)
    return report


def _notes(setting: Setting, reference: Reference) -> list[str]:
    """What the reader of the verdict must know besides."""
    notes = list(reference.notes)
    manifest = setting.manifest
    if not setting.subjects:
        notes.append("no adapter is in the bundle or given: only the base was compared")
    if not setting.merged and not reference.scale[None]:
        notes.append("the base gives zeros alone (a head that is not trained): it proves nothing")
    if manifest.base.kind == "onnx":
        notes.append(
            "the bundle was made from an ONNX file: that it is the given model's, its numbers tell"
        )
    claimed = manifest.merged_adapter
    for subject in setting.subjects if claimed is not None else ():
        if claimed is not None and claimed.digest != subject.digest:
            notes.append(
                f"the manifest says that the graph holds the adapter {short(claimed.digest)},"
                f" {subject.name} is {short(subject.digest)}"
            )
    return notes
