"""Text files beside an adapter's weights (tokenizer, template, settings), and their digests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.files.digest import file_digest
from loradeploy.adapter.tasks import CLASSIFICATIONS
from loradeploy.bundle.names import NATIVE_SUFFIX
from loradeploy.bundle.outputs import LOGITS_NAMES
from loradeploy.bundle.text.tokenizer_files import (
    ADDED_NAME,
    GENERATION_NAME,
    SETTINGS_NAME,
    SPECIAL_NAME,
    TEMPLATE_NAME,
    TOKENIZER_NAME,
)
from loradeploy.bundle.text.vectors.files import ENCODER_NAMES
from loradeploy.bundle.text.vectors.recipe import flat_modules, recipe_directory
from loradeploy.errors import BundleError
from loradeploy.files import copy_file, inside, write_json
from loradeploy.names import MODULES_NAME

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest

TEXT_NAMES: Final = (
    *(TOKENIZER_NAME, SETTINGS_NAME, SPECIAL_NAME, ADDED_NAME, TEMPLATE_NAME),
    *("chat_template.json", GENERATION_NAME),
)


def text_directory(place: Path) -> Path:
    """The directory with the text files of an adapter whose weights are loaded from `place`.

    For an .onnx_adapter file in a bundle, this is the PEFT directory with the same name.
    """
    if place.suffix == NATIVE_SUFFIX and place.is_file():
        directory = place.with_suffix("")
        return directory if directory.is_dir() else place
    return place.parent if place.is_file() else place


def text_files(directory: Path) -> list[str]:
    """The names of the files for tokenizer, template and settings that exist in `directory`."""
    return [name for name in TEXT_NAMES if (directory / name).is_file()]


def describes_texts(directory: Path) -> bool:
    """Whether `directory` has text files or a recipe for embeddings."""
    return bool(text_files(directory)) or recipe_directory(directory) is not None


def copy_recipe(directory: Path, files: Iterable[str], output: Path) -> list[str]:
    """Copy sentence-transformers' `files` from `directory`; return their names in `output`.

    Files from the encoder's folder are written to `output` itself.
    """
    copied = []
    for name in files:
        base = name.rpartition("/")[2]
        target = output / (base if base in ENCODER_NAMES else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == MODULES_NAME:
            write_json(target, flat_modules(directory))
        else:
            copy_file(inside(directory, name), target, error=BundleError)
        copied.append(target.relative_to(output).as_posix())
    return copied


def digests_of(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """The digests of the files `names` of `directory`."""
    return {name: file_digest(directory / name) for name in sorted(names)}


def check_digests(directory: Path, digests: Mapping[str, str]) -> None:
    """Raise BundleError unless the files in `directory` are those that came with the bundle."""
    for name, digest in digests.items():
        file = inside(directory, name)
        if not file.is_file() or file_digest(file) != digest:
            raise BundleError(
                f"{directory / name} is not the file that came with the bundle: export again"
            )


def vocabulary_of(manifest: Manifest, config: Mapping[str, Any]) -> int:
    """The number of words that the graph has rows for, without those that adapters add."""
    if manifest.added_tokens is not None:
        return manifest.added_tokens.base
    for output in manifest.outputs:
        if (
            manifest.task not in CLASSIFICATIONS  # whose logits are of labels
            and output.name in LOGITS_NAMES
            and len(output.shape) == 3
            and isinstance(output.shape[-1], int)
        ):
            return output.shape[-1]
    inner = config.get("text_config")
    for values in (config, inner if isinstance(inner, Mapping) else {}):
        if isinstance(values.get("vocab_size"), int):
            return int(values["vocab_size"])
    return 1 << 62  # unknown
