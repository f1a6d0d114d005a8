"""Small training sets, and a training run short enough for a test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loradeploy.train.api import train
from loradeploy.train.result import TrainResult

Quick = Callable[..., TrainResult]

WORDS = {
    "business": ["shares", "profit", "market", "bank", "oil", "trade", "price", "growth"],
    "sports": ["match", "goal", "coach", "team", "cup", "season", "injury", "champion"],
    "tech": ["software", "phone", "web", "chip", "game", "online", "network", "user"],
}


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run on one thread: tiny matrices gain nothing from more, and synchronizing them is slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if "slow" in request.keywords else 1)
    yield
    torch.set_num_threads(threads)


def write_lines(file: Path, lines: list[Any]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def write_lessons(file: Path) -> Path:
    return write_lines(
        file,
        [
            {"prompt": f"Question {'!' * n} {n}:", "completion": f" answer {n % 3}."}
            for n in range(12)
        ],
    )


def train_quickly(model: Path, data: Path, output: Path, **flags: Any) -> TrainResult:
    """Call `train` with few steps on short texts."""
    settings = {"max_steps": 4, "batch_size": 4, "rank": 4, "max_length": 64, **flags}
    return train(model, data, output, **settings)


@pytest.fixture
def lessons(tmp_path: Path) -> Path:
    """JSONL with twelve prompts of different lengths and completions."""
    return write_lessons(tmp_path / "lessons.jsonl")


@pytest.fixture
def topics(tmp_path: Path) -> Path:
    """Class directories with eight texts of each of three topics that share no word."""
    place = tmp_path / "topics"
    for topic, words in WORDS.items():
        (place / topic).mkdir(parents=True)
        for number in range(8):
            text = " ".join(words[(number * step) % 8] for step in range(3 + number))
            (place / topic / f"{number}.txt").write_text(text, encoding="utf-8")
    return place


@pytest.fixture
def quick() -> Quick:
    """A function that calls `train` with few steps on short texts."""
    return train_quickly
