"""User-defined backends, compared with PyTorch in the same phases as the bundle's.

    model.onnx              an ONNX file of any exporter, with inputs of the usual names
    package.module:function feeds → outputs, numpy arrays by the names of the bundle's graph
    …@sport                 compared with the reference with the adapter `sport`
    name=…                  its name in the report

Without "@", a backend is compared with what the bundle's graph is: the base, or the merged model. A
decoder with a cache takes `past_key_values.{i}.key` and `.value`, empty at first, and returns
`present.{i}.key` and `.value` beside `logits`. A decoder without a cache runs whole prompts, alone
and in batches, but neither the chunked prefill nor decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.manifest import Manifest, TensorSpec
from loradeploy.bundle.names import INPUT_IDS, KEPT, PAST, PRESENT
from loradeploy.errors import UsageError, listed, listed_names
from loradeploy.parity.backends.onnx_model import OnnxModel
from loradeploy.parity.backends.table import Backend
from loradeploy.parity.compare.opening import open_side, short_title
from loradeploy.parity.compare.sides import Side
from loradeploy.parity.context import AdapterUnderTest, CheckContext
from loradeploy.parity.inputs.row_feeds import FED, Known
from loradeploy.parity.names import (
    CHUNKED,
    DECODE,
    ONE_ROW,
    PADDED_BATCH,
    PERMUTED,
    PREFILL,
    REPEAT,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.parity.compare.opening import Comparable
    from loradeploy.parity.compare.sides import Feeds, Given
    from loradeploy.runtime.devices.providers import Provider

    # By title: the model, or the model and its adapter's name. Or texts as above.
    Others = Mapping[str, Comparable | tuple[Comparable, str]] | Iterable[str]

_WITHOUT_CACHE: Final = (PREFILL, ONE_ROW, PADDED_BATCH, PERMUTED, REPEAT)
_LISTED: Final = 5


@dataclass(frozen=True)
class _Other:
    title: str
    model: Any
    adapter: str | None


def other_backends(
    others: Others,
    manifest: Manifest,
    adapters: Sequence[AdapterUnderTest],
    providers: Sequence[Provider] | None,
) -> tuple[Backend, ...]:
    """Return a backend for each of `others`.

    Each is opened once and closed again, so that errors are raised before anything runs.

    Raises:
        UsageError: something that is not a model, an unknown adapter, an input that is not fed, or
            two backends of the same title.
        ModelError: onnxruntime cannot open a file.
    """
    known = [tested.name for tested in adapters]
    found: dict[tuple[str, str | None], Backend] = {}
    for other in _parsed(others):
        claim = other.adapter
        if claim is None and manifest.mode == "merged":
            claim = known[0]
        if claim is not None and claim not in known:
            raise UsageError(
                f"{other.title}: no adapter {claim!r} is in the bundle or given, there are:"
                f" {listed_names(known)}"
            )
        if (other.title, claim) in found:
            raise UsageError(f"two backends are named {other.title!r}: name them, NAME=MODEL")
        inputs = _inputs(open_side(other.model, providers), manifest)
        cached = any(spec.name.startswith(PAST) for spec in inputs)
        lacks_cache = any(spec.name.startswith(PAST) for spec in manifest.inputs) and not cached
        found[other.title, claim] = Backend(
            f"other:{other.title}",
            f"{other.title} (no cache)" if lacks_cache else other.title,
            (manifest.mode,),
            _WITHOUT_CACHE if lacks_cache else (*_WITHOUT_CACHE, CHUNKED, DECODE),
            partial(_open, other.model, claim, inputs),
            needs_adapter=False,
        )
    return tuple(found.values())


def _open(
    model: Comparable, claim: str | None, inputs: tuple[TensorSpec, ...], context: CheckContext
) -> Iterator[tuple[str | None, OnnxModel]]:
    side = open_side(model, context.providers)
    yield claim, _model(side, inputs, context.manifest, context.cases.known)


def _model(
    side: Side, inputs: tuple[TensorSpec, ...], manifest: Manifest, known: Known | None = None
) -> OnnxModel:
    own = dataclasses.replace(manifest, inputs=inputs)
    return OnnxModel(own, partial(_run, side, manifest), known=known)


def _inputs(side: Side, manifest: Manifest) -> tuple[TensorSpec, ...]:
    """Return the inputs of the side; the shapes of a cache are the bundle's.

    Raises:
        UsageError: a graph has an input that the check does not feed.
    """
    if side.inputs is None:
        return manifest.inputs if _keeps_cache(side, manifest) else _without_cache(manifest.inputs)
    cache = {spec.name: spec for spec in manifest.inputs if spec.name.startswith(PAST)}
    unknown = [s.name for s in side.inputs if s.name not in FED and s.name not in cache]
    if unknown:
        raise UsageError(
            f"{side.title} takes {listed(unknown, _LISTED)}, which a check of this bundle does not"
            f" feed: it feeds {', '.join(FED)} and the bundle's own cache"
        )
    return tuple(
        dataclasses.replace(cache.get(spec.name, spec), dtype=spec.dtype) for spec in side.inputs
    )


def _keeps_cache(side: Side, manifest: Manifest) -> bool:
    """Whether a callable returns a cache for one token.

    If it raises with a cache but not without, it has none. If it always raises, the check reports
    the error.
    """
    given = _given(side, manifest.inputs, manifest)
    if given is None:
        return _given(side, _without_cache(manifest.inputs), manifest) is None
    outputs = {spec.name for spec in manifest.outputs}
    presents = {name for name in outputs if name.startswith(PRESENT)}
    return presents <= set(given) if isinstance(given, dict) else len(given) == len(outputs)


def _given(side: Side, inputs: tuple[TensorSpec, ...], manifest: Manifest) -> Given | None:
    """Return the side's outputs for one token; None if it raises."""
    one = np.ones((1, 1), np.int64)
    try:
        return side.run(_model(side, inputs, manifest).feeds(one, one, None))
    except (Exception, SystemExit):
        return None


