"""Images of one size share runs of the tower, and their pixels are freed after them."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loradeploy.runtime.vision import tower_runs
from loradeploy.runtime.vision.tower_runs import TowerRuns


class Tower:
    """A tower whose features are the sums of the pixels; `runs`: the shape and adapters of each."""

    def __init__(self) -> None:
        self.runs: list[tuple[tuple[int, ...], list[Any]]] = []

    def run(self, names: Any, feeds: dict[str, Any], adapters: list[Any]) -> list[NDArray[Any]]:
        (pixels,) = feeds.values()
        self.runs.append((pixels.shape, list(adapters)))
        return [pixels.reshape(len(pixels), -1).sum(axis=1)[:, np.newaxis, np.newaxis]]


def image(value: float, side: int = 4) -> NDArray[np.float32]:
    return np.full((3, side, side), value, np.float32)


@pytest.fixture
def tower() -> Any:
    return Tower()


def test_images_of_one_size_share_runs_and_features_stay_in_order(tower: Any) -> None:
    runs = TowerRuns(tower, "float32", 2)
    runs.add(0, [image(1), image(2, side=2)], "a")
    runs.add(0, [image(3)], "a")
    runs.add(2, [image(4)], None)
    assert tower.runs == [], "a prompt that does not fit its images is refused before the tower"
    found = runs.finished()
    assert {n: [float(v[0, 0]) for v in own] for n, own in found.items()} == {
        0: [48.0, 24.0, 144.0],
        2: [192.0],
    }
    assert tower.runs == [
        ((2, 3, 4, 4), ["a", "a"]),
        ((1, 3, 4, 4), [None]),
        ((1, 3, 2, 2), ["a"]),
    ]


def test_pixels_are_freed_as_soon_as_too_many_wait(
    tower: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = image(0).nbytes
    monkeypatch.setattr(tower_runs, "_WAITING", 2 * each)
    runs = TowerRuns(tower, "float32", 8)
    alive: list[weakref.ref[Any]] = []
    most = 0
    for value in range(7):
        pixels = image(value)
        alive.append(weakref.ref(pixels))
        runs.add(0, [pixels], None)
        del pixels
        most = max(most, sum(ref() is not None for ref in alive))
    assert most == 2, "those that wait"
    assert [len(adapters) for _, adapters in tower.runs] == [3, 3]
    assert [float(own[0, 0]) for own in runs.finished()[0]] == [48.0 * n for n in range(7)]
    assert not any(ref() is not None for ref in alive)
