"""The two graphs of an encoder-decoder as one backend: the encoder, then the decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import DECODER_INPUT_IDS, PAST, is_cross, past_of, present_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Run = Callable[[Sequence[str], Mapping[str, Any], Sequence[str | None]], Sequence[Any]]


@dataclass(frozen=True, eq=False)
class Halves:
    """The encoder and the decoder of `manifest`.

    `run`: runs the graph that has the requested outputs. `outputs`: the outputs to compare.
    """

    manifest: Manifest
    run: Run
    outputs: Sequence[str]

    def encoded(
        self, feeds: Mapping[str, NDArray[Any]], adapters: Sequence[str | None]
    ) -> list[Any]:
        """Return the keys and values of the source, in the order of the encoder's outputs."""
        return list(self._encoded(feeds, adapters)[0].values())

    def whole(
        self, feeds: Mapping[str, NDArray[Any]], adapters: Sequence[str | None]
    ) -> Sequence[Any]:
        """Return the outputs of a whole target, decoded in one run with an empty cache."""
        source, target = self._encoded(feeds, adapters)
        ids = feeds[DECODER_INPUT_IDS]
        fed = {**source, **self._empty(len(ids)), **target, DECODER_INPUT_IDS: ids}
        return self.run(self.outputs, fed, adapters)

    def one_by_one(
        self, feeds: Mapping[str, NDArray[Any]], adapters: Sequence[str | None]
    ) -> list[Sequence[Any]]:
        """Return the outputs of a target decoded one token per step, with a cache."""
        source, target = self._encoded(feeds, adapters)
        ids = feeds[DECODER_INPUT_IDS]
        cache: dict[str, Any] = self._empty(len(ids))
        presents = [present_of(name) for name in cache]
        steps = []
        for at in range(ids.shape[1]):
            fed = {**source, **cache, **target, DECODER_INPUT_IDS: ids[:, at : at + 1]}
            given = self.run([*self.outputs, *presents], fed, adapters)
            steps.append(given[: len(self.outputs)])
            cache = dict(zip(cache, given[len(self.outputs) :], strict=True))
        return steps

    def _encoded(
        self, feeds: Mapping[str, NDArray[Any]], adapters: Sequence[str | None]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the source's keys and values, and the decoder's other feeds except the cache."""
        encoder = self.manifest.encoder
        assert encoder is not None
        given = self.run(encoder.caches, {name: feeds[name] for name in encoder.inputs}, adapters)
        source = dict(zip(map(past_of, encoder.caches), given, strict=True))
        return source, {n: values for n, values in feeds.items() if n not in encoder.inputs}

    def _empty(self, rows: int) -> dict[str, NDArray[Any]]:
        return {
            spec.name: np.zeros((rows, int(spec.shape[1]), 0, int(spec.shape[3])), spec.dtype)
            for spec in self.manifest.inputs
            if spec.name.startswith(PAST) and not is_cross(spec.name)
        }
