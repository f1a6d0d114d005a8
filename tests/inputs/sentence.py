"""Directories as sentence-transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NEW, OLD = "sentence_transformers.sentence_transformer.modules.", "sentence_transformers.models."


def write(place: Path, *modules: tuple[str, str, dict[str, Any] | None], **files: Any) -> Path:
    """Write a directory with modules (type, folder, config) after a Transformer module."""
    place.mkdir(parents=True, exist_ok=True)
    encoder = {"idx": 0, "name": "0", "path": "", "type": f"{OLD}Transformer"}
    entries = [encoder]
    for index, (kind, path, config) in enumerate(modules, start=1):
        message = kind if "." in kind else OLD + kind
        entries.append({"idx": index, "name": str(index), "path": path, "type": message})
        if config is not None:
            (place / path).mkdir()
            (place / path / "config.json").write_text(json.dumps(config))
    (place / "modules.json").write_text(json.dumps(entries))
    for name, content in files.items():
        (place / f"{name}.json").write_text(json.dumps(content))
    return place
