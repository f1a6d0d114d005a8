"""Manifests without a graph."""

from __future__ import annotations

from typing import Any

from loradeploy.bundle.manifest import (
    AdapterEntry,
    BaseIdentity,
    LoraTarget,
    Manifest,
    SavedTarget,
    TensorSpec,
)


def a_manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "task": "causal-lm",
        "mode": "side-inputs",
        "base": BaseIdentity("tiny", "sha256:00", "checkpoint"),
        "precision": "fp32",
        "opset": 23,
        "inputs": (TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        "outputs": (TensorSpec("logits", "float32", ("batch", "sequence", 7)),),
        "targets": (
            LoraTarget("l.q", 3, 4, "l.q.lora_A", "l.q.lora_B", "l.q.weight", False, "metadata"),
            LoraTarget("l.k", 3, 4, "l.k.lora_A", "l.k.lora_B", "w", True, "name", slice=(0, 4)),
            LoraTarget("l.v", 3, 2, "l.v.lora_A", "l.v.lora_B", "w", True, "name", slice=(4, 6)),
        ),
        "saved": (SavedTarget("head.weight", "head.weight", (5, 4), True),),
        "adapters": {"sport": AdapterEntry("sha256:01", "adapters/sport")},
    }
    return Manifest(**{**values, **changes})
