"""Find the checkpoint of a base model on disk, or fetch it from the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Final

from loradeploy.adapter.files.base_files import (
    adapter_beside,
    graphs_in,
    has_weights,
    refuse_adapter,
    stray_weights,
    weight_files,
)
from loradeploy.errors import MissingDependencyError, ModelError, first_line
from loradeploy.files import check_directory, read_bytes
from loradeploy.lora.base.formats import check_unquantized, gguf_advice
from loradeploy.lora.base.loading import is_trusted
from loradeploy.names import MODEL_CONFIG_NAME, MODULES_NAME
from loradeploy.parsing import parse_json
from loradeploy.paths import expanded, resolved
from loradeploy.printable import logger_of

logger = logger_of(__name__)

# The files to fetch from a repository; weights in pickles are never fetched.
_FETCHED: Final = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


# Endings of files, which are no names of repositories.
_FILES: Final = (".gguf", ".onnx", ".safetensors")


def find_checkpoint(model: str | os.PathLike[str], *, quantized: Collection[str] = ()) -> Path:
    """The directory of the checkpoint `model`: a Hugging Face directory, or an id of the hub.

    `quantized`: quantization methods to accept, by transformers' names.

    Raises:
        ModelError: it does not exist, is an adapter, lacks config.json or safetensors, or is
            quantized.
        MissingDependencyError: a hub id, and huggingface_hub is not installed.
    """
    text = os.fspath(model)
    path = expanded(text)
    if not path.exists() and is_hub_id(text):
        fetched = checkpoint_directory(fetch(text))
        refuse_adapter(fetched)
        check_unquantized(fetched, names=[text], allowed=quantized)
        return fetched
    if path.exists() and not any(path.glob("*.safetensors")) and (advice := gguf_advice(path)):
        raise ModelError(advice)
    if not path.is_dir():
        problem = "is not a directory" if path.exists() else "does not exist"
        raise ModelError(f"{path} {problem}: give a Hugging Face model directory or id")
    check_directory(path, error=ModelError)
    if (inner := checkpoint_directory(path)) != path:
        path = inner
        check_directory(path, error=ModelError)
    refuse_adapter(path)
    if not (path / MODEL_CONFIG_NAME).is_file():
        raise ModelError(f"{path} has no config.json: it is not a Hugging Face model directory")
    if graphs_in(path) and not has_weights(path):
        raise ModelError(
            f"{path} has ONNX graphs and no .safetensors, but this needs the PyTorch model: give"
            " the checkpoint that they were exported from"
        )
    weight_files(path)
    check_unquantized(path, allowed=quantized)
    return path


def warn_of_unused_files(directory: Path, advice: str, *, given: Iterable[Path] = ()) -> None:
    """Warn of adapters and weights in `directory` that are not loaded with the base.

    `given`: paths of adapters that are used. `advice`: what to do about one that is not.
    """
    used = any(resolved(path) == resolved(directory) for path in given)
    if adapter_beside(directory) and not used:
        logger.warning("the adapter beside the base in %s is not loaded: %s", directory, advice)
    if (stray := stray_weights(directory)) is not None:
        logger.warning("not loaded from %s: %s", directory, stray)


def checkpoint_directory(directory: Path) -> Path:
    """The directory of the checkpoint: `directory`, or a folder in it that modules.json names.

    sentence-transformers wrote the encoder to 0_Transformer/ beside its other modules.
    """
    try:
        modules = parse_json(read_bytes(directory / MODULES_NAME, error=ModelError), finite=False)
    except (ModelError, ValueError):
        return directory
    first = modules[0] if isinstance(modules, list) and modules else {}
    path = first.get("path") if isinstance(first, dict) else None
    if isinstance(path, str) and path and not (directory / MODEL_CONFIG_NAME).is_file():
        folder = directory / path
        if folder.parent == directory and (folder / MODEL_CONFIG_NAME).is_file():
            return folder
    return directory


def pad_token(config: Any, tokenizer: Any) -> int:
    """The padding token of `config`, else of `tokenizer` (may be None), else its end token, else 0.

    A classifier on a decoder searches for the last other token, so all parts must use the same.
    """
    known = (
        getattr(config, "pad_token_id", None),  # CodeGen's has none
        getattr(tokenizer, "pad_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
        0,
    )
    return next(int(token) for token in known if token is not None and token >= 0)


def is_hub_id(text: str) -> bool:
    """Whether `text` can be a repository id of the Hugging Face hub rather than a path."""
    if text.startswith((".", "~", "/")) or text.lower().endswith(_FILES):
        return False
    return _HUB_ID.fullmatch(text) is not None


def fetch(repository: str) -> Path:
    """The local copy of the hub's `repository`, downloaded if missing."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingDependencyError(
            f"{repository} is not a directory, and fetching it from the Hugging Face hub needs the"
            " export extra: pip install 'loradeploy[export]'"
        ) from None
    try:
        code = ("*.py",) if is_trusted() else ()
        return Path(snapshot_download(repository, allow_patterns=[*_FETCHED, *code]))
    except Exception as problem:  # errors of the hub, the network, or of being offline
        raise ModelError(
            f"{repository} is not a directory, and cannot be fetched from the Hugging Face hub:"
            f" {first_line(problem)}"
        ) from None
