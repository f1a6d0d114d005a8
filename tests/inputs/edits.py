"""Change JSON files of models, adapters and bundles."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def edited_json(file: Path) -> Iterator[Any]:
    """Yield the value in `file`; what the context changes in it is written back."""
    value = json.loads(file.read_text(encoding="utf-8"))
    yield value
    file.write_text(json.dumps(value), encoding="utf-8")
