"""Measure how much fixed ranges of activations change the effect of each adapter.

    effect      the adapter's change of the outputs, in the graph with unquantized activations
    error       the difference of its change in the graph itself from that

Ranges were measured on the base. An adapter that makes activations larger is clipped, in its own
layer or a later one; the effect of a small one can be lost in their rounding. If the error is
comparable with the effect, the export is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.adapter_inputs.factors import branch_choice
from loradeploy.bundle.names import GRAPH_NAME
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import first_line, shortened
from loradeploy.export.graph.file import load_graph
from loradeploy.export.graph.running import NotRunError, run_graph
from loradeploy.export.match.observe import open_model
from loradeploy.export.read.static_ranges import remove_ranges
from loradeploy.export.trial.opened import Trial, refused
from loradeploy.export.trial.original import run_source_graph, run_source_session
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from loradeploy.bundle.sample import Feeds, Sample

logger = logger_of(__name__)

# The error relative to the effect.
_REFUSED: Final = 0.3
_REPORTED: Final = 0.1
_SIZES: Final = ((8, 32), (4, 8), (2, 4))  # rows and tokens


def check_ranges(
    trial: Trial,
    directory: Path,
    sample: Sample,
    adapters: Mapping[str, Mapping[str, NDArray[Any]]],
    source: Path,
    renamed: Mapping[str, str],
) -> None:
    """Compare the effect of each adapter with that in the same graph without fixed ranges.

    `sample`: feeds for the bundle, and for the graph in the file `source`. `adapters`: their side
    inputs. `renamed`: as in `run_source_graph`.

    Raises:
        ExportError: the error is comparable with the effect.
    """
    merged = trial.manifest.merged_adapter
    if trial.manifest.encoder is not None or not (adapters or merged):
        return
    name = output_of(trial.manifest)
    try:
        free = _without_ranges(directory / GRAPH_NAME)
        if free is None:
            return
        feeds = _longest(free, sample, name)
        if merged is None:
            before, after = run_graph(free, feeds, [name])[name], trial.run(feeds, None)[name]
            for adapter, side_inputs in adapters.items():
                given = {**feeds, **side_inputs, **branch_choice(trial.manifest)}
                expected = run_graph(free, given, [name])[name] - before
                got = trial.run(feeds, side_inputs)[name] - after
                _judge(f"the adapter {shortened(adapter)}", name, expected, got)
        elif (base := _without_ranges(source)) is not None:
            before = run_source_session(base, feeds, [name], renamed).outputs[name]
            after = run_source_graph(source, feeds, [name], renamed).outputs[name]
            expected = run_graph(free, feeds, [name])[name] - before
            _judge("the merged adapter", name, expected, trial.run(feeds, None)[name] - after)
    except NotRunError as problem:
        logger.warning("the effect of quantized activations was not measured: %s", problem)


def _longest(session: onnxruntime.InferenceSession, sample: Sample, name: str) -> Feeds:
    """Feeds of many tokens, or of as few as the graph accepts: more tokens use more of a range."""
    for batch, sequence in _SIZES[:-1]:
        feeds = sample.feeds(batch, sequence)
        try:
            run_graph(session, feeds, [name])
        except NotRunError:
            continue
        return feeds
    return sample.feeds(*_SIZES[-1])


def _judge(of: str, output: str, expected: NDArray[Any], got: NDArray[Any]) -> None:
    """Raise ExportError if the change `got` of the output differs too much from `expected`."""
    effect = float(np.linalg.norm(expected))
    if not effect or not np.isfinite(effect):
        return
    error = float(np.linalg.norm(got - expected)) / effect
    if error >= _REFUSED:
        raise refused(
            "the graph quantizes activations in ranges that were measured on the base, which"
            f" changes the effect of {of} on {output} by {error:.2g} of its size: merge the adapter"
            " into the float model and quantize the result, or quantize the weights only"
        )
    if error >= _REPORTED:
        logger.warning(
            "quantized activations change the effect of %s on %s by %.2g of its size",
            of,
            output,
            error,
        )


def _without_ranges(file: Path) -> onnxruntime.InferenceSession | None:
    """The graph in `file` without fixed ranges of activations; None if it has none.

    Raises:
        NotRunError: onnxruntime does not open it.
    """
    model = load_graph(file)
    if not remove_ranges(model.graph):
        return None
    try:
        return open_model(model, file.parent)
    except Exception as problem:  # onnxruntime's exceptions have no common base class
        raise NotRunError(first_line(problem), lacking=True) from None
