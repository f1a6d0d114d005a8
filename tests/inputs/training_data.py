"""Small training sets of each task."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from tests.inputs.sounds import save, tone
from tests.train.conftest import WORDS, write_lines

# What is said of a tone, by its frequency in Hz.
TONES = {300: "low", 900: "a middle tone", 2500: "high"}


def sentences(topic: str) -> list[str]:
    words = WORDS[topic]
    return [" ".join(words[(n * k + n) % 8] for k in range(1, 5)) for n in range(8)]


def multi_label(file: Path) -> Path:
    rows = []
    for first, second in (("business", "tech"), ("tech", "sports"), ("sports", "business")):
        for one, other in zip(sentences(first), sentences(second), strict=True):
            rows.append({"text": f"{one} {other}", "label": [first, second]})
            rows.append({"text": one, "label": [first]})
    return write_lines(file, rows)


def regression(file: Path) -> Path:
    rows = [{"text": text, "label": 1.5} for text in sentences("business")]
    rows += [{"text": text, "label": -0.5} for text in sentences("sports")]
    return write_lines(file, rows)


def tagged(file: Path) -> Path:
    rows = []
    for topic in WORDS:
        for text in sentences(topic):
            words = text.split()
            rows.append({"tokens": ["the", *words], "tags": ["O", *[topic] * len(words)]})
    return write_lines(file, rows)


def pairs(file: Path, *, negative: bool = False) -> Path:
    rows = []
    for topic, other in zip(WORDS, reversed(WORDS), strict=True):
        for anchor, positive in zip(sentences(topic), reversed(sentences(topic)), strict=True):
            row = {"anchor": anchor, "positive": positive}
            rows.append({**row, "negative": sentences(other)[0]} if negative else row)
    return write_lines(file, rows)


def as_form(form: str, place: Path, lines: list[dict[str, Any]]) -> Path:
    if form == "jsonl":
        return write_lines(place.with_suffix(".jsonl"), lines)
    if form == "csv":
        file = place.with_suffix(".csv")
        with file.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
        return file
    if form == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(lines), place.with_suffix(".parquet"))
        return place.with_suffix(".parquet")
    dataset = datasets.Dataset.from_list(lines)
    if form == "dataset-of-splits":
        dataset = datasets.DatasetDict({"train": dataset, "test": dataset.select([0])})
    dataset.save_to_disk(place)
    return place


def translations(file: Path) -> Path:
    pairs = {"one": "eins", "two": "zwei und zwanzig", "three": "drei"}
    rows = [{"source": f"translate {w}", "target": t} for w, t in pairs.items()]
    return write_lines(file, rows * 2)


def spoken(file: Path, **more: Any) -> Path:
    """Write tones beside `file`, and their names as transcripts to `file`."""
    rows = []
    for seed in range(2):
        for hertz, word in TONES.items():
            name = f"{hertz}-{seed}.wav"
            save(file.parent / name, tone(hertz, 0.6, noise=0.05, seed=seed))
            rows.append({"audio": name, "target": word, "language": "en", **more})
    return write_lines(file, rows)