def _without_cache(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(spec for spec in specs if not spec.name.startswith(PAST))


def _run(
    side: Side, manifest: Manifest, names: Sequence[str], feeds: Feeds, adapters: object
) -> list[NDArray[Any]]:
    """Run the side and return the outputs `names`, in order.

    Raises:
        ValueError: an output is missing, or has another shape than the bundle's.
        RuntimeError: the callable called sys.exit.
    """
    try:
        given = side.run(feeds)
    except SystemExit as problem:  # sys.exit(0) must not end the check with the status of a pass
        raise RuntimeError(f"it called sys.exit({problem.code})") from None
    if isinstance(given, list):
        if len(given) != len(names):
            raise ValueError(
                f"it gives {len(given)} outputs without names, not {len(names)}:"
                f" {listed(names, _LISTED)}"
            )
        given = dict(zip(names, given, strict=True))
    if missing := [name for name in names if name not in given]:
        raise ValueError(
            f"it does not give {listed(missing, _LISTED)} (it gives {listed(list(given), _LISTED)})"
        )
    sizes = _sizes(manifest.inputs, feeds)
    for spec in manifest.outputs:
        shape = [sizes.get(size, size) for size in spec.shape]
        if spec.name in names and list(given[spec.name].shape) != shape:
            raise ValueError(
                f"{spec.name} is {list(given[spec.name].shape)} where {shape} is expected"
            )
    return [given[name] for name in names]


def _sizes(inputs: Sequence[TensorSpec], feeds: Feeds) -> dict[int | str, int]:
    """Return the sizes of the symbols in the bundle's shapes, from `feeds`; all logits are kept."""
    fed = [(spec, feeds[spec.name]) for spec in inputs if spec.name in feeds]
    every: dict[int | str, int] = {KEPT: feeds[INPUT_IDS].shape[1]} if INPUT_IDS in feeds else {}
    return every | {
        symbol: size
        for spec, values in fed
        for symbol, size in zip(spec.shape, values.shape, strict=True)
        if isinstance(symbol, str)
    }


# -- what is given ---------------------------------------------------------------------------------


def _parsed(others: Others) -> Iterator[_Other]:
    if isinstance(others, str):
        others = [others]
    if not isinstance(others, Mapping):
        yield from map(_of_text, others)
        return
    for title, given in others.items():
        if isinstance(given, tuple):
            yield _Other(title, *given)
        elif isinstance(given, str):
            yield dataclasses.replace(_of_text(given), title=title)
        else:
            yield _Other(title, given, None)


def _of_text(text: str) -> _Other:
    """Parse [NAME=]MODEL[@ADAPTER]; a text that is an existing path is not split."""
    title, equals, model = text.partition("=")
    if not equals or Path(text).exists():
        title, model = "", text
    adapter = None
    if not Path(model).exists() and "@" in model:
        model, _, adapter = model.rpartition("@")
    return _Other(title or short_title(model), model, adapter)
