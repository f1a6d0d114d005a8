"""The inputs and outputs of a traced model: by its task, and by what its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

from loradeploy.adapter.tasks import FEATURES, IMAGES, QUESTION_ANSWERING, Task
from loradeploy.bundle.names import (
    ATTENTION_MASK,
    END_LOGITS,
    INPUT_IDS,
    PIXEL_VALUES,
    POOLER_OUTPUT,
    POSITION_IDS,
    TOKEN_TYPE_IDS,
)

# Models with a pooled output, but without a pooler module.
_POOLS: Final = ("dinov2", "dinov2_with_registers")


def plain_inputs(model: Any, kind: Task) -> list[str]:
    """The inputs of `model` except the cache."""
    taken = parameters_of(model)
    if kind.name in IMAGES:
        return [PIXEL_VALUES]
    if (form := getattr(model, "text_form", None)) is not None:
        return list(form.inputs)
    names = [INPUT_IDS, ATTENTION_MASK]
    if kind.cached and POSITION_IDS in taken:
        names.append(POSITION_IDS)
    types = getattr(model.config, "type_vocab_size", None) or 0
    if not kind.cached and TOKEN_TYPE_IDS in taken and types > 1:
        names.append(TOKEN_TYPE_IDS)
    return names


def main_outputs(model: Any, kind: Task) -> list[str]:
    """The outputs of the model except the cache, including that of an encoder's pooler."""
    if (tower := getattr(model, "tower_kind", None)) is not None:
        return [tower.output]
    if kind.name == QUESTION_ANSWERING:
        return [kind.output, END_LOGITS]
    pools = getattr(model, "pooler", None) is not None or model.config.model_type in _POOLS
    pooled = kind.name in FEATURES and pools
    return [kind.output, POOLER_OUTPUT] if pooled else [kind.output]


def cache_names(name: Callable[[int, str], str], layers: int) -> list[str]:
    """The names of the cache's tensors, layer by layer."""
    return [name(i, part) for i in range(layers) for part in ("key", "value")]


def parameters_of(model: Any) -> Mapping[str, Any]:
    """The parameters of the model's forward, by name."""
    return inspect.signature(model.forward).parameters
