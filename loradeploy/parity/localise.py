"""Failures of a check, localised: both sides opened with their inner values, and searched."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.manifest import read_manifest
from loradeploy.bundle.native import read_onnx_adapter, write_side_inputs
from loradeploy.errors import first_line
from loradeploy.parity import onnx_side
from loradeploy.parity.backends import Backend, Opened
from loradeploy.parity.graph_probe import ProbedGraph, probe_graph
from loradeploy.parity.packed import activations_of
from loradeploy.parity.report import BASE_LABEL, Localisation
from loradeploy.parity.rounding import Activations, rounded_activations
from loradeploy.parity.search import ROUNDINGS, Found, Place, Sides, Values, search
from loradeploy.parity.setting import Setting, Subject
from loradeploy.parity.torch_probe import Modules, Site, rounded, sites_of, values_at
from loradeploy.parity.torch_side import (
    Base,
    Reference,
    TorchModel,
    as_reference,
    load_base,
    merged,
    with_peft,
)

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from loradeploy.parity.report import Result

    InTorch = Callable[[torch.nn.Module, Subject], AbstractContextManager[None]]

logger = logging.getLogger(__name__)

# How many failures are looked into, the first of each backend and adapter.
AT_MOST: Final = 3

# How a backend's graph is opened; the others run in PyTorch, where modules have their own names.
_GRAPHS: Final[Mapping[str, Callable[[Setting], Opened]]] = {
    "onnx-side-inputs": onnx_side.side_inputs,
    "onnx-mixed": onnx_side.side_inputs,
    "onnx-native": onnx_side.native_adapter,
    "onnx-merged": onnx_side.merged_graph,
}


def _merged(model: torch.nn.Module, subject: Subject) -> AbstractContextManager[None]:
    return merged(model, subject.adapter)


_MODELS: Final[Mapping[str, InTorch]] = {"torch-merged": _merged, "peft": with_peft}


@dataclass(frozen=True)
class _Request:
    """What is to be looked into, on `case` up to `position`, or all of it."""

    backend: str
    title: str
    adapter: str | None
    case: int
    position: int | None = None


def localisations(
    setting: Setting,
    reference: Reference,
    backends: Sequence[Backend],
    results: Sequence[Result],
    *,
    always: bool,
) -> tuple[Localisation, ...]:
    """Look into what failed of `results`, at most `AT_MOST` of it; the base model is loaded again.

    With `always` and nothing failed, the base and the first adapter are looked into with one of
    `backends`.
    """
    requests = _failures(reference, results)
    failed = bool(requests)
    if not requests and always:
        requests = _samples(setting, backends)
    if not requests:
        return ()
    logger.info("looking inside, for where it begins" if failed else "looking inside")
    try:
        base = load_base(setting)
    except Exception as problem:  # it was loaded before: memory, or a file that is gone
        logger.warning("nothing can be looked into: %s", first_line(problem))
        return ()
    found = []
    for request in requests[:AT_MOST]:
        logger.info("%s, %s", request.title, request.adapter or BASE_LABEL)
        tokens = reference.rows[request.adapter][request.case].tokens
        if request.position is not None:
            tokens = tokens[: request.position + 1]
        place = localise(setting, base, request.backend, request.adapter, tokens, failed=failed)
        found.append(dataclasses.replace(place, title=request.title, case=request.case))
    return tuple(found)


def localise(
    setting: Setting,
    base: Base,
    backend: str,
    adapter: str | None,
    tokens: Sequence[int],
    *,
    failed: bool = True,
) -> Localisation:
    """Where `backend` with `adapter` (None is the base) parts from PyTorch on one row of `tokens`.

    `failed`: whether the backend is known to fail, so that nothing found is worth a word. What goes
    wrong is the localisation's message, never an error.
    """
    nothing = Localisation(backend, backend, adapter, 0, len(tokens), ())
    # What runs in PyTorch is float32, whatever the graph is.
    rounding = ROUNDINGS["fp32" if backend in _MODELS else setting.manifest.precision]
    activations = {} if backend in _MODELS else activations_of(base.packed)
    try:
        row = _Row(setting, base, adapter, tokens)
        with row.reference():
            sites = sites_of(base.model, row.modules, row.run)
        with _other_side(row, backend, sites) as other:
            sides = Sides(
                other.places,
                reference=row.values(other.places, row.reference),
                disturbed=row.values(
                    other.places, partial(row.disturbed, rounding.unit, activations)
                ),
                backend=other.values,
                rounding=rounding,
                upstream=other.upstream,
            )
            found = search(sides, tokens=len(tokens))
    except Exception as problem:  # whatever a broken graph sets off must not hide the verdict
        said = f"it could not be looked into: {first_line(problem)}"
        return dataclasses.replace(nothing, message=said)
    return dataclasses.replace(
        nothing,
        steps=found.steps,
        first=found.first,
        before=found.before,
        offenders=found.offenders,
        heatmap=found.heatmap,
        unmatched=(*other.unmatched, *found.lost),
        message=_message(found, rounding.limit, failed),
    )


class _Row:
    """One row of tokens, alone and without a cache, and the model that it goes through."""

    def __init__(
        self, setting: Setting, base: Base, adapter: str | None, tokens: Sequence[int]
    ) -> None:
        self.setting = setting
        self.base = base
        self.subject = next((s for s in setting.subjects if s.name == adapter), None)
        self.ids = np.array([tokens], np.int64)
        self.modules = Modules.of(base.model)
        self._forward = TorchModel(base.model, setting.manifest)

    @property
    def name(self) -> str | None:
        """The adapter's; None is the base."""
        return None if self.subject is None else self.subject.name

    def run(self) -> None:
        """Take the row through the model as it is."""
        self._forward.forward(self.ids, np.ones_like(self.ids), None, [self.name])

    def reference(self) -> AbstractContextManager[object]:
        """The model as the reference while the context lasts."""
        return as_reference(self.setting, self.base, self.name)

    @contextmanager
    def disturbed(self, unit: float, activations: Mapping[str, Activations]) -> Iterator[None]:
        """The same, as far off as rounding brings it: that of `activations`, or all by `unit`."""
        model = self.base.model
        noise = (
            rounded_activations(model, activations)
            if activations
            else rounded(model, self.modules, unit)
        )
        with self.reference(), noise:
            yield

    def values(
        self, places: Sequence[Place], holding: Callable[[], AbstractContextManager[object]]
    ) -> Values:
        """The values at `places` of the model while it is `holding` something."""

        def values(numbers: Sequence[int]) -> Sequence[NDArray[np.float32]]:
            with holding():
                return values_at(self.base.model, [places[n].site for n in numbers], self.run)

        return values


