"""The values inside both sides for one row: PyTorch's modules, and their counterparts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.adapter_inputs.native import read_onnx_adapter, write_side_inputs
from loradeploy.bundle.manifest import read_manifest
from loradeploy.parity.backends import ort
from loradeploy.parity.context import AdapterUnderTest, CheckContext
from loradeploy.parity.diagnose.graph_probe import ProbedGraph, probe_graph
from loradeploy.parity.diagnose.search import Point, Values
from loradeploy.parity.diagnose.torch_probe import Modules, Site, rounded, sites_of, values_at
from loradeploy.parity.names import (
    ONNX_MERGED,
    ONNX_MIXED,
    ONNX_NATIVE,
    ONNX_SIDE_INPUTS,
    PEFT,
    TORCH_MERGED,
)
from loradeploy.parity.reference.loading import Base, merged
from loradeploy.parity.reference.model import TorchModel
from loradeploy.parity.reference.peft import with_peft
from loradeploy.parity.reference.pytorch import as_reference
from loradeploy.parity.reference.rounding import Activations, rounded_activations
from loradeploy.parity.reference.tied import with_rows_of_tied

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from loradeploy.parity.backends.table import Opened

    InTorch = Callable[[CheckContext, Base, AdapterUnderTest], AbstractContextManager[object]]

# The functions that open a backend's graph. Other backends run in PyTorch, where modules are named.
GRAPHS: Final[Mapping[str, Callable[[CheckContext], Opened]]] = {
    ONNX_SIDE_INPUTS: ort.side_inputs,
    ONNX_MIXED: ort.side_inputs,
    ONNX_NATIVE: ort.native_adapter,
    ONNX_MERGED: ort.merged_graph,
}


@contextmanager
def _merged(context: CheckContext, base: Base, tested: AdapterUnderTest) -> Iterator[None]:
    with (
        with_rows_of_tied(base.model, tested.adapter, context.manifest) as left,
        merged(base.model, left),
    ):
        yield


def _with_peft(
    context: CheckContext, base: Base, tested: AdapterUnderTest
) -> AbstractContextManager[object]:
    return with_peft(base.model, tested)


MODELS: Final[Mapping[str, InTorch]] = {TORCH_MERGED: _merged, PEFT: _with_peft}


class TorchRow:
    """One row of tokens, without batch or cache, and the PyTorch model that runs it."""

    def __init__(
        self, context: CheckContext, base: Base, adapter: str | None, tokens: Sequence[int]
    ) -> None:
        self.context = context
        self.base = base
        self.tested = next((s for s in context.adapters if s.name == adapter), None)
        self.ids = np.array([tokens], np.int64)
        self.modules = Modules.of(base.model)
        self._forward = TorchModel(
            base.model, context.manifest, context.cases.known, tokens=context.tokens
        )

    @property
    def name(self) -> str | None:
        """The adapter's name; None is the base."""
        return None if self.tested is None else self.tested.name

    def run(self) -> None:
        """Run the row through the model in its current state."""
        self._forward.forward(self.ids, np.ones_like(self.ids), None, [self.name])

    def sites(self) -> tuple[Site, ...]:
        """Return the tensors inside the reference."""
        with self.reference():
            return sites_of(self.base.model, self.modules, self.run)

    def reference(self) -> AbstractContextManager[object]:
        """Make the model the reference while the block lasts."""
        return as_reference(self.context, self.base, self.name)

    @contextmanager
    def disturbed(
        self, unit: float, activations: Mapping[str, Activations], seed: int
    ) -> Iterator[None]:
        """Make the model the reference, perturbed by `unit` and with `activations` rounded."""
        model = self.base.model
        with (
            self.reference(),
            rounded(model, self.modules, unit, seed),
            rounded_activations(model, activations),
        ):
            yield

    def values(
        self,
        points: Sequence[Point],
        holding: Callable[[], AbstractContextManager[object]],
    ) -> Values:
        """Return the values at `points` of the model in the state that `holding` gives it."""

        def values(numbers: Sequence[int]) -> Sequence[NDArray[np.float32]]:
            with holding():
                return values_at(self.base.model, [points[n].site for n in numbers], self.run)

        return values


