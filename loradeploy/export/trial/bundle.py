"""Open and run a bundle before it is put in place, and compare it with its source.

    without side inputs         the source's outputs, up to rounding
    side inputs of an adapter   other outputs; for a checkpoint, those of PyTorch with the adapter
    rows of a mixed batch       the same outputs as without the other rows
    a merged graph              other outputs than the source; for a checkpoint, PyTorch's
    required.onnx               the same outputs as model.onnx
    logits_to_keep              the logits of those positions
    logits of a decoder         those of every token, or of the last one only
    inputs_embeds               PyTorch's outputs with the same embeddings
    activations in fixed ranges the effect of each adapter without them, see `ranges.py`

The limits detect errors, not a loss of precision, which `loradeploy.parity` measures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.tasks import CAUSAL_LM, FEATURE_EXTRACTION
from loradeploy.bundle.names import (
    ENCODER_NAME,
    GRAPH_NAME,
    INPUT_IDS,
    INPUTS_EMBEDS,
    LOGITS_TO_KEEP,
    REQUIRED_NAME,
)
from loradeploy.bundle.outputs import output_of
from loradeploy.bundle.sample import Sample
from loradeploy.errors import ExportError
from loradeploy.export.graph.running import NotRunError, Outputs
from loradeploy.export.tasks import own_task
from loradeploy.export.trial.opened import Trial, may_pack, refused
from loradeploy.export.trial.original import Original, run_source_graph
from loradeploy.export.trial.padding import (
    padding_by_trial,
    reads_in_parts,
    sees_later_tokens,
)
from loradeploy.export.trial.ranges import check_ranges
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest
    from loradeploy.bundle.sample import Feeds

logger = logger_of(__name__)

# The largest rounding error, relative to the size of an output. If weights are packed here, the
# source's differ: then only outputs without any resemblance are detected.
_LIMITS: Final = {"fp32": 1e-2, "fp16": 0.1, "bf16": 0.1, "int8": 0.1, "int4": 0.1}
_PACKED_HERE: Final = {"int8": 0.5, "int4": 1.5, "bf16": 0.2}
# Updates are compared by their effect, in precisions that leave it visible.
_UPDATE_LIMITS: Final = {"fp32": 2e-2, "fp16": 0.2}
# Graphs that quantize the activations of a batch together change a row with its neighbors: the
# largest difference of a row, as a multiple of that.
_NOISE: Final = 4.0
_TOKENS_RANK: Final = 3  # of logits [batch, tokens, vocabulary]


@dataclasses.dataclass(frozen=True, eq=False)
class TrialSource:
    """The source that a bundle is compared with.

    `original`: the checkpoint's outputs, if it was run. `graph`: the ONNX file, if the source is
    one; `renamed`: its names of renamed inputs and outputs.
    `quantized_here`: whether the export rounded the weights to the bundle's precision.
    """

    original: Original | None = None
    graph: Path | None = None
    quantized_here: bool = False
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)


def try_bundle(
    directory: Path,
    manifest: Manifest,
    source: TrialSource,
    config: Mapping[str, Any],
    pad: int,
    adapters: Mapping[str, Mapping[str, NDArray[Any]]],
) -> Manifest:
    """Open the bundle in `directory`, compare it with its `source`, and find its padding side.

    `config`: that of the model. `pad`: the padding token. `adapters`: their side inputs.
    Returns the manifest with the padding side. A graph without kernels on the CPU is not tried,
    with a warning.

    Raises:
        ExportError: onnxruntime does not open or run the graph, its outputs are wrong, or a graph
            with the outputs of a decoder is none.
    """
    sample = Sample(manifest.inputs, config, pad=pad)
    # The source is closed before the bundle is opened: both would take twice the memory.
    original = source.original or _source_outputs(source, manifest, sample)
    if source.graph is not None and original is not None:
        _refuse_nan(source.graph, original, output_of(manifest))
    try:
        trial = Trial(directory, manifest)
    except NotRunError as problem:
        if source.graph is not None and original is not None:  # the source can be run
            raise refused(f"onnxruntime cannot open {GRAPH_NAME}: {problem}") from None
        logger.warning("not tried, onnxruntime does not run it on the CPU: %s", problem)
        return manifest
    if original is None:
        trial.run_uncompared(sample)
    else:
        _check(trial, original, quantized_here=source.quantized_here)
        if source.graph is not None:
            check_ranges(trial, directory, sample, adapters, source.graph, source.renamed)
    declared = manifest.traced or own_task(config) == CAUSAL_LM
    if not declared and sees_later_tokens(trial, sample, pad):
        raise ExportError(
            f"the graph of {manifest.base.name} is no decoder: its logits change with the tokens"
            " after theirs, as those of a masked language model do, and no text can be generated"
            f" with it: give `task={FEATURE_EXTRACTION!r}` to run it with AdapterSession.run"
        )
    padding = padding_by_trial(trial, sample, pad)
    if padding is not None:
        manifest = dataclasses.replace(manifest, padding=padding)
    if manifest.traced or reads_in_parts(trial, sample, pad) is not False:
        return manifest
    logger.warning(
        "the graph gives other outputs if it reads several tokens after cached ones: Engine and"
        " loradeploy serve, which read prompts in parts, refuse it; use TextGenerator"
    )
    return dataclasses.replace(manifest, whole_prompts=True)


def _source_outputs(source: TrialSource, manifest: Manifest, sample: Sample) -> Original | None:
    """The outputs of the source's graph for a sample; None if it cannot be run."""
    graph = source.graph
    if graph is None:
        return None
    names = [spec.name for spec in manifest.outputs]
    packed = may_pack(manifest) and not source.quantized_here
    run = partial(run_source_graph, packed=packed)
    try:
        given = run(graph, sample.feeds(), names, source.renamed)
        encoder = graph.parent / ENCODER_NAME
        if manifest.encoder is None or not encoder.is_file():
            return given
        outputs = {**given.outputs, **run(encoder, sample.feeds(), names, {}).outputs}
        return dataclasses.replace(given, outputs=outputs)
    except (NotRunError, TypeError) as problem:  # a dtype that numpy does not have
        logger.warning("not compared with %s, which is not run here: %s", graph.name, problem)
        return None


