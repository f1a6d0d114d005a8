"""Check that the fields of a manifest do not contradict each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loradeploy.adapter.fitting.towers import TOWERS
from loradeploy.adapter.heads import PROBLEM_TYPES
from loradeploy.adapter.tasks import TASKS
from loradeploy.bundle.fields import LARGEST
from loradeploy.bundle.names import (
    LAYOUTS,
    LEFT,
    LORA_OPERATORS,
    MANIFEST_NAME,
    NO_PADDING,
    OPERATORS,
    RIGHT,
    SLOTS,
)
from loradeploy.bundle.run_target import BY_TARGET
from loradeploy.bundle.targets import check_names, check_slices, check_specs, check_stored
from loradeploy.errors import BundleError, shortened, shown

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import EncoderGraph, Manifest
    from loradeploy.bundle.targets import AddedTokens, LoraTarget


def check_consistency(manifest: Manifest) -> None:
    """Raise BundleError if fields contradict each other."""
    _check_choices(manifest)
    _check_operators(manifest)
    check_specs("inputs", manifest.inputs)
    check_specs("outputs", manifest.outputs)
    given = manifest.probabilities
    if given is not None and given not in {spec.name for spec in manifest.outputs}:
        raise BundleError(f"{MANIFEST_NAME}: probabilities is {shown(given)}, not an output")
    if manifest.encoder is not None:
        _check_encoder(manifest, manifest.encoder)
    for target in manifest.targets:
        _check_target(target)
    check_slices(manifest.targets)
    for saved in manifest.saved:
        if saved.transposed and len(saved.shape) < 2:
            raise BundleError(
                f"{MANIFEST_NAME}: {shortened(saved.parameter)} has no axes to transpose"
            )
    for output in manifest.changed:
        if not 0 < output.size <= LARGEST:
            raise BundleError(
                f"{MANIFEST_NAME}: the size of {shortened(output.module)} is {shown(output.size)},"
                " not positive or too large"
            )
    if manifest.added_tokens is not None:
        _check_added(manifest, manifest.added_tokens)
    _check_side_inputs(manifest)


def _check_choices(manifest: Manifest) -> None:
    """Raise BundleError if a field is not one of the values that it may have."""
    if manifest.task not in TASKS:
        raise BundleError(f"{MANIFEST_NAME}: the task {shown(manifest.task)} is not one of {TASKS}")
    if manifest.factor_dtype not in ("float32", "float16"):
        raise BundleError(f"{MANIFEST_NAME}: factor_dtype is {shown(manifest.factor_dtype)}")
    if manifest.layout not in LAYOUTS:
        raise BundleError(
            f"{MANIFEST_NAME}: layout is {shown(manifest.layout)}, not one of {LAYOUTS}"
        )
    if manifest.target is not None and manifest.target not in BY_TARGET:
        raise BundleError(
            f"{MANIFEST_NAME}: target {shown(manifest.target)} is not one of {', '.join(BY_TARGET)}"
        )
    if manifest.padding not in (LEFT, RIGHT, NO_PADDING):
        raise BundleError(
            f"{MANIFEST_NAME}: padding is {shown(manifest.padding)}, not left, right or none"
        )
    if manifest.tower not in (None, *TOWERS):
        raise BundleError(f"{MANIFEST_NAME}: tower is {shown(manifest.tower)}, not text or image")
    entries = [*manifest.adapters.values(), *filter(None, [manifest.merged_adapter])]
    for problem_type in (manifest.problem_type, *(entry.problem_type for entry in entries)):
        if problem_type not in (None, *PROBLEM_TYPES):
            raise BundleError(f"{MANIFEST_NAME}: problem_type is {shown(problem_type)}")


def _check_target(target: LoraTarget) -> None:
    """Raise BundleError if a size is not plausible, or the weight is not stored in these sizes."""
    for size in (target.in_features, target.out_features):
        if not 0 < size <= LARGEST:
            raise BundleError(
                f"{MANIFEST_NAME}: a size of {shortened(target.module)} is {shown(size)}, not"
                " positive or too large"
            )
    if not 0 < target.experts <= LARGEST:
        raise BundleError(
            f"{MANIFEST_NAME}: the experts of {shortened(target.module)} are"
            f" {shown(target.experts)}"
        )
    if target.stored is not None:
        check_stored(target, target.stored)


def _check_side_inputs(manifest: Manifest) -> None:
    """Raise BundleError if two share a name, or a merged graph has any."""
    side_inputs = [*manifest.factors]
    side_inputs += [s.input for s in manifest.saved]
    side_inputs += [name for o in manifest.changed for name in (o.scale, o.offset) if name]
    if len(set(side_inputs)) != len(side_inputs):
        raise BundleError(
            f"{MANIFEST_NAME}: two targets share the name of a side input: export again"
        )
    check_names(manifest.targets, manifest.changed, manifest.saved)
    if manifest.mode == "merged" and (side_inputs or manifest.adapters):
        raise BundleError(f"{MANIFEST_NAME}: a merged graph has no side inputs and no adapters")


def _check_encoder(manifest: Manifest, encoder: EncoderGraph) -> None:
    """Raise BundleError unless the encoder has some, but not all, of the inputs and outputs."""
    for what, own, specs in (
        ("inputs", encoder.inputs, manifest.inputs),
        ("outputs", encoder.outputs, manifest.outputs),
    ):
        names = [spec.name for spec in specs]
        if not own or not set(own) < set(names) or len(set(own)) != len(own):
            raise BundleError(
                f"{MANIFEST_NAME}: encoder.{what} is {shown(list(own))}: expected some of"
                f" {shown(names)}"
            )
    if manifest.branches or manifest.cache_in_place:
        raise BundleError(
            f"{MANIFEST_NAME}: an encoder-decoder cannot have branches or a cache in place"
        )


def _check_added(manifest: Manifest, added: AddedTokens) -> None:
    """Raise BundleError unless the graph has the rows of `added` and an offset to hide tokens."""
    sizes = {
        t.module: (t.in_features, t.out_features)[t.kind == "linear"] for t in manifest.targets
    }
    offsets = {o.module: o.size for o in manifest.changed if o.offset is not None}
    tables = {added.embedding} if added.head is None else {added.embedding, added.head}
    if (
        added.base < 1
        or added.count < 1
        or any(sizes.get(module) != added.size for module in tables)
        or (added.head is None) is not (added.output is None)
        or (added.output is not None and offsets.get(added.output) != added.size)
    ):
        raise BundleError(
            f"{MANIFEST_NAME}: added_tokens states {shown(added.count)} rows after"
            f" {shown(added.base)}, which the layers of the graph do not have"
        )


def _check_operators(manifest: Manifest) -> None:
    """Raise BundleError for operators that are unknown, or that the graph's form excludes."""
    unknown = [name for name in manifest.operators if name not in OPERATORS]
    if unknown:
        raise BundleError(
            f"{MANIFEST_NAME}: the operator {shown(unknown[0])} is not one of"
            f" {', '.join(OPERATORS)}"
        )
    if manifest.operators and manifest.encoder is not None:
        raise BundleError(f"{MANIFEST_NAME}: operators are for one graph, not for an encoder's too")
    low_rank = [name for name in manifest.operators if name in LORA_OPERATORS]
    if low_rank and (
        manifest.mode == "merged" or manifest.layout != SLOTS or manifest.factor_dtype != "float32"
    ):
        raise BundleError(
            f"{MANIFEST_NAME}: {low_rank[0]} is for float32 side inputs in the layout {SLOTS!r}"
        )
