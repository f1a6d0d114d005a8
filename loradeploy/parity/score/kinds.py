"""What is scored for each adapter of a bundle: its kind of task, and the labels of its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loradeploy.adapter.heads import (
    SINGLE_LABEL,
    check_declared,
    config_labels,
    placeholders,
    problem_of,
    stated_problem,
    usual_problem,
)
from loradeploy.adapter.tasks import (
    CLASSIFICATIONS,
    IMAGE_CLASSIFICATION,
    SEQUENCE_CLASSIFICATION,
)
from loradeploy.bundle.fitting.labels import output_count
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import CONFIG_NAME
from loradeploy.errors import BundleError, UsageError
from loradeploy.parity.report.results import BASE_LABEL

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest
    from loradeploy.parity.context import AdapterUnderTest


def label_names(
    bundle: Path, manifest: Manifest, adapters: Sequence[AdapterUnderTest]
) -> dict[str | None, tuple[str, ...]]:
    """Return the label names of a classifier: the adapter's, else the bundle's, else LABEL_i."""
    if manifest.task not in CLASSIFICATIONS:
        return {None: (), **{tested.name: () for tested in adapters}}
    config = model_config(bundle)
    outputs = output_count(manifest, config)
    own = config_labels(config, CONFIG_NAME, error=BundleError, outputs=outputs) or ()
    if len(own) != outputs:
        own = placeholders(outputs)
    for tested in adapters:
        check_declared(tested.adapter)
    return {None: own, **{tested.name: tested.adapter.labels or own for tested in adapters}}


def kinds_of(
    bundle: Path, manifest: Manifest, adapters: Sequence[AdapterUnderTest]
) -> dict[str | None, str]:
    """Return the kind of task of the base and of each adapter, a key of `MEASURED`."""
    if manifest.task == IMAGE_CLASSIFICATION:
        return _kinds_of_images(bundle, manifest, adapters)
    if manifest.task != SEQUENCE_CLASSIFICATION:
        return dict.fromkeys([None, *(tested.name for tested in adapters)], manifest.task)
    config = model_config(bundle)
    stated = stated_problem(config, CONFIG_NAME, error=BundleError)
    outputs = output_count(manifest, config)
    found: dict[str | None, str] = {None: manifest.problem_type or stated or usual_problem(outputs)}
    for tested in adapters:
        found[tested.name] = problem_of(tested.adapter, stated, outputs)
    return found


def _kinds_of_images(
    bundle: Path, manifest: Manifest, adapters: Sequence[AdapterUnderTest]
) -> dict[str | None, str]:
    """Return the kinds for images, which must have a single label each."""
    stated = stated_problem(model_config(bundle), CONFIG_NAME, error=BundleError) or SINGLE_LABEL
    found: dict[str | None, str] = {None: manifest.problem_type or stated}
    found |= {tested.name: tested.adapter.problem_type or stated for tested in adapters}
    for name, problem in found.items():
        if problem != SINGLE_LABEL:
            raise UsageError(
                f"{name or BASE_LABEL} is a classifier of images of problem_type {problem}, and"
                f" data of images has one label each: only {SINGLE_LABEL} is scored"
            )
    return found
