"""Run a graph to find the axis of its values that has the rows of the batch.

A graph may lack shapes after operators that are not ONNX's, and may have new symbols for known
sizes. So a small batch is run, and run again with its rows permuted: the batch axis of a value is
the one along which the value is permuted too. Runs with other sizes rule out axes that have the
same size by chance.

    FRONT       [batch, …, size]                 the first axis
    SECOND      [sequence, batch, size]          the second axis
    FLATTENED   [batch · …, …, size]             the first axis, with a block for each row
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.proof.provider import WEIGHTS_AT
from loradeploy.bundle.sample import Feeds, Sample
from loradeploy.disk import scratch_directory
from loradeploy.errors import first_line
from loradeploy.export.graph.file import required_inputs
from loradeploy.export.graph.running import CPU, trial_options
from loradeploy.paths import resolved
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import TensorSpec

logger = logger_of(__name__)

FRONT, SECOND, FLATTENED = "front", "second", "flattened"

_SEEN: Final = "loradeploy.rows"
_NOT_RUN: Final = "loradeploy.not_run"
# Rows, new positions and cached positions of each run: the sizes and their products all differ.
_SIZES: Final = ((3, 5, 0), (2, 7, 0))
# With cached positions, for graphs that do not accept an empty cache.
_SIZES_PAST: Final = ((3, 5, 4), (2, 7, 3))
# Allowed deviation from the expected permutation, relative to its effect, and to the value.
_LEFT: Final = 0.02
_ROUNDING: Final = 1e-5
# Larger models in memory do not fit into one protobuf message.
_MOST_BYTES: Final = 1 << 30


@dataclass(frozen=True, eq=False)
class _Tried:
    """Feeds, and the inputs among them whose first axis has the `batch` rows."""

    feeds: Feeds
    batched: frozenset[str]
    batch: int

    def permuted(self, order: Sequence[int]) -> Feeds:
        """The feeds with the rows of the batch in this order."""
        return {
            name: values[list(order)] if name in self.batched else values
            for name, values in self.feeds.items()
        }


@dataclass(frozen=True)
class Seen:
    """The observation of a value. `rows`: where the rows of the batch are, None if it has none.

    `shape`: its shape in the first run, which had `batch` rows.
    """

    shape: tuple[int, ...]
    batch: int
    rows: str | None


def observe(
    model: ir.Model, values: Iterable[ir.Value], directory: Path, config: Mapping[str, Any]
) -> None:
    """Run the graph, and record for each of `values` of the main graph where its rows are.

    Missing types, and missing or wrong shapes, are filled in. `directory`: that of the graph's
    external data. `config`: that of the model. If the graph cannot be run, `not_run` says why.
    """
    observed = list({value: None for value in values if not value.is_initializer()})
    try:
        seen = _run(model, observed, directory, config)
    except Exception as problem:  # onnxruntime's exceptions have no common base class
        model.graph.meta[_NOT_RUN] = first_line(problem).rpartition("] : ")[2]
        return
    for value in observed:
        runs = [[arrays[str(value.name)] for arrays in size] for _, size in seen]
        kinds = [_kinds(tried, own) for (tried, _), own in zip(seen, runs, strict=True)]
        common = set.intersection(*kinds)
        rows = common.pop() if len(common) == 1 else None
        value.meta[_SEEN] = Seen(runs[0][0].shape, seen[0][0].batch, rows)
        _complete(value, [own[0] for own in runs])


def seen_at(value: ir.Value) -> Seen | None:
    """The observation of the value by `observe`; None if there is none."""
    seen: Seen | None = value.meta.get(_SEEN)
    return seen


def not_run(graph: ir.Graph) -> str | None:
    """Why `observe` could not run the graph; None if it could, or did not try."""
    problem: str | None = graph.meta.get(_NOT_RUN)
    return problem


def open_model(model: ir.Model, directory: Path) -> onnxruntime.InferenceSession:
    """An onnxruntime session on a model in memory, its external data in `directory`."""
    import onnx_ir as ir
    import onnxruntime

    options = trial_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    known = [value.const_value for value in model.graph.initializers.values()]
    own = sum(t.nbytes for t in known if t is not None and not isinstance(t, ir.ExternalTensor))
    linked = next((t.base_dir for t in known if isinstance(t, ir.ExternalTensor)), directory)
    directory = Path(linked)  # another than the graph's if its data is behind links
    if own < _MOST_BYTES:
        options.add_session_config_entry(WEIGHTS_AT, str(resolved(directory)))
        content = ir.to_proto(model).SerializeToString()
        return onnxruntime.InferenceSession(content, options, providers=[CPU])
    with scratch_directory() as scratch:
        file = scratch / "model.onnx"
        ir.save(model, file, external_data="model.onnx.data")
        return onnxruntime.InferenceSession(file, options, providers=[CPU])


def _run(
    model: ir.Model, values: Sequence[ir.Value], directory: Path, config: Mapping[str, Any]
) -> list[tuple[_Tried, list[Feeds]]]:
    """The values of each run, by size and order of the rows."""
    specs = required_inputs(model)
    given = {value for value in values if value.is_graph_input()}
    requested = [value for value in values if value not in given]
    before = list(model.graph.outputs)
    model.graph.outputs.extend(value for value in requested if value not in before)
    try:
        session = open_model(model, directory)
    finally:
        model.graph.outputs.clear()
        model.graph.outputs.extend(before)
    names = [str(value.name) for value in requested]

    def arrays(feeds: Feeds) -> Feeds:
        own = dict(zip(names, session.run(names, feeds), strict=True)) if names else {}
        return {**own, **{str(value.name): feeds[str(value.name)] for value in given}}

    sample = sample_of(model, config)

    def of(sizes: tuple[int, int, int]) -> tuple[_Tried, list[Feeds]]:
        made = _tried(specs, sample.feeds(*sizes))
        orders = [list(range(made.batch)), *_orders(made.batch)]
        return made, [arrays(made.permuted(order)) for order in orders]

    try:
        return [of(sizes) for sizes in _SIZES]
    except Exception:
        if not any(spec.name.startswith("past") for spec in specs):
            raise
        return [of(sizes) for sizes in _SIZES_PAST]


def sample_of(model: ir.Model, config: Mapping[str, Any]) -> Sample:
    """A generator of feeds for the graph; `config` is that of the model."""
    pad = config.get("pad_token_id")
    return Sample(required_inputs(model), config, pad=pad if isinstance(pad, int) else None)


def _tried(specs: Sequence[TensorSpec], feeds: Feeds) -> _Tried:
    """The feeds, and the names of those with the batch axis in front, as in the first input."""
    first = specs[0].shape[0] if specs and specs[0].shape else 1
    batch = feeds[specs[0].name].shape[0] if specs and specs[0].shape else 1
    batched = {
        spec.name
        for spec in specs
        if spec.shape
        and (spec.shape[0] == first or not isinstance(spec.shape[0], int))
        and feeds[spec.name].shape[0] == batch
    }
    return _Tried(feeds, frozenset(batched), batch)


def _orders(batch: int) -> list[list[int]]:
    """Orders of the rows: the first two swapped, and all rotated by one."""
    rows = list(range(batch))
    if batch < 2:
        return []
    changed = [1, 0, *rows[2:]]
    return [changed] if batch == 2 else [changed, [*rows[1:], 0]]


def _kinds(tried: _Tried, runs: Sequence[NDArray[Any]]) -> set[str]:
    """Where the rows may be, by the shape of a value and by how it follows permutations."""
    first, batch = runs[0], tried.batch
    if first.ndim < 2 or any(run.shape != first.shape for run in runs):
        return set()
    if batch == 1:  # nothing to permute: only a matrix of several rows is flattened
        return {FRONT} if first.ndim > 2 or len(first) == 1 else {FLATTENED}
    orders = _orders(batch)
    kinds = set()
    for kind in (FRONT, SECOND, FLATTENED):
        moved = [_moved(first, kind, batch, order) for order in orders]
        if all(
            expected is not None and _follows(first, run, expected)
            for run, expected in zip(runs[1:], moved, strict=True)
        ):
            kinds.add(kind)
    return kinds


def _moved(
    values: NDArray[Any], kind: str, batch: int, order: Sequence[int]
) -> NDArray[Any] | None:
    """The values with their rows permuted; None if the shape does not have `batch` rows there."""
    if kind == FRONT:
        return values[order] if len(values) == batch else None
    if kind == SECOND:
        return values[:, order] if values.ndim == 3 and values.shape[1] == batch else None
    if len(values) == batch or len(values) % batch:
        return None
    blocks = values.reshape(batch, -1)[order]
    return blocks.reshape(values.shape)


def _follows(before: NDArray[Any], after: NDArray[Any], expected: NDArray[Any]) -> bool:
    """Whether `after` is `expected`, up to rounding."""
    a, b, e = (np.nan_to_num(values.astype(np.float64)) for values in (before, after, expected))
    wrong, effect = float(np.linalg.norm(b - e)), float(np.linalg.norm(e - a))
    return wrong <= _LEFT * effect or wrong <= _ROUNDING * float(np.linalg.norm(a))


def _complete(value: ir.Value, runs: Sequence[NDArray[Any]]) -> None:
    """Fill in the value's type and shape if they are missing, or if the shape is wrong."""
    import onnx_ir as ir

    shapes = [run.shape for run in runs]
    known = None if value.shape is None else list(value.shape)
    if known is None or any(
        len(known) != len(shape)
        or any(isinstance(dim, int) and dim != size for dim, size in zip(known, shape, strict=True))
        for shape in shapes
    ):
        same = [sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True)]
        value.shape = ir.Shape([*[None] * (len(same) - 1), *same[-1:]])
    if value.dtype is None:
        value.dtype = ir.DataType.from_numpy(runs[0].dtype)
