"""Run a vision tower on images of one size together, with a bound on the pixels in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.names import IMAGE_FEATURES, PIXEL_VALUES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.runtime.session import AdapterSession

# Bytes of pixel values that wait for the end, when the prompts are known to fit their images.
_WAITING: Final = 64 << 20


@dataclass(frozen=True, eq=False)
class _Part:
    """Pixel values of an image or a tile; its features go to `found[place]`."""

    pixels: NDArray[Any]
    adapter: str | None
    found: list[Any]
    place: int


class TowerRuns:
    """Runs `tower` on at most `batch_size` images of one size at a time.

    Images wait until the end, or until those that wait have more than 64 MiB of pixel values. Their
    pixel values are freed once their features exist. `dtype`: that of the tower's input.
    """

    def __init__(self, tower: AdapterSession, dtype: str, batch_size: int) -> None:
        self._tower, self._dtype, self._most = tower, dtype, batch_size
        self._found: dict[int, list[Any]] = {}
        self._waiting: dict[tuple[int, ...], list[_Part]] = {}

    def add(self, prompt: int, parts: Sequence[NDArray[Any]], adapter: str | None) -> None:
        """Add the `parts` of an image, which are its pixel values, to those of a prompt."""
        found = self._found.setdefault(prompt, [])
        for pixels in parts:
            alike = self._waiting.setdefault(np.shape(pixels), [])
            alike.append(_Part(pixels, adapter, found, len(found)))
            found.append(None)
        waiting = sum(part.pixels.nbytes for alike in self._waiting.values() for part in alike)
        if waiting > _WAITING:
            self._run()

    def finished(self) -> Mapping[int, list[NDArray[Any]]]:
        """The features of each prompt that has images, in order, [tokens, hidden] each."""
        self._run()
        return self._found

    def _run(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for alike in waiting.values():
            while alike:
                some, alike[: self._most] = alike[: self._most], []
                pixels = np.stack([part.pixels for part in some]).astype(self._dtype, copy=False)
                (values,) = self._tower.run(
                    [IMAGE_FEATURES], {PIXEL_VALUES: pixels}, [part.adapter for part in some]
                )
                for part, own in zip(some, values, strict=True):
                    part.found[part.place] = own