@dataclass(frozen=True, eq=False)
class OtherSide:
    """A backend's values at the reference's sites; see `search.Sides`."""

    points: Sequence[Point]
    values: Values
    upstream: Sequence[int] | None = None
    unmatched: tuple[str, ...] = ()


@contextmanager
def other_side(row: TorchRow, backend: str, sites: Sequence[Site]) -> Iterator[OtherSide]:
    """Open the backend with the row's adapter.

    Raises:
        ValueError: the backend's inner values are not accessible, or it does not run the base.
        LoraDeployError: its graph cannot be read or opened.
    """
    if backend in GRAPHS:
        with _bundle_of(row, backend) as bundle, _scratch(row) as scratch:
            probed = probe_graph(bundle, read_manifest(bundle), sites, row.modules)
            points = [Point(p.site, p.module, p.node, p.op) for p in probed.probes]
            upstream = probed.upstream()
            with _graph_values(row, backend, probed, scratch) as values:
                yield OtherSide(points, values, upstream, probed.unmatched)
    elif backend in MODELS and row.tested is not None:
        context, base, tested = row.context, row.base, row.tested
        points = [_torch_point(base.model, site) for site in sites]
        values = row.values(points, lambda: MODELS[backend](context, base, tested))
        yield OtherSide(points, values)
    else:
        raise ValueError(f"the inner values of {backend} are not accessible")


def _scratch(row: TorchRow) -> AbstractContextManager[str]:
    return TemporaryDirectory(dir=row.context.scratch)


@contextmanager
def _bundle_of(row: TorchRow, backend: str) -> Iterator[Path]:
    """Yield the bundle that the backend runs."""
    if backend == ONNX_MERGED and row.tested is not None:
        with ort.merged_bundle(row.context, row.tested) as bundle:
            yield bundle
    else:
        yield row.context.bundle


@contextmanager
def _graph_values(
    row: TorchRow, backend: str, probed: ProbedGraph, scratch: str
) -> Iterator[Values]:
    """Open the probed graph as the backend opens its own, with the row's adapter only."""
    path = Path(scratch) / "probed"
    manifest = probed.write(path)
    tested = row.tested
    if tested is not None and tested.native is not None and probed.manifest.branches:
        native = path / tested.native.name  # the same adapter, without a choice of the branch
        write_side_inputs(read_onnx_adapter(tested.native), manifest, native)
        tested = dataclasses.replace(tested, native=native)
    opened = GRAPHS[backend](
        dataclasses.replace(
            row.context,
            bundle=path,
            manifest=manifest,
            weights=probed.bundle,
            adapters=() if tested is None else (tested,),
        )
    )
    graph: Any = next((model for given, model in opened if given == row.name), None)
    if graph is None:
        raise ValueError(f"{backend} does not run the base alone")

    def values(numbers: Sequence[int]) -> Sequence[NDArray[np.float32] | None]:
        probes = [probed.probes[n] for n in numbers]
        names = list(dict.fromkeys(str(probe.value.name) for probe in probes))
        given = dict(zip(names, graph.values(names, row.ids, row.name), strict=True))
        found: list[NDArray[np.float32] | None] = []
        for probe in probes:
            array = given[str(probe.value.name)]
            if probe.part is not None:
                array = array[..., slice(*probe.part)]
            fits = array.size == np.prod(probe.site.shape)
            found.append(array.astype(np.float32).reshape(probe.site.shape) if fits else None)
        return found

    yield values
    del opened  # keeps the session's resources alive until here


def _torch_point(model: torch.nn.Module, site: Site) -> Point:
    """Return a site as a point of a PyTorch backend, whose `op` is the module's class."""
    module = site.given_by[0] if site.given_by else site.taken_by[0].rpartition(".")[0]
    return Point(site, module, "", type(model.get_submodule(module)).__name__)
