"""Names of files that transformers, PEFT and sentence-transformers write."""

from __future__ import annotations

from typing import Final

ADAPTER_CONFIG_NAME: Final = "adapter_config.json"
MODEL_CONFIG_NAME: Final = "config.json"
# sentence-transformers' list of the modules of an embedding model.
MODULES_NAME: Final = "modules.json"