def _refuse_nan(graph: Path, original: Original, name: str) -> None:
    """Raise ExportError if the source's main output `name` has NaN, with nothing masked."""
    values = original.outputs.get(name)
    if values is not None and values.dtype.kind == "f" and np.isnan(values).any():
        raise ExportError(
            f"{graph} gives NaN as {name} for tokens of a trial: its weights are damaged, or its"
            " numbers are too large for their type"
        )


def _check(trial: Trial, original: Original, *, quantized_here: bool) -> None:
    """Compare the bundle with its `original`.

    Raises:
        ExportError: their outputs differ, or the side inputs have the wrong effect.
    """
    if (added := trial.manifest.added_tokens) is not None and added.output is not None:
        # A source that is a bundle has rows for added tokens too.
        logits = original.outputs[added.output][..., : added.base]
        outputs = {**original.outputs, added.output: logits}
        original = dataclasses.replace(original, outputs=outputs)
    base = trial.run(original.feeds, None)
    for name, expected in original.outputs.items():
        if np.isfinite(expected).all() and not np.isfinite(base[name]).all():
            raise refused(
                f"its output {name} is NaN or infinite on the CPU where the source's is finite"
                f"{_overflow(trial.manifest.precision)}"
            )
    _check_positions(trial, original.feeds, base)
    merged = trial.manifest.mode == "merged"
    adapted = None
    if not merged:
        limits = _PACKED_HERE if quantized_here else _LIMITS
        limit = limits.get(trial.manifest.precision, _LIMITS["fp32"])
        for name, expected in original.outputs.items():
            if (error := _error(base[name], expected)) > limit:
                raise refused(
                    f"its output {name} differs by {error:.2g} of its size from the source's"
                )
        adapted = _check_side_inputs(trial, original.feeds, base)
        _check_required(trial, original.feeds, base)
        if original.embedded is not None:
            _check_embedded(trial, original.embedded, base, limit)
    elif trial.manifest.precision == "fp32" and _same(base, original.outputs):
        changed = original.update is None or not _same(original.update.outputs, original.outputs)
        if changed and any(values.any() for values in original.outputs.values()):
            logger.warning("the merged graph gives the outputs of the base for a sample")
    _check_update(trial, original, base)
    _check_kept(trial, original.feeds, base, adapted)


