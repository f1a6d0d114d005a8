"""A bundle is opened and run before it is handed over, and held against what it was made from.

    idle side inputs            give what the source gives, within rounding
    side inputs of an adapter   change the answer; of a checkpoint, to what PyTorch gives with them
    rows of one batch           are each what they are alone
    a merged graph              gives something else than its source; of a checkpoint, PyTorch's
    required.onnx               gives the same as model.onnx
    logits_to_keep              gives what all positions give there
    inputs_embeds               give what PyTorch gives, which takes them in its own way

The limits catch what is wrong, not what is coarse: how close a bundle comes is parity's to tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.files.tensors import read_arrays
from loradeploy.bundle.adapter_inputs.changes import change_inputs
from loradeploy.bundle.adapter_inputs.factors import branch_choice
from loradeploy.bundle.fitting.added_tokens import hidden_logit
from loradeploy.bundle.names import (
    ADAPTER_IDS,
    DEFAULTS_NAME,
    ENCODER_NAME,
    GRAPH_NAME,
    INPUT_IDS,
    INPUTS_EMBEDS,
    LOGITS_TO_KEEP,
    REQUIRED_NAME,
    SLOTS,
)
from loradeploy.bundle.outputs import output_of
from loradeploy.bundle.sample import Sample
from loradeploy.errors import BundleError, ExportError
from loradeploy.export.graph.running import NotRunError, Outputs, open_graph, run_graph, run_graphs
from loradeploy.export.passes.forms.required import BASE_INPUTS_NAME
from loradeploy.export.trial.original import Original, made_factors, of_graph
from loradeploy.export.trial.padding import padding_by_trial
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest
    from loradeploy.bundle.sample import Feeds

logger = logger_of(__name__)

# The largest error that is rounding, relative to the size of an output. Where weights are packed
# here, the source has other numbers: then only what is no answer at all is told.
_LIMITS: Final = {"fp32": 1e-2, "fp16": 0.1, "bf16": 0.1, "int8": 0.1, "int4": 0.1}
_PACKED_HERE: Final = {"int8": 0.5, "int4": 1.5, "bf16": 0.2}
# Updates are compared by what they change, where the precision leaves that visible.
_UPDATE_LIMITS: Final = {"fp32": 2e-2, "fp16": 0.2}
_UPDATE_SCALE: Final = 0.05


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """What a bundle is held against.

    `original`: what the checkpoint gives, where it was run. `graph`: the ONNX file instead, and
    what `renamed` inputs and outputs are called there.
    `quantized_here`: whether the weights were rounded to the bundle's precision on the way.
    """

    original: Original | None = None
    graph: Path | None = None
    quantized_here: bool = False
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)


def try_bundle(
    directory: Path, manifest: Manifest, source: Source, config: Mapping[str, Any], pad: int
) -> Manifest:
    """Open the bundle that lies in `directory`, hold it against its `source`; find its padding.

    `config`: that of the model. `pad`: the token that fills rows up. Returns the manifest with the
    padding in it. What the CPU has no kernels for is told and left.

    Raises:
        ExportError: onnxruntime does not open or run the graph, or it does not give what it should.
    """
    sample = Sample(manifest.inputs, config, pad=pad)
    # The source is closed again before the bundle is opened: two would take twice the memory.
    original = source.original or _given_by(source, manifest, sample)
    try:
        trial = Trial(directory, manifest)
    except NotRunError as problem:
        if source.graph is not None and original is not None:  # the source does run
            raise _refused(f"onnxruntime cannot open {GRAPH_NAME}: {problem}") from None
        logger.warning("not tried, onnxruntime does not run it on the CPU: %s", problem)
        return manifest
    if original is None:
        trial.try_alone(sample)
    else:
        trial.check(original, quantized_here=source.quantized_here)
    padding = padding_by_trial(trial, sample, pad)
    return manifest if padding is None else dataclasses.replace(manifest, padding=padding)


def _given_by(source: Source, manifest: Manifest, sample: Sample) -> Original | None:
    """What the source's graph gives for a sample; None where it is not run."""
    graph = source.graph
    if graph is None:
        return None
    names = [spec.name for spec in manifest.outputs]
    try:
        given = of_graph(graph, sample.feeds(), names, source.renamed)
        encoder = graph.parent / ENCODER_NAME
        if manifest.encoder is None or not encoder.is_file():
            return given
        outputs = {**given.outputs, **of_graph(encoder, sample.feeds(), names, {}).outputs}
        return dataclasses.replace(given, outputs=outputs)
    except (NotRunError, TypeError) as problem:  # a dtype that numpy does not have
        logger.warning("not compared with %s, which is not run here: %s", graph.name, problem)
        return None


