"""An ONNX graph as a backend, independent of the engine that runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.tasks import CAUSAL_LM
from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import ATTENTION_MASK, PAST, present_of
from loradeploy.parity.backends.halves import Halves
from loradeploy.parity.inputs.row_feeds import Known, plain_feeds
from loradeploy.parity.phases.outputs import by_source, check_positions, joined, output_names
from loradeploy.runtime.text.padding import pad

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.runtime.cache import DecoderCache
    from loradeploy.runtime.session import AdapterSession

Feeds = Mapping[str, Any]
# Runs a graph: (output names, feeds, each row's adapter) → values in the order of the names. For a
# model with a `cache`, the keyword `buffers` gives the buffers of outputs.
Run = Callable[..., Sequence[Any]]


class NotRunError(Exception):
    """A backend cannot be run here; the message is the reason."""


@dataclass
class Replayed:
    """Number of runs of a session that captures runs, and how many of them were replays."""

    runs: int = 0
    replays: int = 0

    def take(self, other: Replayed) -> None:
        """Add the counts of `other`, and reset it."""
        self.runs, self.replays = self.runs + other.runs, self.replays + other.replays
        other.runs = other.replays = 0


class OnnxModel:
    """A graph as a backend. `run` may return arrays or OrtValues.

    `cache`: makes an empty cache for a number of rows, which the graph may update in place. Without
    it, the graph's present outputs are fed back as the next past. `known`: as in `plain_feeds`.
    `session`: the session of the graph, if all rows have the same adapter.
    `replayed`: counts of runs and replays, if runs are captured.
    """

    def __init__(
        self,
        manifest: Manifest,
        run: Run,
        cache: Callable[[int], DecoderCache] | None = None,
        *,
        known: Known | None = None,
        session: AdapterSession | None = None,
        replayed: Replayed | None = None,
    ) -> None:
        self.session = session
        self.replayed = Replayed() if replayed is None else replayed
        self._known = known
        self._manifest = manifest
        self._run = run
        self._cache = cache
        self._outputs = output_names(manifest)
        self._past = [spec for spec in manifest.inputs if spec.name.startswith(PAST)]
        self._presents = [present_of(spec.name) for spec in self._past]

    def forward(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        cache: Any,
        adapters: Sequence[str | None],
        *,
        embeds: Feeds | None = None,
    ) -> tuple[NDArray[Any], Any]:
        """See `phases.models.Model` and `phases.models.EmbedsModel`."""
        dtypes = {spec.name: spec.dtype for spec in self._manifest.embeds}
        besides = {n: values.astype(dtypes[n]) for n, values in (embeds or {}).items()}
        if self._manifest.encoder is not None:
            given = self._halves().whole(self._plain(ids, mask), adapters)
            return joined([_array(value) for value in given], self._manifest.task), None
        names, count = [*self._outputs, *self._presents], len(self._outputs)
        if not self._past and self._manifest.task == CAUSAL_LM:
            return self._without_cache(ids, mask, cache, adapters)
        if self._cache is None:
            given = self._run(names, {**self.feeds(ids, mask, cache), **besides}, adapters)
            cache = list(given[count:])
        else:
            cache = self._cache(len(ids)) if cache is None else cache
            cache.make_room(mask.shape[1])
            feeds = {**self._plain(ids, mask), **cache.inputs, **besides}
            if ATTENTION_MASK in feeds:
                feeds[ATTENTION_MASK] = cache.step_mask(feeds[ATTENTION_MASK], ids.shape[1])
            given = self._run(names, feeds, adapters, buffers=cache.buffers)
            cache.keep(given[count:])
        values = [_array(value) for value in given[:count]]
        if self._manifest.task == CAUSAL_LM:
            check_positions(values[0], ids.shape[1])
        return joined(values, self._manifest.task), cache

    def encode(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], adapters: Sequence[str | None]
    ) -> NDArray[Any]:
        """See `phases.models.SourceModel`."""
        given = self._halves().encoded(self._plain(ids, mask), adapters)
        return by_source([_array(value) for value in given])

    def decode(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], adapters: Sequence[str | None]
    ) -> NDArray[Any]:
        """See `phases.models.SourceModel`."""
        steps = self._halves().one_by_one(self._plain(ids, mask), adapters)
        task = self._manifest.task
        return np.concatenate([joined([_array(v) for v in step], task) for step in steps], axis=1)

    def _halves(self) -> Halves:
        return Halves(self._manifest, self._run, self._outputs)

    def _plain(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        return plain_feeds(self._manifest, ids, mask, self._known)

    def _without_cache(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        before: NDArray[np.int64] | None,
        adapters: Sequence[str | None],
    ) -> tuple[NDArray[Any], Any]:
        """Run all tokens again and return the values of the new ones; rows are padded on the right.

        `before`: the previous tokens, in place of a cache.
        """
        tokens = ids if before is None else np.concatenate([before, ids], axis=1)
        real = mask.astype(bool)
        padded, padded_mask = pad(
            [row[seen] for row, seen in zip(tokens, real, strict=True)], 0, left=False
        )
        given = [
            _array(value)
            for value in self._run(self._outputs, self.feeds(padded, padded_mask, None), adapters)
        ]
        check_positions(given[0], padded.shape[1])
        values = joined(given, self._manifest.task)
        new = ids.shape[1]
        result = np.zeros((len(ids), new, *values.shape[2:]), values.dtype)
        for row, seen in enumerate(real):
            end, count = int(seen.sum()), int(seen[-new:].sum())
            result[row, seen[-new:]] = values[row, end - count : end]
        return result, tokens

    def values(
        self, names: Sequence[str], ids: NDArray[np.int64], adapter: str | None
    ) -> list[NDArray[Any]]:
        """Return the outputs `names` for `ids` [rows, tokens], without padding and cache."""
        feeds = self.feeds(ids, np.ones_like(ids), None)
        return [_array(value) for value in self._run(names, feeds, [adapter] * len(ids))]

    def feeds(self, ids: NDArray[np.int64], mask: NDArray[np.int64], cache: Any) -> dict[str, Any]:
        """Return the graph's feeds for `ids` and `mask`; a `cache` of None is an empty one."""
        feeds: dict[str, Any] = self._plain(ids, mask)
        if self._manifest.encoder is not None:
            return feeds  # `AdapterSession` runs the encoder and the decoder on them
        past = self._empty(len(ids)) if cache is None else cache
        return feeds | dict(zip((spec.name for spec in self._past), past, strict=True))

    def _empty(self, rows: int) -> list[NDArray[Any]]:
        """Return an empty cache: [rows, heads, 0, head_dim] for each key and value."""
        shapes = [(rows, int(s.shape[1]), 0, int(s.shape[3])) for s in self._past]
        return [np.zeros(shape, s.dtype) for shape, s in zip(shapes, self._past, strict=True)]


def _array(value: Any) -> NDArray[Any]:
    array: NDArray[Any] = value if isinstance(value, np.ndarray) else value.numpy()
    return array
