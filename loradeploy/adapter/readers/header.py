"""LoRA settings in the metadata of a safetensors file's header.

lora_adapter_metadata   diffusers (0.34 and later): PEFT's config as JSON; the component precedes
                        the name of each field, as in text_encoder.lora_alpha
ss_network_alpha        kohya's sd-scripts: alpha, which its loaders read from the tensors instead
lora_alpha              alpha, of other programs
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from loradeploy.adapter.adapter import Adapter
from loradeploy.adapter.config import AdapterConfig
from loradeploy.errors import AdapterError, shown
from loradeploy.parsing import parse_json

CONFIG: Final = "lora_adapter_metadata"
_ALPHAS: Final = ("ss_network_alpha", "lora_alpha")
# The values that sd-scripts writes if alpha is not set.
_UNSET: Final = ("", "None")


def config_in(header: Mapping[str, str], component: str) -> AdapterConfig | None:
    """PEFT's config of `component`, such as "text_encoder"; None if `header` has none.

    Raises:
        AdapterError: it is not JSON, or has a field that changes the numbers and is not supported.
    """
    if CONFIG not in header:
        return None
    try:
        values = parse_json(header[CONFIG])
    except ValueError as problem:
        raise AdapterError(f"{CONFIG} in its header is not valid JSON: {problem}") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{CONFIG} in its header is {shown(values)}, expected an object")
    start = f"{component}."
    own = {key.removeprefix(start): v for key, v in values.items() if key.startswith(start)}
    if not own:
        return None
    lacking = [name for name in ("r", "lora_alpha") if name not in own]
    if lacking:
        raise AdapterError(f"{CONFIG} in its header has no {start}{lacking[0]}")
    config = AdapterConfig.from_peft(own)
    refused = {
        "use_dora": config.use_dora,
        "bias": config.bias != "none" and config.bias,
        "modules_to_save": list(config.modules_to_save),
        "init_lora_weights": config.changes_base and config.init_lora_weights,
    }
    for name, value in refused.items():
        if value:
            raise AdapterError(
                f"{start}{name} in its header is {shown(value)}, which is not supported in this"
                " form"
            )
    return config


def alpha_in(header: Mapping[str, str]) -> tuple[str, float] | None:
    """The name and the value of the alpha that `header` states for the whole file, if any.

    Raises:
        AdapterError: it is not a finite number, or two different values are stated.
    """
    stated: dict[str, float] = {}
    for name in _ALPHAS:
        text = header.get(name, "")
        if text in _UNSET:
            continue
        try:
            stated[name] = float(text)
        except ValueError:
            stated[name] = math.nan
        if not math.isfinite(stated[name]):
            raise AdapterError(f"{name} in its header is {shown(text)}, expected a number")
    if len(set(stated.values())) > 1:
        raise AdapterError(f"its header states {stated}, which differ: remove the wrong one")
    return next(iter(stated.items()), None)


def check_header(header: Mapping[str, str], adapter: Adapter) -> None:
    """Raise AdapterError if the alpha that `header` states differs from that of `adapter`."""
    found = alpha_in(header)
    if found is None:
        return
    name, alpha = found
    for module in adapter.factors:
        read = adapter.config.alpha_of(module)
        if not math.isclose(read, alpha, rel_tol=1e-6):
            raise AdapterError(
                f"{name} in its header is {alpha:g}, and its config gives {module} alpha {read:g}:"
                " remove the wrong one"
            )
