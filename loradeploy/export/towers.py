"""The two-tower models (CLIP, SigLIP), whose towers are exported as separate bundles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from loradeploy.adapter.fitting.towers import IMAGE, TEXT, TOWER_TASKS
from loradeploy.bundle.names import IMAGE_EMBEDS, POOLER_OUTPUT, TEXT_EMBEDS


@dataclass(frozen=True)
class TowerKind:
    """A tower of a model type. `output`: transformers' name of the vector [batch, size].

    `padded`: whether each text is padded to the full length, without a mask for the padding.
    """

    tower: str
    output: str
    padded: bool = False


# By transformers' model type.
KINDS: Final[Mapping[str, tuple[TowerKind, ...]]] = {
    **dict.fromkeys(
        ("clip", "metaclip_2"), (TowerKind(TEXT, TEXT_EMBEDS), TowerKind(IMAGE, IMAGE_EMBEDS))
    ),
    "siglip": (TowerKind(TEXT, POOLER_OUTPUT, padded=True), TowerKind(IMAGE, POOLER_OUTPUT)),
    # Its image tower takes patches and their positions, not images.
    "siglip2": (TowerKind(TEXT, POOLER_OUTPUT, padded=True),),
}


def tower_kind(config: Mapping[str, Any], task: str) -> TowerKind | None:
    """The tower for `task` of a model with this config; None for a model without towers."""
    kinds = KINDS.get(str(config.get("model_type")), ())
    return next((kind for kind in kinds if TOWER_TASKS[kind.tower] == task), None)
