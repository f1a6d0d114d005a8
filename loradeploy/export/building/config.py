"""The config.json of a bundle: the base's, with what its adapters and its graph change."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loradeploy.adapter.heads import LABELED, problem_of, stated_problem, usual_problem
from loradeploy.adapter.tasks import (
    CLASSIFICATIONS,
    IMAGE_CLASSIFICATION,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)
from loradeploy.bundle.fitting.labels import output_count
from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.model_config import rotary_limit
from loradeploy.bundle.names import CONFIG_NAME
from loradeploy.errors import ModelError
from loradeploy.export.adapters.given import label_count, label_names
from loradeploy.export.bases.base import Base, Options
from loradeploy.export.read.files.settings import settings_beside
from loradeploy.export.read.files.source import Source
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from loradeploy.adapter.adapter import Adapter

logger = logger_of(__name__)


def with_config(
    base: Base, source: Source, manifest: Manifest, options: Options
) -> tuple[Manifest, dict[str, Any]]:
    """The manifest with the problem type of a classifier, and the object for config.json.

    Raises:
        UsageError: the adapters' heads cannot share one graph.
        ModelError: the config declares an unknown problem type.
    """
    settings = dict(base.config or settings_beside(source.directory, options.evidence.checkpoint))
    per_row = base.task in (SEQUENCE_CLASSIFICATION, IMAGE_CLASSIFICATION)
    if base.problem_type is not None and per_row and settings.get("problem_type") is None:
        settings["problem_type"] = base.problem_type
    count = label_count(options.adapters) if base.task in CLASSIFICATIONS else None
    if count is not None:
        count = output_count(manifest, settings) or count
    headless = options.merge or any(LABELED.fullmatch(name) for name in base.lacking)
    config = _with_labels(settings, count, label_names(options.adapters) if headless else None)
    if base.task == SEQUENCE_CLASSIFICATION:
        manifest, config = _with_problem(manifest, config, options.adapters)
    elif base.task == TOKEN_CLASSIFICATION:
        manifest = dataclasses.replace(manifest, problem_type=base.problem_type)
    if config and base.pad is not None:
        config["pad_token_id"] = base.pad
    if base.vocabulary is not None:
        config = _with_vocabulary(config, base.vocabulary)
    if (limit := rotary_limit(config)) is not None:
        config = with_positions(config, limit)
        logger.warning(
            "texts may have up to %d tokens: for longer ones the model (rope scaling of type"
            " longrope) would have to compute the cache again. If all texts are longer, replace"
            " short_factor by long_factor in config.json and export again",
            limit,
        )
    return manifest, config


def _with_problem(
    manifest: Manifest, config: dict[str, Any], adapters: Mapping[str, Adapter]
) -> tuple[Manifest, dict[str, Any]]:
    """Set the problem type of the classifier's head, or of the merged adapter's head."""
    stated = stated_problem(config, CONFIG_NAME, error=ModelError)
    count = output_count(manifest, config)
    if manifest.merged_adapter is None:
        return dataclasses.replace(manifest, problem_type=stated or usual_problem(count)), config
    (adapter,) = adapters.values()
    problem = problem_of(adapter, stated, count)
    entry = dataclasses.replace(manifest.merged_adapter, problem_type=problem)
    manifest = dataclasses.replace(manifest, problem_type=problem, merged_adapter=entry)
    return manifest, {**config, "problem_type": problem} if config else config


def _with_labels(
    config: Mapping[str, Any], count: int | None, names: tuple[str, ...] | None
) -> dict[str, Any]:
    """`config` with the number and names of the labels of the adapters' heads."""
    if count is None:
        return dict(config)
    if names is None or len(names) != count:
        known = config.get("id2label")
        if isinstance(known, Mapping) and len(known) == count:
            return dict(config)
        names = tuple(f"LABEL_{index}" for index in range(count))
    return {
        **config,
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _with_vocabulary(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """`config` with a vocabulary of `size` tokens, wherever it has one."""
    found = dict(config)
    if "vocab_size" in config:
        found["vocab_size"] = size
    if isinstance(config.get("text_config"), Mapping):
        found["text_config"] = {**config["text_config"], "vocab_size": size}
    return found


def with_positions(config: Mapping[str, Any], most: int) -> dict[str, Any]:
    """`config` with at most `most` positions, for clients that read only this limit."""
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        return {**config, "text_config": with_positions(inner, most)}
    stated = config.get("max_position_embeddings")
    fewer = type(stated) is int and stated > most
    return {**config, "max_position_embeddings": most} if fewer else dict(config)
