"""Time a bundle: prefill or decode, swaps and mixed batches, adapters and base in alternation."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import onnxruntime

from loradeploy.adapter.tasks import CAUSAL_LM
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import CONFIG_NAME
from loradeploy.bundle.sample import Sample
from loradeploy.bundle.text.tokenizer_files import positions_of_model
from loradeploy.errors import UsageError
from loradeploy.runtime.arguments import Adapters
from loradeploy.runtime.session import AdapterSession

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WARM_UP = 2
_LENGTH = 128


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one case over all rounds, and its ratio to the base in the same rounds.

    `median`, `low`, `high`: the median and the quartiles. The case `base again (control)` times the
    base a second time: ratios within its quartiles are not significant.
    """

    name: str
    median: float
    low: float
    high: float
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None


def default_length(session: AdapterSession) -> int:
    """128 tokens, or as many as the model has positions for, with one for a decoder's new token."""
    longest = _longest(session)
    return _LENGTH if longest is None else max(1, min(_LENGTH, longest))


def _longest(session: AdapterSession) -> int | None:
    """The model's positions, without that of a decoder's new token; None if it states none."""
    positions = positions_of_model(model_config(session.path), session.path / CONFIG_NAME)
    return None if positions is None else positions - (session.manifest.task == CAUSAL_LM)


def time_bundle(
    session: AdapterSession, *, batch: int = 1, length: int | None = None, rounds: int = 15
) -> list[Timing]:
    """Time one forward pass: a new token after `length` for decoders, otherwise `length` tokens.

    Cases: the base, the base again as a control, each adapter for all rows, a different adapter at
    each call, and a mixed batch if `batch` > 1. They alternate within each round, in random order.

    The default length is that of `default_length`.

    Raises:
        UsageError: a size that is not positive, or a length that the model has no positions for.
    """
    length = default_length(session) if length is None else length
    for name, value in (("batch", batch), ("length", length), ("rounds", rounds)):
        if value < 1:
            raise UsageError(f"`{name}` is {value}: give 1 or more")
    longest = _longest(session)
    if longest is not None and length > longest:
        raise UsageError(f"`length` is {length}: the model has positions for {longest} at most")
    decodes = session.manifest.task == CAUSAL_LM
    past, new = (length, 1) if decodes else (0, length)
    call = forward(session, batch, past=past, new=new)
    names = list(session.adapters)
    sides: dict[str, Adapters] = {"base": None, "base again (control)": None}
    sides.update({f"adapter {name}": name for name in names})
    if len(names) > 1 and batch > 1:
        rows = [[None, *names][row % (len(names) + 1)] for row in range(batch)]
        sides["mixed batch"] = rows
    calls: dict[str, Callable[[], object]] = {
        side: partial(call, adapters) for side, adapters in sides.items()
    }
    if len(names) > 1:
        calls["swap at each call"] = _swapping(call, names)
    return _alternate(calls, rounds=rounds)


def forward(
    session: AdapterSession, batch: int, *, past: int, new: int
) -> Callable[[Adapters], object]:
    """A function that runs `new` tokens after `past` in the cache, in place if the graph can."""
    feeds: dict[str, Any] = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(values)
        for name, values in sample_feeds(session, batch, past=past, new=new).items()
    }
    outputs = [spec.name for spec in session.manifest.outputs]
    cache = session.empty_cache(batch)
    cache.make_room(past + new)
    if cache.buffers:
        feeds |= cache.inputs
    return partial(session.run_with_ort_values, outputs, feeds, buffers=cache.buffers)


def _swapping(call: Callable[[Adapters], object], names: Sequence[str]) -> Callable[[], object]:
    turn = 0

    def swapped() -> object:
        nonlocal turn
        turn += 1
        return call(names[turn % len(names)])

    return swapped


def _alternate(calls: Mapping[str, Callable[[], object]], *, rounds: int) -> list[Timing]:
    for call in calls.values():
        for _ in range(_WARM_UP):
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            begin = time.perf_counter()
            calls[name]()
            taken[name].append((time.perf_counter() - begin) * 1e3)
    return [_timing(name, taken[name], taken["base"]) for name in calls]


def _timing(name: str, own: Sequence[float], base: Sequence[float]) -> Timing:
    low, median, high = _quartiles(own)
    if name == "base":
        return Timing(name, median, low, high)
    ratio_low, ratio, ratio_high = _quartiles([a / b for a, b in zip(own, base, strict=True)])
    return Timing(name, median, low, high, ratio, ratio_low, ratio_high)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def sample_feeds(
    session: AdapterSession, batch: int, *, past: int, new: int
) -> dict[str, NDArray[Any]]:
    """Feeds of `new` tokens after `past` in the cache. The time does not depend on their values."""
    return Sample(session.manifest.inputs, model_config(session.path)).feeds(batch, new, past)
