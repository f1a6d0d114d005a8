"""The part of an adapter for one tower of a two-tower model (CLIP, SigLIP).

A bundle contains one tower. An adapter may have been trained on both towers, or on the model of one
tower. Here modules are named as in the full model: `text_model.encoder.layers.0.…`,
`vision_model.encoder.layers.0.…`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from loradeploy.adapter.adapter import Adapter
from loradeploy.adapter.fitting.parts import tensor_names, without
from loradeploy.adapter.modules.names import with_names
from loradeploy.adapter.tasks import FEATURE_EXTRACTION, IMAGE_FEATURE_EXTRACTION
from loradeploy.errors import AdapterMismatchError
from loradeploy.printable import logger_of

logger = logger_of(__name__)

TEXT: Final = "text"
IMAGE: Final = "image"
# The modules of each tower in the full model: its body, and its projection if it has one.
TOWERS: Final[Mapping[str, tuple[str, ...]]] = {
    TEXT: ("text_model", "text_projection"),
    IMAGE: ("vision_model", "visual_projection"),
}
TOWER_TASKS: Final[Mapping[str, str]] = {TEXT: FEATURE_EXTRACTION, IMAGE: IMAGE_FEATURE_EXTRACTION}
# The endings of the names of transformers' classes for the body of a tower.
_BODIES: Final = {"TextModel": TEXT, "VisionModel": IMAGE}


def tower_part(adapter: Adapter, tower: str | None) -> Adapter:
    """Return `adapter` without its modules of the other tower, named as in the full model.

    `tower` is None for models without towers. A warning lists the trained modules of the other
    tower.

    Raises:
        AdapterMismatchError: no module is of `tower`, or the tower of the modules is unknown.
    """
    if tower is None:
        return adapter
    adapter = _with_full_names(adapter, tower)
    other = IMAGE if tower == TEXT else TEXT
    names = set(tensor_names(adapter))
    left = {name for name in names if _is_of(name, other)}
    if not left:
        return adapter
    if left == names:
        raise AdapterMismatchError(
            f"all of the adapter is for the {other} tower ({min(names)}, …), and this is the"
            f' {tower} tower: export the other one, `task="{TOWER_TASKS[other]}"`'
        )
    if trained := sorted(name for name in left if _is_trained(adapter, name)):
        more = f" and {len(trained) - 1} more" if len(trained) > 1 else ""
        logger.warning(
            "only the adapter's part for the %s tower is used: %s%s are for the %s tower, which"
            " is exported as a bundle of its own (task %s)",
            tower,
            trained[0],
            more,
            other,
            TOWER_TASKS[other],
        )
    return without(adapter, left)


def is_body(adapter: Adapter) -> bool:
    """Whether an adapter's modules are named as in a tower's body, not as in the full model."""
    return not any(_is_of(name, tower) for name in tensor_names(adapter) for tower in TOWERS)


def _with_full_names(adapter: Adapter, tower: str) -> Adapter:
    if not is_body(adapter):
        return adapter
    known = adapter.base_class or ""
    own = next((part for ending, part in _BODIES.items() if known.endswith(ending)), None)
    names = set(tensor_names(adapter))
    if own is None:
        text, image = (f"'{TOWERS[part][0]}.'" for part in (TEXT, IMAGE))
        raise AdapterMismatchError(
            f"{min(names)} does not show its tower, and this is the {tower} tower of a model with"
            f" two: put {text} or {image} before the names of the adapter's tensors"
        )
    return with_names(adapter, {name: f"{TOWERS[own][0]}.{name}" for name in names})


def _is_of(name: str, tower: str) -> bool:
    return name.partition(".")[0] in TOWERS[tower]


def _is_trained(adapter: Adapter, name: str) -> bool:
    """Whether the tensors of `name` change the base, unlike copies of its weights."""
    pair = adapter.factors.get(name)
    return pair.has_effect if pair is not None else name in adapter.saved or name in adapter.rows
