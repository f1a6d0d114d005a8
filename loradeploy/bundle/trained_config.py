"""Compare the config.json that a trainer saved beside an adapter with the base's.

Some trainers change settings of the model that no weight shows, such as the rotary scaling of a
longer context (LongLoRA), and save them with the adapter. PEFT does not read that file: it computes
with the settings of the base that it is given, as loradeploy does.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loradeploy.bundle.model_config import model_config
from loradeploy.errors import AdapterError, listed, shown
from loradeploy.printable import logger_of

logger = logger_of(__name__)

# Settings that change a model's numbers and that no shape of a weight shows.
_SETTINGS: Final = (
    *("hidden_act", "hidden_activation", "activation_function"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
    *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
)
_LISTED: Final = 3


def warn_of_trained_config(name: str, directory: Path, base: Mapping[str, Any]) -> None:
    """Log the settings in which the config.json of the adapter `name` differs from `base`.

    `directory`: the adapter's, where a file that cannot be read is ignored. `base`: the contents of
    the base's config.json.
    """
    own: Mapping[str, Any] = {}
    with contextlib.suppress(AdapterError):
        own = model_config(directory, error=AdapterError)
    if changes := changed_settings(own, base):
        _warn(name, listed(changes, _LISTED))


def changed_settings(own: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Both values of each setting that `own` and `base`, contents of config.json, do not share.

    A setting that one of them lacks is not compared, as versions of transformers write different
    ones; only rotary scaling is absent in a file that states another setting of the rotary
    embedding.
    """
    ours, theirs = _texts(own), _texts(base)
    found = [
        f"{name} is {shown(ours[name])}, the base's {shown(theirs[name])}"
        for name in _SETTINGS
        if ours.get(name) is not None
        and theirs.get(name) is not None
        and ours[name] != theirs[name]
    ]
    rotary, of_base = _rotary(ours), _rotary(theirs)
    if rotary is None or of_base is None:
        return found
    alike = rotary["rope_type"] == of_base["rope_type"]  # versions write other details of it
    for name in sorted({*rotary, *of_base}):
        one, other = rotary.get(name), of_base.get(name)
        absent = None in (one, other) and (alike or name == "rope_theta")
        if one != other and not absent:
            found.append(f"{name} is {shown(one)}, the base's {shown(other)}")
    return found


def _texts(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _rotary(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rotary settings, as transformers 4 or 5 writes them; None if it has none or several.

    Without scaling, `rope_type` is "default".
    """
    given = config.get("rope_parameters", config.get("rope_scaling"))
    if given is None and config.get("rope_theta") is None:
        return None
    settings = given if isinstance(given, Mapping) else {}
    if any(isinstance(value, Mapping) for value in settings.values()):
        return None  # one for each kind of layer
    kind = settings.get("rope_type", settings.get("type")) or "default"
    found = {"rope_type": kind, "rope_theta": settings.get("rope_theta", config.get("rope_theta"))}
    if kind != "default":
        found |= {n: v for n, v in settings.items() if n not in ("type", *found) and v is not None}
    return found


@functools.cache  # warns once, although an export and a run read an adapter several times
def _warn(name: str, changes: str) -> None:
    logger.warning(
        "%s: the config.json beside it states other settings of the model than the base (%s): if"
        " the adapter was trained with them, its outputs on this base differ from the training's."
        " Export a base with these settings",
        name,
        changes,
    )