@dataclass(frozen=True, eq=False)
class _OtherSide:
    """What a backend shows of the reference's sites; see `search.Sides`."""

    places: Sequence[Place]
    values: Values
    upstream: Sequence[int] | None = None
    unmatched: tuple[str, ...] = ()


@contextmanager
def _other_side(row: _Row, backend: str, sites: Sequence[Site]) -> Iterator[_OtherSide]:
    if backend in _GRAPHS:
        with _bundle_of(row, backend) as bundle, _scratch(row) as scratch:
            probed = probe_graph(bundle, read_manifest(bundle), sites, row.modules)
            places = [Place(p.site, p.module, p.node, p.op) for p in probed.probes]
            upstream = probed.upstream()
            with _graph_values(row, backend, probed, scratch) as values:
                yield _OtherSide(places, values, upstream, probed.unmatched)
    elif backend in _MODELS and row.subject is not None:
        model, subject = row.base.model, row.subject
        places = [_torch_place(model, site) for site in sites]
        values = row.values(places, lambda: _MODELS[backend](model, subject))
        yield _OtherSide(places, values)
    else:
        raise ValueError(f"nothing is known of what is inside of {backend}")


def _scratch(row: _Row) -> AbstractContextManager[str]:
    return TemporaryDirectory(dir=row.setting.scratch)


@contextmanager
def _bundle_of(row: _Row, backend: str) -> Iterator[Path]:
    """The bundle that the backend runs."""
    if backend == "onnx-merged" and row.subject is not None:
        with onnx_side.merged_bundle(row.setting, row.subject) as bundle:
            yield bundle
    else:
        yield row.setting.bundle


@contextmanager
def _graph_values(row: _Row, backend: str, probed: ProbedGraph, scratch: str) -> Iterator[Values]:
    """The probed graph, opened as the backend opens its own, with the one adapter."""
    place = Path(scratch) / "probed"
    manifest = probed.write(place)
    subject = row.subject
    if subject is not None and subject.native is not None and probed.manifest.branches:
        native = place / subject.native.name  # the same, without a choice of the branch
        write_side_inputs(read_onnx_adapter(subject.native), manifest, native)
        subject = dataclasses.replace(subject, native=native)
    opened = _GRAPHS[backend](
        dataclasses.replace(
            row.setting,
            bundle=place,
            manifest=manifest,
            weights=probed.bundle,
            subjects=() if subject is None else (subject,),
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
    del opened  # until here it holds what the session needs


def _torch_place(model: torch.nn.Module, site: Site) -> Place:
    """A site as a step of PyTorch's: the class of the module that computes it."""
    module = site.given_by[0] if site.given_by else site.taken_by[0].rpartition(".")[0]
    return Place(site, module, "", type(model.get_submodule(module)).__name__)


def _failures(reference: Reference, results: Sequence[Result]) -> list[_Request]:
    """The first failure of each backend and adapter, where it is worst.

    Where that is not known, as of values that are not finite, the longest case is as good as any.
    """
    requests: dict[tuple[str, str | None], _Request] = {}
    for result in results:
        if result.outcome != "failed" or result.figures is None:
            continue
        worst = result.figures.worst
        rows = reference.rows[result.adapter]
        longest = max(range(len(rows)), key=lambda case: len(rows[case].tokens))
        case, position = (longest, None) if worst is None else (worst.case, worst.position)
        request = _Request(result.backend, result.title, result.adapter, case, position)
        requests.setdefault((result.backend, result.adapter), request)
    return list(requests.values())


def _samples(setting: Setting, backends: Sequence[Backend]) -> list[_Request]:
    """The base and the first adapter, with one backend that has a graph, for both if there is."""
    able = [b for b in backends if b.name in _GRAPHS and not b.missing(setting)]
    if not able:
        return []
    backend = min(able, key=lambda each: each.needs_adapter)
    adapters: list[str | None] = [] if backend.needs_adapter else [None]
    adapters += [subject.name for subject in setting.subjects[:1]]
    return [_Request(backend.name, backend.title, adapter, case=0) for adapter in adapters]


def _message(found: Found, limit: float, failed: bool) -> str | None:
    if found.first is not None and not np.isfinite(found.first.scale):
        return "PyTorch's own values are not finite there either"
    if found.first is not None or not failed:
        return None
    if not found.steps:
        return "no module of the model was found in the graph"
    if found.largest > limit:
        return (
            f"no module stands out: the error grows little by little, to {found.largest:.0f} times"
            " what rounding does"
        )
    return (
        "alone in its batch, without a cache and with its inner values shown, every module agrees"
        " but for rounding: it is a batch, the cache, a fusion of onnxruntime's, or a tight limit"
    )
