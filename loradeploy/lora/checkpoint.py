"""Where a base model's checkpoint is on disk."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Final

from loradeploy.adapter.base_files import (
    adapter_beside,
    graphs_in,
    has_weights,
    refuse_adapter,
    stray_weights,
    weight_files,
)
from loradeploy.errors import MissingDependencyError, ModelError, first_line
from loradeploy.files import check_directory, read_bytes
from loradeploy.lora.base_formats import check_unquantized, gguf_advice
from loradeploy.lora.loading import is_trusted
from loradeploy.parsing import parse_json
from loradeploy.printable import logger_of

logger = logger_of(__name__)

# What is needed of a repository; weights in pickles are never fetched.
_FETCHED: Final = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_checkpoint(model: str | os.PathLike[str], *, quantized: Collection[str] = ()) -> Path:
    """The directory of the checkpoint `model`: a Hugging Face directory, or an id of the hub.

    `quantized`: quantizers whose packed weights will do, by transformers' names.

    Raises:
        ModelError: it is not there, is an adapter, holds no config.json or no safetensors, or
            packed weights.
        MissingDependencyError: an id, and nothing to fetch it with.
    """
    text = os.fspath(model)
    place = Path(text).expanduser()
    if not place.exists() and is_hub_id(text):
        fetched = transformer_folder(fetch(text))
        refuse_adapter(fetched)
        check_unquantized(fetched, names=[text], allowed=quantized)
        return fetched
    if place.exists() and not any(place.glob("*.safetensors")) and (told := gguf_advice(place)):
        raise ModelError(told)
    if not place.is_dir():
        raise ModelError(f"{place} does not exist: give a Hugging Face model directory or id")
    check_directory(place, error=ModelError)
    if (folder := transformer_folder(place)) != place:
        place = folder
        check_directory(place, error=ModelError)
    refuse_adapter(place)
    if not (place / "config.json").is_file():
        raise ModelError(f"{place} holds no config.json: it is no Hugging Face model directory")
    if graphs_in(place) and not has_weights(place):
        raise ModelError(
            f"{place} holds ONNX graphs and no .safetensors: PyTorch is needed here, give the"
            " checkpoint that they were exported from"
        )
    weight_files(place)
    check_unquantized(place, allowed=quantized)
    return place


def warn_of_unused_files(directory: Path, advice: str, *, given: Iterable[Path] = ()) -> None:
    """Warn of what lies beside the base's weights in `directory` and is not loaded.

    `given`: adapters that are used; of another one `advice` says what to do.
    """
    used = any(place.resolve() == directory.resolve() for place in given)
    if adapter_beside(directory) and not used:
        logger.warning(
            "an adapter lies beside the base in %s and is not loaded: %s", directory, advice
        )
    if (stray := stray_weights(directory)) is not None:
        logger.warning("not loaded from %s: %s", directory, stray)


def transformer_folder(place: Path) -> Path:
    """Where the checkpoint of the directory `place` is: there, or where its modules.json says.

    sentence-transformers wrote the encoder to 0_Transformer/ beside its other modules.
    """
    try:
        modules = parse_json(read_bytes(place / "modules.json", error=ModelError), finite=False)
    except (ModelError, ValueError):
        return place
    first = modules[0] if isinstance(modules, list) and modules else {}
    path = first.get("path") if isinstance(first, dict) else None
    if isinstance(path, str) and path and not (place / "config.json").is_file():
        folder = place / path
        if folder.parent == place and (folder / "config.json").is_file():
            return folder
    return place


def pad_token(config: Any, tokenizer: Any) -> int:
    """The token that fills a batch: `config`'s, else that of the `tokenizer` (None where there is
    none), else the token that ends a text, else 0.

    A classifier on a decoder looks for the last token that is another one, so all must agree on it.
    """
    known = (
        config.pad_token_id,
        getattr(tokenizer, "pad_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
        0,
    )
    return next(int(token) for token in known if token is not None)


def is_hub_id(text: str) -> bool:
    """Whether `text` can be the id of a repository on the Hugging Face hub, not a path."""
    return not text.startswith((".", "~", "/")) and _HUB_ID.fullmatch(text) is not None


def fetch(repository: str) -> Path:
    """The local copy of the hub's `repository`, fetched where it is not there yet."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingDependencyError(
            f"{repository} is no directory, and to fetch it from the Hugging Face hub the export"
            " extra is needed: pip install 'loradeploy[export]'"
        ) from None
    try:
        code = ("*.py",) if is_trusted() else ()
        return Path(snapshot_download(repository, allow_patterns=[*_FETCHED, *code]))
    except Exception as problem:  # the hub's own, the network's, and offline errors
        raise ModelError(
            f"{repository} is no directory here and cannot be had from the Hugging Face hub:"
            f" {first_line(problem)}"
        ) from None
