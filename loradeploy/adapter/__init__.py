"""An adapter as data: configuration, tensors, scaling, digest. Needs numpy and safetensors only."""

from __future__ import annotations

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.files.digest import base_digest
from loradeploy.adapter.files.peft import load_adapter, save_adapter
from loradeploy.adapter.modules.targets import match_targets
from loradeploy.adapter.scaling import scaling

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Factors",
    "base_digest",
    "load_adapter",
    "match_targets",
    "save_adapter",
    "scaling",
]
