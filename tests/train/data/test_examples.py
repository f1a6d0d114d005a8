"""Training data is read from every documented format; an invalid line is named."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from loradeploy.errors import DataError
from loradeploy.train.data.examples import (
    label_names,
    read_conversations,
    read_labeled_texts,
    read_measured_texts,
    read_multi_label_texts,
    value_names,
)
from loradeploy.train.data.sources import Source
from tests.inputs.training_data import as_form
from tests.train.conftest import write_lines


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no examples"),
        ("\n \n", "has no examples"),
        ('{"text": "fine"}\n{"text": \n', "line 2: not JSON"),
        ('[\n{"text": "fine"}]', "line 1: not JSON .* each line is an object"),
        ('{"text": "fine"}\n\n[1]\n', "line 3: a JSON list"),
        ('{"prompt": "a"}\n', "line 1: has prompt; it needs"),
        ('{"question": "a", "answer": "b"}\n', "line 1: has answer, question; it needs"),
        ('{"text": "a", "completion": "b"}\n', "line 1: has both completion and text"),
        ('{"completion": "b"}\n', "line 1: prompt is None"),
        ('{"prompt": "a", "completion": ""}\n', "line 1: completion is ''"),
        ('{"prompt": 3, "completion": "b"}\n', "line 1: prompt is 3"),
        ('{"text": "\\ud800"}\n', "line 1: .*contains an unpaired surrogate"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: messages is not a list of objects"),
        ('{"messages": "hello"}\n', "line 1: messages is not a list of objects"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "nothing to learn"),
        ('{"messages": [{"role": "assistant", "content": ""}]}\n', "line 1: content is ''"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_broken_line_is_named(content: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as refusal:
        read_conversations(Source(file))
    assert "data.jsonl" in str(refusal.value)


CLASSIFIERS = {
    "single-label": read_labeled_texts,
    "multi-label": read_multi_label_texts,
    "regression": read_measured_texts,
}


@pytest.mark.parametrize(
    ("problem_type", "label", "needed"),
    [
        ("single-label", ["a", "b"], "a name or a whole number"),
        ("single-label", 0.5, "a name or a whole number"),
        ("multi-label", 3, "a list of names"),
        ("multi-label", [1, 2], "a list of names"),
        ("regression", "high", "a number, or a list of numbers,"),
        ("regression", [], "a number, or a list of numbers,"),
        ("regression", [1.0, None], "a number, or a list of numbers,"),
        ("regression", float("inf"), "a number, or a list of numbers,"),
        ("regression", True, "a number, or a list of numbers,"),
    ],
)
def test_a_label_that_contradicts_the_problem_type_is_refused(
    problem_type: str, label: Any, needed: str, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"text": "x", "label": label}])
    with pytest.raises(DataError, match=f'expected {needed} for `problem_type="{problem_type}"`'):
        CLASSIFIERS[problem_type](Source(file))


def test_every_row_must_have_the_same_number_of_regression_values(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": [1.0, 2]}, {"text": "y", "label": [0.5, -1.0]}]
    examples = read_measured_texts(Source(write_lines(tmp_path / "a.jsonl", rows)))
    assert [example.values for example in examples] == [(1.0, 2.0), (0.5, -1.0)]
    assert value_names(examples) == ("LABEL_0", "LABEL_1")
    one = write_lines(tmp_path / "b.jsonl", [{"text": "x", "label": 3}])
    assert value_names(read_measured_texts(Source(one))) == ()
    rows.append({"text": "z", "label": 1.0})
    with pytest.raises(DataError, match="line 3: label has 1 numbers, those before it have 2"):
        read_measured_texts(Source(write_lines(tmp_path / "a.jsonl", rows)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,topic\nx,1\n", "no column label: the header has text, topic"),
        ("a.csv", 'text,label\n"x,1\n', "not CSV"),
        ("a.csv", "text,label\nx,\n", "line 2: label is ''"),
        ("a.csv", "text,label\nx,y\none, two,y\n", "line 3: not the 2 fields .* in quotes"),
        ("a.csv", "text,label\nx\n", "line 2: not the 2 fields"),
        ("a.csv", "text;label\nx;y\n", "header 'text;label' is one column: separate .* by commas"),
        ("a.tsv", "text\tlabel\nx\ty\n", "a.tsv: .tsv files are not read: give JSONL, CSV"),
        ("a.jsonl.gz", "x", ".gz files are not read"),
        ("a.json", '[{"text": "x", "label": "y"}]', "line 1: a JSON list, .* on its own line"),
        ("a.csv", "", "has no examples"),
        ("a.csv", "text,label\n", "has no examples"),
        ("a.jsonl", '{"text": "x", "label": null}\n', "line 1: label is None"),
        ("a.jsonl", '{"text": "x", "label": true}\n', "line 1: label is True"),
        ("a.jsonl", '{"label": "x"}\n', "line 1: text is None"),
    ],
)
def test_a_broken_label_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_labeled_texts(Source(tmp_path / name))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no folder of .txt files"),
        ({"loose.txt": "x"}, "has no folder of .txt files"),
        ({"a/1.txt": "x", "b/1.txt": " \n"}, r"1.txt is empty"),
    ],
)
def test_a_directory_without_classes_is_reported(
    files: dict[str, str], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_labeled_texts(Source(tmp_path))


def test_a_language_model_learns_from_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a directory: give a JSONL, CSV or Parquet file"):
        read_conversations(Source(tmp_path))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "folders"])
def test_labeled_texts_are_the_same_from_every_format(suffix: str, tmp_path: Path) -> None:
    rows = [("one, two\nthree", "a"), ('say "hi" \u2028 there', "b")]
    place = tmp_path / f"data.{suffix}"
    if suffix == "csv":
        with place.open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([("text", "id", "label"), *((t, 7, n) for t, n in rows)])
    elif suffix == "jsonl":
        write_lines(place, [{"text": text, "label": name, "id": 7} for text, name in rows])
    else:
        for text, label in rows:
            (place / label).mkdir(parents=True)
            (place / label / "1.txt").write_text(text, encoding="utf-8")
    assert [(example.text, example.label) for example in read_labeled_texts(Source(place))] == rows


def test_a_text_can_contain_any_line_separator(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\x0bfour"
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    # JSON escapes control characters, except those above 0x7f.
    (example,) = read_conversations(Source(file))
    assert example.parts == ((text, True),)


def test_numeric_labels_are_in_numeric_order(tmp_path: Path) -> None:
    lines = [{"text": "x", "label": label} for label in (10, 2, 1)]
    assert label_names(read_labeled_texts(Source(write_lines(tmp_path / "a.jsonl", lines)))) == (
        "1",
        "2",
        "10",
    )
    lines.append({"text": "x", "label": "other"})
    named = label_names(read_labeled_texts(Source(write_lines(tmp_path / "a.jsonl", lines))))
    assert named == ("1", "10", "2", "other")


LABELS: dict[str, Any] = {"single-label": "x", "multi-label": ["x"], "regression": 0.5}


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("problem", CLASSIFIERS)
def test_a_row_can_have_a_pair_of_texts(problem: str, form: str, tmp_path: Path) -> None:
    rows = [{"text": text, "text_pair": "b, c", "label": LABELS[problem]} for text in "ad"]
    if form == "csv" and problem == "multi-label":
        rows = [{**row, "label": "x"} for row in rows]
    read = CLASSIFIERS[problem]
    examples = read(Source(as_form(form, tmp_path / "data", rows)))
    assert [(example.text, example.pair) for example in examples] == [("a", "b, c"), ("d", "b, c")]
    if form == "jsonl":
        rows[1]["text_pair"] = None
        with pytest.raises(DataError, match="line 2: some rows have a text_pair and others"):
            read(Source(write_lines(tmp_path / "some.jsonl", rows)))
        with pytest.raises(DataError, match="line 1: text_pair is '', expected a text"):
            read(Source(write_lines(tmp_path / "some.jsonl", [{**rows[0], "text_pair": ""}])))
