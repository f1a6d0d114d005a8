"""Read training data row by row: from a file, a folder or a Hugging Face dataset.

*.jsonl, *.json    an object on each line
*.csv              a header and rows; every value is text
*.parquet          a table
a directory        a dataset that `datasets` saved (save_to_disk), with its splits
ORGANIZATION/NAME  a dataset of the hub
"""

from __future__ import annotations

import csv
import difflib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from loradeploy.errors import DataError, first_line, listed_names, shown
from loradeploy.files import (
    MAX_TEXT_BYTES,
    UNREAD_FILES,
    check_directory,
    check_file,
    json_line,
    numbered_lines,
    read_text,
)
from loradeploy.lora.base.checkpoint import is_hub_id
from loradeploy.paths import expanded

# The location of a row, for messages, and its columns.
Row = tuple[str, dict[str, Any]]

_FIELD_BYTES: Final = 1 << 24
_SAVED_DATASET: Final = ("dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True)
class Source:
    """Data to read: its path or hub id, the split of a dataset, and `columns`.

    `columns`: column names in the data, by the task's names for them.
    """

    location: str | os.PathLike[str]
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The location as a path."""
        return expanded(self.location)

    def __str__(self) -> str:
        return os.fspath(self.location)


def rows(source: Source, needed: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of `source`, with columns renamed to the task's names.

    `needed`: required columns, which are checked in formats that have a header.

    Raises:
        DataError: the source is missing or unreadable, a row (named) is invalid, or a column is
            missing.
    """
    for where, row in _read(source, needed):
        yield where, _renamed(where, row, source.columns)


def is_dataset(source: Source) -> bool:
    """Whether `source` is a Hugging Face dataset, on disk or on the hub."""
    path = source.path
    if path.is_dir():
        return any((path / name).is_file() for name in _SAVED_DATASET)
    return not path.exists() and not path.suffix and is_hub_id(str(source))


def check_exists(source: Source, what: str = "training data") -> None:
    """Raise DataError if `source` is neither a file or directory nor can be a dataset of the hub.

    Called before the libraries for training are imported, which takes seconds. `what`: for the
    message.
    """
    if not source.path.exists() and not is_dataset(source):
        raise DataError(f"{source} does not exist: give the {what}")


def _read(source: Source, needed: Sequence[str]) -> Iterator[Row]:
    path = source.path
    if is_dataset(source):
        return _dataset_rows(source, needed)
    if path.is_dir():
        raise DataError(
            f"{path} is a directory: give a JSONL, CSV or Parquet file, or a saved dataset"
        )
    if path.suffix.lower() in UNREAD_FILES:
        raise DataError(
            f"{path}: {path.suffix} files are not read: give JSONL, CSV with commas, or Parquet"
        )
    readers = {".csv": _csv_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    return _json_lines(path) if reader is None else reader(source, needed)


def _renamed(where: str, row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    if not columns:
        return row
    if missing := [column for column in columns.values() if column not in row]:
        near = difflib.get_close_matches(missing[0], row, n=1)
        hint = f": did you mean {near[0]}?" if near else f": it has {listed_names(sorted(row))}"
        raise DataError(f"{where}: no column {missing[0]}{hint}")
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    return {**rest, **{ours: row[column] for ours, column in columns.items()}}


def _check_header(source: Source, header: Iterable[str], needed: Sequence[str]) -> None:
    present = list(header)
    missing = [name for ours in needed if (name := source.columns.get(ours, ours)) not in present]
    if missing and present:
        raise DataError(
            f"{source}: no column {' and no column '.join(missing)}: the header has"
            f" {listed_names(present)}; `columns` maps names to those of the data"
        )


def _text_of(path: Path) -> str:
    return read_text(path, error=DataError, limit=MAX_TEXT_BYTES, encoding="utf-8-sig")


def _json_lines(path: Path) -> Iterator[Row]:
    for where, line in numbered_lines(_text_of(path), path):
        value = json_line(
            where, line, error=DataError, finite=False, expected="each line is an object"
        )
        if not isinstance(value, dict):
            raise DataError(
                f"{where}: a JSON {type(value).__name__}, expected an object: write each example"
                " as an object on its own line"
            )
        yield where, value


def _csv_rows(source: Source, needed: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(_FIELD_BYTES)
    reader = csv.DictReader(io.StringIO(_text_of(source.path), newline=""), strict=True)
    try:
        header = list(reader.fieldnames or ())
        if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
            raise DataError(
                f"{source}: the header {shown(header[0])} is one column: separate columns by commas"
            )
        _check_header(source, header, needed)
        for row in reader:
            where = f"{source}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(
                    f"{where}: not the {len(header)} fields of the header:"
                    " put texts that contain commas in quotes"
                )
            yield where, row
    except csv.Error as problem:
        raise DataError(f"{source}, line {reader.line_num}: not CSV ({problem})") from None


def _parquet_rows(source: Source, needed: Sequence[str]) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    check_file(source.path, error=DataError)
    number = 0
    try:
        with ParquetFile(source.path) as file:
            _check_header(source, file.schema_arrow.names, needed)
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{source}, row {number}", row
    except (ArrowException, OSError) as problem:
        raise DataError(f"{source} is not a readable Parquet file: {first_line(problem)}") from None


def _dataset_rows(source: Source, needed: Sequence[str]) -> Iterator[Row]:
    from datasets import ClassLabel

    dataset = _split_of(source)
    _check_header(source, dataset.column_names, needed)
    names = {
        column: feature
        for column, feature in dataset.features.items()
        if isinstance(feature, ClassLabel)
    }
    for number, row in enumerate(dataset, start=1):
        # Classes are stored as numbers; the adapter saves their names.
        for column, feature in names.items():
            if isinstance(row[column], int) and row[column] >= 0:
                row[column] = feature.int2str(row[column])
        yield f"{source}, row {number}", row


def _split_of(source: Source) -> Any:
    import datasets

    try:
        if source.path.is_dir():
            check_directory(source.path, error=DataError, deep=True)
            found = datasets.load_from_disk(os.fspath(source.path))
        else:
            found = datasets.load_dataset(str(source), trust_remote_code=False)
    except Exception as problem:  # errors of the hub, the network, or a broken dataset
        raise DataError(
            f"{source} is not a file, and cannot be read as a dataset: {first_line(problem)}"
        ) from None
    if not isinstance(found, datasets.DatasetDict):
        return found
    if source.split not in found:
        raise DataError(f"{source} has no split {source.split!r}: it has {listed_names(found)}")
    return found[source.split]