def _check_positions(trial: Trial, feeds: Feeds, base: Outputs) -> None:
    """Check that a decoder's logits are those of every token, or of the last one only."""
    if trial.manifest.task != CAUSAL_LM or INPUT_IDS not in feeds:
        return
    name, ids = output_of(trial.manifest), feeds[INPUT_IDS]
    logits, tokens = base[name], ids.shape[1]
    positions = 1 if logits.ndim < _TOKENS_RANK else logits.shape[1]
    if positions == tokens:
        return
    if positions != 1:
        raise refused(f"its {name} are of {positions} of {tokens} tokens: export those of all")
    other = ids.copy()
    other[:, -1] += np.where(ids[:, -1] > 0, -1, 1)
    changed = trial.run({**feeds, INPUT_IDS: other}, None)[name]
    if logits.size and np.ptp(logits) and np.array_equal(changed, logits):
        raise refused(
            f"its {name} are of one token and do not depend on the last token: export those of all"
        )


def _check_update(trial: Trial, original: Original, base: Outputs) -> None:
    """Compare the effect of an update with its effect in the source."""
    update = original.update
    limit = _UPDATE_LIMITS.get(trial.manifest.precision)
    if update is None or limit is None:
        return
    if trial.manifest.mode == "merged":
        if update.of is None:
            return
        got = base
    else:
        targets = {target.module: target for target in trial.manifest.targets}
        if not update.factors.keys() <= targets.keys():
            return
        dtype = trial.manifest.factor_dtype
        side_inputs = {}
        for module, (A, B) in update.factors.items():
            target = targets[module]
            for_added = ((0, 0), (0, target.out_features - B.shape[1]))
            side_inputs[target.lora_A] = A[np.newaxis].astype(dtype)
            side_inputs[target.lora_B] = np.pad(B, for_added)[np.newaxis].astype(dtype)
        got = trial.run(original.feeds, side_inputs)
    for name, expected in update.outputs.items():
        before = original.outputs[name]
        finite = np.isfinite(expected) & np.isfinite(before)  # a bias may have -inf on purpose
        effect = _norm(expected[finite] - before[finite])
        size = _norm(expected[finite])
        # An effect near rounding cannot be compared.
        if effect <= limit * size or not np.isfinite(effect):
            continue
        error = _norm(got[name][finite] - expected[finite]) / effect
        if error > limit or not np.isfinite(error):
            raise refused(
                f"with {'the adapter ' + update.of if update.of else 'an adapter'} its output"
                f" {name} differs by {error:.2g} of the adapter's effect from PyTorch's"
            )


def _check_side_inputs(trial: Trial, feeds: Feeds, base: Outputs) -> Outputs | None:
    """Check that random side inputs change their own row only; return the outputs with them."""
    made = trial.random_side_inputs()
    if not made:
        return None
    adapted = trial.run(feeds, made)
    if _same(adapted, base):
        if any(np.ptp(values) for values in base.values() if values.size):
            raise refused("an adapter's side inputs change nothing")
        return adapted
    rows = {values.shape[0] for values in feeds.values() if values.ndim > 1}
    if len(rows) != 1 or (count := rows.pop()) < 2:
        return adapted
    mixed = trial.run(feeds, trial.mixed_with_base(made, count))
    limit = _LIMITS[trial.manifest.precision]
    for name, values in mixed.items():
        if values.ndim < 2 or values.shape[0] != count:
            continue
        for row in range(count):
            alone = (adapted if row == 0 else base)[name][row]
            if (error := _error(values[row], alone)) <= limit:
                continue
            noise = max(
                _noise(trial, feeds, side_inputs, outputs[name], name)
                for side_inputs, outputs in ((None, base), (made, adapted))
            )
            if not _norm(values[row] - alone) <= _NOISE * noise:
                raise refused(
                    f"row {row + 1} of a batch of mixed adapters differs by {error:.2g} of its"
                    f" size from the same row alone, in output {name}"
                )
    return adapted


