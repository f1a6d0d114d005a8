"""Two small fine-tuning data sets made from BBC News: write the headline, or name the topic."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loradeploy.files import atomic_file

_WORDS = 60


@dataclass(frozen=True)
class Story:
    """A news story: its first words, its headline and its topic."""

    text: str
    headline: str
    topic: str

    @property
    def prompt(self) -> str:
        return f"News story: {self.text}\n\nAnswer:"


def stories(news: Path, *, seed: int = 0) -> list[Story]:
    """Read the stories in `news`, a directory with one directory per topic, shuffled by `seed`."""
    found = list(_read(news))
    random.Random(seed).shuffle(found)
    return found


def full_stories(news: Path) -> list[Story]:
    """Read the stories with all of their words; their lengths vary a lot."""
    found = list(_read(news, words=None))
    random.Random(0).shuffle(found)
    return found


def write_tasks(training: list[Story], directory: Path) -> dict[str, Path]:
    """Write a JSONL file of prompts and completions for each task; return the files by task."""
    answers = {
        "headline": [story.headline for story in training],
        "topic": [story.topic for story in training],
    }
    files = {}
    for task, completions in answers.items():
        files[task] = directory / f"{task}.jsonl"
        with atomic_file(files[task]) as temporary:
            temporary.write_text(
                "".join(
                    json.dumps({"prompt": story.prompt, "completion": f" {completion}"}) + "\n"
                    for story, completion in zip(training, completions, strict=True)
                ),
                encoding="utf-8",
            )
    return files


def _read(news: Path, *, words: int | None = _WORDS) -> Iterator[Story]:
    for file in sorted(news.glob("*/*.txt")):
        # The stories are UTF-8, except for a few pound signs.
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
        headline, body = lines[0].strip(), " ".join(" ".join(lines[1:]).split())
        text = " ".join(body.split(" ")[:words])
        if headline and text and "\ufffd" not in text + headline:
            yield Story(text=text, headline=headline, topic=file.parent.name)
