"""Find the main output of a graph for its task, whatever name the exporter gave it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from loradeploy.adapter.tasks import (
    FEATURES,
    IMAGE_CLASSIFICATION,
    QUESTION_ANSWERING,
    SEQUENCE_CLASSIFICATION,
    VISION_TOWER,
)
from loradeploy.bundle.names import (
    IMAGE_EMBEDS,
    IMAGE_FEATURES,
    LAST_HIDDEN_STATE,
    LOGITS,
    PRESENT,
    START_LOGITS,
    TEXT_EMBEDS,
)

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest

# In order of precedence; all but the first are names of other exporters.
HIDDEN_NAMES: Final = (
    LAST_HIDDEN_STATE,
    *("token_embeddings", "hidden_states", "encoder_last_hidden_state"),
)
LOGITS_NAMES: Final = (LOGITS, "lm_logits", "prediction_logits")
_NAMES: Final = {
    **dict.fromkeys(FEATURES, (TEXT_EMBEDS, IMAGE_EMBEDS, *HIDDEN_NAMES)),
    VISION_TOWER: (IMAGE_FEATURES,),
    QUESTION_ANSWERING: (START_LOGITS,),
}
_ONE_PER_ROW: Final = (SEQUENCE_CLASSIFICATION, IMAGE_CLASSIFICATION)


def main_output(task: str, ranks: Mapping[str, int | None]) -> str | None:
    """The main output for `task`, from the ranks of all outputs by name; None if it is ambiguous.

    It is found by name, or as the only output of the expected rank: 2 for one result per row,
    [batch, labels], and 3 for one per position. An encoder may have only an output for sentences,
    [batch, hidden].
    """
    names = _NAMES.get(task, LOGITS_NAMES)
    for name in names:
        if name in ranks:
            return name
    if task == QUESTION_ANSWERING:
        return None  # nothing but their names tells the two outputs apart
    others = {name: rank for name, rank in ranks.items() if not name.startswith(PRESENT)}
    expected_rank = 2 if task in _ONE_PER_ROW else 3
    fitting = [name for name, rank in others.items() if rank == expected_rank]
    if len(fitting) == 1:
        return fitting[0]
    if task in FEATURES and len(others) == 1 and not fitting:
        return next(iter(others))
    return None


def output_of(manifest: Manifest) -> str:
    """The name of the main output of the bundle's task."""
    ranks = {spec.name: len(spec.shape) for spec in manifest.outputs}
    found = main_output(manifest.task, ranks)
    return manifest.outputs[0].name if found is None else found