def _noise(
    trial: Trial,
    feeds: Feeds,
    side_inputs: Outputs | None,
    outputs: NDArray[Any],
    name: str,
) -> float:
    """The largest change of a row of `outputs` if all its neighbors are like itself.

    A single row's can be 0 by chance, if the output is one number.
    """
    changes = []
    for row in range(len(outputs)):
        repeated = {
            n: np.repeat(values[row : row + 1], len(values), axis=0) if values.ndim > 1 else values
            for n, values in feeds.items()
        }
        changes.append(_norm(trial.run(repeated, side_inputs)[name][row] - outputs[row]))
    return max(changes, default=0.0)


def _check_required(trial: Trial, feeds: Feeds, base: Outputs) -> None:
    """Check that required.onnx with the base's side inputs has the outputs of model.onnx."""
    for name, values in (trial.run_required(feeds) or {}).items():
        if (error := _error(values, base[name])) > _LIMITS[trial.manifest.precision]:
            raise refused(
                f"{REQUIRED_NAME}'s {name} differs by {error:.2g} of its size from {GRAPH_NAME}'s"
            )


def _check_embedded(trial: Trial, original: Original, base: Outputs, limit: float) -> None:
    """Check that embeddings instead of tokens give PyTorch's outputs."""
    given = trial.run(original.feeds, None)
    if _same(given, base):
        raise refused(f"its {INPUTS_EMBEDS} change nothing")
    for name, expected in original.outputs.items():
        if (error := _error(given[name], expected)) > limit:
            raise refused(
                f"with {INPUTS_EMBEDS} its output {name} differs by {error:.2g} of its size from"
                " PyTorch's"
            )


def _check_kept(trial: Trial, feeds: Feeds, base: Outputs, adapted: Outputs | None) -> None:
    """Check that logits of selected positions are those of a full run, with and without adapter.

    Each row has other positions. `base`, `adapted`: the outputs for all positions.
    """
    if not trial.manifest.logits_to_keep:
        return
    name = output_of(trial.manifest)
    rows, tokens = feeds[INPUT_IDS].shape
    kept = np.stack([np.arange(rows) % tokens, np.full(rows, -1)], axis=1)  # [rows, 2]
    for outputs, made in ((base, None), (adapted, trial.random_side_inputs())):
        if outputs is None:
            continue
        whole = outputs[name]
        given = trial.run({**feeds, LOGITS_TO_KEEP: kept}, made)[name]
        expected = np.take_along_axis(whole, kept[:, :, np.newaxis] % tokens, axis=1)
        if (error := _error(given, expected)) > _LIMITS[trial.manifest.precision]:
            raise refused(
                f"its {name} at chosen positions are {error:.2g} of their size away from those"
                " of all positions"
            )


def _overflow(precision: str) -> str:
    """Advice about values that are too large for `precision`."""
    return (
        ": float16 ends at 65504, give `precision='fp32'` or `precision='bf16'`"
        if precision == "fp16"
        else ""
    )


def _same(one: Outputs, other: Outputs) -> bool:
    names = one.keys() & other.keys()
    return all(np.array_equal(one[name], other[name], equal_nan=True) for name in names)


def _error(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """‖got − expected‖ / ‖expected‖ over the finite expected values; inf if the shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    real = np.isfinite(expected)
    size = _norm(expected[real])
    error = _norm(got[real].astype(np.float64) - expected[real])
    if not np.isfinite(error):
        return float("inf")
    return error / size if size else error


def _norm(values: NDArray[Any]) -> float:
    return float(np.linalg.norm(values.astype(np.float64).ravel()))
