"""Adapters in the state_dict() of a model with PEFT's layers: the keys contain their names."""

from __future__ import annotations

import re
from typing import Final

from loradeploy.adapter.adapter import Adapter
from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.files.methods import METHODS
from loradeploy.adapter.files.roles import adapter_from_arrays
from loradeploy.adapter.readers.source import Source
from loradeploy.errors import AdapterError
from loradeploy.files import read_json
from loradeploy.names import ADAPTER_CONFIG_NAME

_NAMED: Final = re.compile(
    r".+\.(?:lora_(?:embedding_)?[AB]|lora_magnitude_vector|trainable_tokens_delta"
    r"|modules_to_save)\.(?!weight$|bias$)(?P<name>[^.]+)(?:\..+)?"
)
_OTHERS: Final = (".base_layer.", ".original_module.")


def read(source: Source) -> Adapter:
    """The chosen adapter. Its config is in a folder with the adapter's name, or beside the file.

    Copies of the base's weights are left out, because PEFT loads them from the base.
    """
    found = {key: _NAMED.fullmatch(key) for key in source.shapes}
    chosen = source.choose(match["name"] for match in found.values() if match)
    own = source.file.parent / chosen / ADAPTER_CONFIG_NAME
    if own.is_file():
        values = read_json(own, error=AdapterError)
    else:
        values = dict(source.settings("its rank and alpha"))
    method = (
        "ADALORA" if any(".lora_E." in key for key in source.shapes) else values.get("peft_type")
    )
    if isinstance(method, str) and method in METHODS:
        raise AdapterError(
            f"its peft_type is {method}, which is read as PEFT's save_pretrained writes it: save"
            " the adapter with that"
        )
    keys = [key for key, match in found.items() if match and match["name"] == chosen]
    config = AdapterConfig.from_peft(values)
    if config.bias != "none":
        raise AdapterError(
            f"bias is {config.bias!r}, and a state_dict() does not say which adapter a bias is of:"
            " save the adapter with PEFT's save_pretrained"
        )
    return adapter_from_arrays({key: source.array(key) for key in keys}, config)
