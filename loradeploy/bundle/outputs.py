"""Which of a graph's outputs is the one that its task is about, whatever the exporter called it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from loradeploy.adapter.tasks import (
    FEATURE_EXTRACTION,
    IMAGE_CLASSIFICATION,
    SEQUENCE_CLASSIFICATION,
)
from loradeploy.bundle.names import LAST_HIDDEN_STATE, LOGITS, PRESENT

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest

# In the order they are looked for; those behind the first are other exporters'.
HIDDEN_NAMES: Final = (
    LAST_HIDDEN_STATE,
    *("token_embeddings", "hidden_states", "encoder_last_hidden_state"),
)
LOGITS_NAMES: Final = (LOGITS, "lm_logits", "prediction_logits")
_WHOLE_ROW: Final = (SEQUENCE_CLASSIFICATION, IMAGE_CLASSIFICATION)


def main_output(task: str, ranks: Mapping[str, int | None]) -> str | None:
    """The output that `task` is about, of outputs by name with their ranks; None where none shows.

    A name tells it, else being the only one of the rank that the task's has: 2 where a row gets one
    answer, [batch, labels], and 3 where each position gets one. An encoder may give whole sentences
    alone, [batch, hidden].
    """
    names = HIDDEN_NAMES if task == FEATURE_EXTRACTION else LOGITS_NAMES
    for name in names:
        if name in ranks:
            return name
    beside = {name: rank for name, rank in ranks.items() if not name.startswith(PRESENT)}
    wanted = 2 if task in _WHOLE_ROW else 3
    fitting = [name for name, rank in beside.items() if rank == wanted]
    if len(fitting) == 1:
        return fitting[0]
    if task == FEATURE_EXTRACTION and len(beside) == 1 and not fitting:
        return next(iter(beside))
    return None


def output_of(manifest: Manifest) -> str:
    """The name of the output that the bundle's task is about."""
    ranks = {spec.name: len(spec.shape) for spec in manifest.outputs}
    found = main_output(manifest.task, ranks)
    return manifest.outputs[0].name if found is None else found
