"""Open a bundle on the CPU, and run it with randomly generated side inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.files.tensors import read_arrays
from loradeploy.bundle.adapter_inputs.changes import change_inputs
from loradeploy.bundle.adapter_inputs.factors import branch_choice
from loradeploy.bundle.fitting.added_tokens import hidden_logit
from loradeploy.bundle.graph_form import is_packed
from loradeploy.bundle.names import (
    ADAPTER_IDS,
    DEFAULTS_NAME,
    ENCODER_NAME,
    GRAPH_NAME,
    REQUIRED_NAME,
    REQUIRED_VALUES_NAME,
    SLOTS,
)
from loradeploy.bundle.sample import Sample
from loradeploy.errors import BundleError, ExportError
from loradeploy.export.graph.running import NotRunError, Outputs, open_graph, run_graph, run_graphs
from loradeploy.export.trial.original import random_factors
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest
    from loradeploy.bundle.sample import Feeds

logger = logger_of(__name__)

_SCALE: Final = 0.05


class Trial:
    """An opened bundle in `directory`, with its `manifest`.

    Raises:
        NotRunError: onnxruntime lacks a kernel on the CPU for the graph.
        ExportError: onnxruntime does not open the graph.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._directory = directory
        self.names = [spec.name for spec in manifest.outputs]
        files = [GRAPH_NAME] if manifest.encoder is None else [ENCODER_NAME, GRAPH_NAME]
        self._packed = may_pack(manifest)
        self._sessions = [self._opened(directory / file) for file in files]

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
            raise refused(f"onnxruntime opens it and cannot run it: {problem}") from None
        self._check_ranks(outputs)
        return self._of_base(outputs)

    def _check_ranks(self, outputs: Outputs) -> None:
        """Refuse outputs of another rank than the graph declares, which onnxruntime accepts."""
        for spec in self.manifest.outputs:
            rank = outputs[spec.name].ndim
            if rank != len(spec.shape):
                raise refused(
                    f"its output {spec.name} has {rank} axes, and the graph declares"
                    f" {list(spec.shape)}: correct the shape that the source declares"
                )

    def _of_base(self, outputs: Outputs) -> Outputs:
        """`outputs` with the logits of the base's tokens only, as in the source.

        The base and the generated side inputs have no added tokens, so that all are hidden.
        """
        added = self.manifest.added_tokens
        if added is None or added.output not in outputs:
            return outputs
        logits = outputs[added.output]
        if (logits[..., added.base :] > hidden_logit(self.manifest.factor_dtype) / 2).any():
            raise refused(f"its {added.output} do not hide the tokens that the base does not have")
        return {**outputs, added.output: logits[..., : added.base]}

    def run_required(self, feeds: Feeds) -> Outputs | None:
        """The outputs of required.onnx with the base's side inputs; None if there is no such file.

        Raises:
            ExportError: onnxruntime does not open or run it.
        """
        file = self._directory / REQUIRED_NAME
        if not file.is_file():
            return None
        defaults, _ = read_arrays(self._directory / REQUIRED_VALUES_NAME, error=BundleError)
        session = self._opened(file)
        try:
            return self._of_base(run_graph(session, {**feeds, **defaults}, self.names))
        except NotRunError as problem:
            raise refused(f"onnxruntime cannot run its {REQUIRED_NAME}: {problem}") from None

    def run_uncompared(self, sample: Sample) -> None:
        """Run the bundle without comparing it, if a sample can be made."""
        try:
            feeds = sample.feeds()
            run_graphs(self._sessions, feeds, self.names)
        except (NotRunError, TypeError) as problem:
            logger.warning("opened, not run: no sample could be made for it (%s)", problem)

    def random_side_inputs(self) -> dict[str, NDArray[Any]]:
        """Random side inputs of every kind, with one slot; empty for a merged graph."""
        made: dict[str, NDArray[Any]] = {}
        for target in self.manifest.targets:
            factors = random_factors(
                target.in_features,
                target.out_features,
                scale=_SCALE,
                experts=target.experts,
            )
            made[target.lora_A], made[target.lora_B] = (values[np.newaxis] for values in factors)
        random = np.random.default_rng(0)
        for saved in self.manifest.saved:
            made[saved.input] = random.standard_normal((1, *saved.slot_shape)) * _SCALE
        for name, default in change_inputs(self.manifest).items():
            made[name] = default + random.standard_normal((1, len(default))) * _SCALE
        return {name: values.astype(self.manifest.factor_dtype) for name, values in made.items()}

    def mixed_with_base(
        self, made: Mapping[str, NDArray[Any]], count: int
    ) -> dict[str, NDArray[Any]]:
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
        """The base's values of parameters that adapters replace, [1, …]."""
        nodes = {node.name for node in self._sessions[-1].get_overridable_initializers()}
        replaced = [saved.input for saved in self.manifest.saved if saved.input in nodes]
        if not replaced:
            return {}
        defaults, _ = read_arrays(self._directory / DEFAULTS_NAME, error=BundleError)
        return defaults

    def _opened(self, file: Path) -> onnxruntime.InferenceSession:
        try:
            return open_graph(file, packed=self._packed)
        except NotRunError as problem:
            if problem.lacking:
                raise
            raise refused(f"onnxruntime cannot open {file.name}: {problem}") from None


def may_pack(manifest: Manifest) -> bool:
    """Whether onnxruntime may pack the weights for trials: see `trial_options`.

    In float16, it packs those that branches share for one branch only, and computes wrongly.
    """
    return is_packed(manifest.precision) and manifest.factor_dtype == "float32"


def refused(reason: str) -> ExportError:
    """The error for a bundle that failed its trial."""
    return ExportError(f"the bundle failed its trial, nothing was written: {reason}")