class Trial:
    """A bundle in `directory`, opened; `manifest` says what it is.

    Raises:
        NotRunError: onnxruntime has no kernel on the CPU for what the graph needs.
        ExportError: onnxruntime does not open the graph.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._directory = directory
        self.names = [spec.name for spec in manifest.outputs]
        files = [GRAPH_NAME] if manifest.encoder is None else [ENCODER_NAME, GRAPH_NAME]
        self._sessions = [_opened(directory / file) for file in files]

    def run(
        self, feeds: Mapping[str, NDArray[Any]], side_inputs: Mapping[str, NDArray[Any]] | None
    ) -> Outputs:
        """The outputs for `feeds`, of the base or with `side_inputs`.

        Raises:
            ExportError: onnxruntime does not run it.
        """
        chosen = {} if side_inputs is None else {**side_inputs, **branch_choice(self.manifest)}
        try:
            outputs = run_graphs(self._sessions, {**feeds, **chosen}, self.names)
        except NotRunError as problem:
            raise _refused(f"onnxruntime opens it and cannot run it: {problem}") from None
        self._check_ranks(outputs)
        return self._of_base(outputs)

    def _check_ranks(self, outputs: Outputs) -> None:
        """Refuse outputs of another rank than the graph declares, which onnxruntime lets pass."""
        for spec in self.manifest.outputs:
            rank = outputs[spec.name].ndim
            if rank != len(spec.shape):
                raise _refused(
                    f"its output {spec.name} has {rank} axes, and the graph declares"
                    f" {list(spec.shape)}: correct the shape that the source declares"
                )

    def _of_base(self, outputs: Outputs) -> Outputs:
        """`outputs` with the logits of the base's own tokens, as the source gives them.

        Of added tokens nothing here has any: the base and made side inputs hide them all.
        """
        added = self.manifest.added_tokens
        if added is None or added.output not in outputs:
            return outputs
        logits = outputs[added.output]
        if (logits[..., added.base :] > hidden_logit(self.manifest.factor_dtype) / 2).any():
            raise _refused(f"its {added.output} do not hide the tokens that the base does not have")
        return {**outputs, added.output: logits[..., : added.base]}

    def try_alone(self, sample: Sample) -> None:
        """Run the bundle where there is nothing to hold it against, if a sample can be made."""
        try:
            feeds = sample.feeds()
            run_graphs(self._sessions, feeds, self.names)
        except (NotRunError, TypeError) as problem:
            logger.warning("opened, not run: no sample could be made for it (%s)", problem)

    def check(self, original: Original, *, quantized_here: bool) -> None:
        """Hold the bundle against its `original`.

        Raises:
            ExportError: they do not agree, or the side inputs do not do what they are for.
        """
        if (added := self.manifest.added_tokens) is not None and added.output is not None:
            # A bundle that it is made of has rows for added tokens too.
            logits = original.outputs[added.output][..., : added.base]
            outputs = {**original.outputs, added.output: logits}
            original = dataclasses.replace(original, outputs=outputs)
        base = self.run(original.feeds, None)
        for name, expected in original.outputs.items():
            if np.isfinite(expected).all() and not np.isfinite(base[name]).all():
                raise _refused(
                    f"its output {name} is NaN or infinite on the CPU where the source's is finite"
                    f"{_overflow(self.manifest.precision)}"
                )
        merged = self.manifest.mode == "merged"
        adapted = None
        if not merged:
            limits = _PACKED_HERE if quantized_here else _LIMITS
            limit = limits.get(self.manifest.precision, _LIMITS["fp32"])
            for name, expected in original.outputs.items():
                if (error := _error(base[name], expected)) > limit:
                    raise _refused(
                        f"its output {name} is {error:.2g} of its size away from the source's"
                    )
            adapted = self._check_side_inputs(original.feeds, base)
            self._check_required(original.feeds, base)
            if original.embedded is not None:
                self._check_embedded(original.embedded, base, limit)
        elif self.manifest.precision == "fp32" and _same(base, original.outputs):
            changed = original.update is None or not _same(
                original.update.outputs, original.outputs
            )
            if changed and any(values.any() for values in original.outputs.values()):
                logger.warning("the merged graph answers a sample as the base does")
        self._check_update(original, base)
        self._check_kept(original.feeds, base, adapted)

    def _check_update(self, original: Original, base: Outputs) -> None:
        """What an update changes, against what it changes in the source."""
        update = original.update
        limit = _UPDATE_LIMITS.get(self.manifest.precision)
        if update is None or limit is None:
            return
        if self.manifest.mode == "merged":
            if update.of is None:
                return
            got = base
        else:
            targets = {target.module: target for target in self.manifest.targets}
            if not update.factors.keys() <= targets.keys():
                return
            dtype = self.manifest.factor_dtype
            side_inputs = {}
            for module, (A, B) in update.factors.items():
                target = targets[module]
                for_added = ((0, 0), (0, target.out_features - B.shape[1]))
                side_inputs[target.lora_A] = A[np.newaxis].astype(dtype)
                side_inputs[target.lora_B] = np.pad(B, for_added)[np.newaxis].astype(dtype)
            got = self.run(original.feeds, side_inputs)
        for name, expected in update.outputs.items():
            effect = _norm(expected - original.outputs[name])
            size = _norm(expected)
            # An effect that is near rounding tells nothing.
            if effect <= limit * size or not np.isfinite(effect):
                continue
            if (error := _norm(got[name] - expected) / effect) > limit or not np.isfinite(error):
                raise _refused(
                    f"with {'the adapter ' + update.of if update.of else 'an adapter'} its output"
                    f" {name} is {error:.2g} of the adapter's effect away from PyTorch's"
                )

    def _check_side_inputs(self, feeds: Feeds, base: Outputs) -> Outputs | None:
        """Made side inputs change their own row, and no other; what is given with them in all."""
        made = self.made_side_inputs()
        if not made:
            return None
        adapted = self.run(feeds, made)
        if _same(adapted, base):
            if any(np.ptp(values) for values in base.values() if values.size):
                raise _refused("an adapter's side inputs change nothing")
            return adapted
        rows = {values.shape[0] for values in feeds.values() if values.ndim > 1}
        if len(rows) != 1 or (count := rows.pop()) < 2:
            return adapted
        mixed = self.run(feeds, self._beside_base(made, count))
        limit = _LIMITS[self.manifest.precision]
        for name, values in mixed.items():
            if values.ndim < 2 or values.shape[0] != count:
                continue
            for row in range(count):
                alone = (adapted if row == 0 else base)[name][row]
                if (error := _error(values[row], alone)) > limit:
                    raise _refused(
                        f"row {row + 1} of a batch of mixed adapters is {error:.2g} of its size"
                        f" away from what it is alone, in its output {name}"
                    )
        return adapted

    def _check_required(self, feeds: Feeds, base: Outputs) -> None:
        """required.onnx with the base's side inputs gives what model.onnx gives."""
        file = self._directory / REQUIRED_NAME
        if not file.is_file():
            return
        defaults, _ = read_arrays(self._directory / BASE_INPUTS_NAME, error=BundleError)
        session = _opened(file)
        try:
            given = self._of_base(run_graph(session, {**feeds, **defaults}, self.names))
        except NotRunError as problem:
            raise _refused(f"onnxruntime cannot run its {REQUIRED_NAME}: {problem}") from None
        for name, values in given.items():
            if (error := _error(values, base[name])) > _LIMITS[self.manifest.precision]:
                raise _refused(
                    f"{REQUIRED_NAME}'s {name} is {error:.2g} of its size away from {GRAPH_NAME}'s"
                )

    def _check_embedded(self, original: Original, base: Outputs, limit: float) -> None:
        """Embeddings instead of tokens are read as PyTorch reads them."""
        given = self.run(original.feeds, None)
        if _same(given, base):
            raise _refused(f"its {INPUTS_EMBEDS} change nothing")
        for name, expected in original.outputs.items():
            if (error := _error(given[name], expected)) > limit:
                raise _refused(
                    f"with {INPUTS_EMBEDS} its output {name} is {error:.2g} of its size away from"
                    " PyTorch's"
                )

    def _check_kept(self, feeds: Feeds, base: Outputs, adapted: Outputs | None) -> None:
        """Logits of chosen positions are those of all positions there, with an adapter or without.

        Positions are each row's own. `base` and `adapted`: what is given at all of them.
        """
        if not self.manifest.logits_to_keep:
            return
        name = output_of(self.manifest)
        rows, tokens = feeds[INPUT_IDS].shape
        kept = np.stack([np.arange(rows) % tokens, np.full(rows, -1)], axis=1)  # [rows, 2]
        for outputs, made in ((base, None), (adapted, self.made_side_inputs())):
            if outputs is None:
                continue
            whole = outputs[name]
            given = self.run({**feeds, LOGITS_TO_KEEP: kept}, made)[name]
            expected = np.take_along_axis(whole, kept[:, :, np.newaxis] % tokens, axis=1)
            if (error := _error(given, expected)) > _LIMITS[self.manifest.precision]:
                raise _refused(
                    f"its {name} at chosen positions are {error:.2g} of their size away from those"
                    " of all positions"
                )

    def made_side_inputs(self) -> dict[str, NDArray[Any]]:
        """Random side inputs of every kind, one slot; empty of a merged graph."""
        made: dict[str, NDArray[Any]] = {}
        for target in self.manifest.targets:
            factors = made_factors(
                target.in_features,
                target.out_features,
                scale=_UPDATE_SCALE,
                experts=target.experts,
            )
            made[target.lora_A], made[target.lora_B] = (values[np.newaxis] for values in factors)
        random = np.random.default_rng(0)
        for saved in self.manifest.saved:
            made[saved.input] = random.standard_normal((1, *saved.slot_shape)) * _UPDATE_SCALE
        for name, default in change_inputs(self.manifest).items():
            made[name] = default + random.standard_normal((1, len(default))) * _UPDATE_SCALE
        return {name: values.astype(self.manifest.factor_dtype) for name, values in made.items()}

    def _beside_base(self, made: Mapping[str, NDArray[Any]], count: int) -> dict[str, NDArray[Any]]:
        """`made` for the first of `count` rows, and the base for the others."""
        defaults = self._defaults()
        changes = change_inputs(self.manifest)
        mixed: dict[str, NDArray[Any]] = {}
        slots = self.manifest.layout == SLOTS
        for name, values in made.items():
            base = defaults.get(name)
            if base is None:
                base = np.zeros_like(values)
                base[...] = changes.get(name, 0)
            mixed[name] = np.concatenate([values, *[base] * (1 if slots else count - 1)])
        if slots:
            mixed[ADAPTER_IDS] = np.array([0] + [1] * (count - 1), np.int64)
        return mixed

    def _defaults(self) -> dict[str, NDArray[Any]]:
        """What the base has where adapters replace whole parameters, [1, …]."""
        nodes = {node.name for node in self._sessions[-1].get_overridable_initializers()}
        replaced = [saved.input for saved in self.manifest.saved if saved.input in nodes]
        if not replaced:
            return {}
        held, _ = read_arrays(self._directory / DEFAULTS_NAME, error=BundleError)
        return held


def _opened(file: Path) -> onnxruntime.InferenceSession:
    try:
        return open_graph(file)
    except NotRunError as problem:
        if problem.lacking:
            raise
        raise _refused(f"onnxruntime cannot open {file.name}: {problem}") from None


def _overflow(precision: str) -> str:
    """What to do about numbers that are too large for `precision`."""
    return (
        ": float16 ends at 65504, give `precision='fp32'` or `precision='bf16'`"
        if precision == "fp16"
        else ""
    )


def _refused(reason: str) -> ExportError:
    return ExportError(f"the bundle does not hold what it should, nothing was written: {reason}")


def _same(one: Outputs, other: Outputs) -> bool:
    names = one.keys() & other.keys()
    return all(np.array_equal(one[name], other[name], equal_nan=True) for name in names)


def _error(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """‖got − expected‖ / ‖expected‖ where the expected values are numbers; inf for other shapes."""
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
