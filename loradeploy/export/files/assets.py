"""Write the base's files that decide what texts, images and vectors are: tokenizer, pooling, …"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loradeploy.adapter.tasks import GENERATING, SEQUENCE_CLASSIFICATION
from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import MANIFEST_NAME, PREPROCESSOR_NAME, TOKEN_TYPE_IDS
from loradeploy.bundle.text.beside import vocabulary_of
from loradeploy.bundle.text.settings import settings_in_config
from loradeploy.bundle.text.tokenizer_files import GENERATION_NAME, TOKENIZER_NAME
from loradeploy.bundle.trained_config import warn_of_trained_config
from loradeploy.errors import ModelError
from loradeploy.export.files.texts import replace_texts, without_lost_ids, write_recipe
from loradeploy.export.files.tokenizers import (
    correct_tokenizer,
    declare_token_types,
    make_tokenizer,
)
from loradeploy.files import copy_file, read_json, write_json

_COPIED: Final = (
    "tokenizer*",
    GENERATION_NAME,
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    PREPROCESSOR_NAME,
    "processor_config.json",
)


@dataclasses.dataclass(frozen=True, eq=False)
class AssetSources:
    """Where the files of a bundle's base come from.

    `directory`: that of its tokenizer. `recipes`: directories that may have an embedding
    model's pooling; the first that has is used. `merged`: the directory of the merged adapter, by
    name. `vocabulary`: the number of tokens, if the merged adapter changed it.
    """

    directory: Path
    recipes: tuple[Path, ...]
    merged: Mapping[str, Path]
    vocabulary: int | None


def write_assets(
    directory: Path, manifest: Manifest, base_config: Mapping[str, Any], sources: AssetSources
) -> tuple[Manifest, dict[str, Any]]:
    """Write the tokenizer, the settings of generation and images, and the pooling.

    Those of a merged adapter replace the base's. `base_config`: the object for config.json, which
    the caller writes; it is returned with what the merged adapter changes, after the manifest with
    the digests of the pooling's files.

    Raises:
        AdapterMismatchError: the merged adapter's tokenizer has words for which the graph has no
            row. BundleError, ModelError, ExportError: a file is invalid.
    """
    for pattern in _COPIED:
        for file in sorted(sources.directory.glob(pattern)):
            if file.is_file():
                _copy(file, directory)
    for recipe in sources.recipes[:1]:  # the config's directory, if it is not the tokenizer's
        file = recipe / GENERATION_NAME
        if file.is_file() and not (directory / GENERATION_NAME).exists():
            _copy(file, directory)
    settings = settings_in_config(base_config) if manifest.task in GENERATING else {}
    if settings and not (directory / GENERATION_NAME).exists():
        write_json(directory / GENERATION_NAME, settings)
    if not (directory / TOKENIZER_NAME).exists():
        make_tokenizer(sources.directory, directory)
    elif not (sources.directory / MANIFEST_NAME).is_file():  # a bundle's is corrected already
        correct_tokenizer(sources.directory, directory, vocabulary_of(manifest, base_config))
    config = dict(base_config)
    for name, source in sources.merged.items():
        warn_of_trained_config(name, source, base_config)
        config |= replace_texts(name, source, directory, manifest, base_config)
    if sources.vocabulary is not None:
        config = without_lost_ids(directory, config, sources.vocabulary, manifest.task)
    typed = any(spec.name == TOKEN_TYPE_IDS for spec in manifest.inputs)
    if typed and manifest.task == SEQUENCE_CLASSIFICATION:
        declare_token_types(sources.directory, directory)
    recipes = (*sources.merged.values(), *sources.recipes)
    if manifest.tower is None:  # a tower computes the vector itself
        sentence = write_recipe(recipes, directory, manifest.task)
        manifest = dataclasses.replace(manifest, sentence=sentence)
    return manifest, config


def _copy(file: Path, directory: Path) -> None:
    """Copy a file of the base.

    Raises:
        ModelError: it cannot be read, or has settings that are not JSON.
    """
    if file.name == GENERATION_NAME:
        read_json(file, error=ModelError)  # the message names the user's file, not the copy
    copy_file(file, directory / file.name, error=ModelError)
