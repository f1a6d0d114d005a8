"""A trial run finds whether another exporter's decoder may process a prompt in several parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loradeploy.bundle.manifest import TensorSpec
from loradeploy.bundle.sample import Sample
from loradeploy.errors import ExportError
from loradeploy.export.trial.padding import reads_in_parts
from tests.bundle.manifests import a_manifest

CACHE = ("batch", 1, "past", 1)
INPUTS = (
    TensorSpec("input_ids", "int64", ("batch", "sequence")),
    TensorSpec("attention_mask", "int64", ("batch", "total")),
    TensorSpec("past_key_values.0.key", "float32", CACHE),
)
OUTPUTS = (
    TensorSpec("logits", "float32", ("batch", "sequence", 2)),
    TensorSpec("present.0.key", "float32", ("batch", 1, "total", 1)),
)


def a_trial(kind: str) -> Any:
    """Return a simulated decoder whose logits are sums over all visible tokens."""

    def run(feeds: dict[str, Any], made: Any) -> dict[str, Any]:
        past = feeds["past_key_values.0.key"]
        behind = past.shape[2]
        new = feeds["input_ids"].astype(np.float32)[:, np.newaxis, :, np.newaxis]
        present = np.concatenate([past, new], axis=2)
        sums = np.cumsum(present, axis=2)[:, 0, behind:]
        if behind and new.shape[2] > 1 and kind == "no mask":
            sums = np.broadcast_to(sums[:, -1:], sums.shape)
        if behind and new.shape[2] > 1 and kind == "one token":
            raise ExportError("it takes one token behind a past")
        return {"logits": np.concatenate([sums, -sums], axis=2), "present.0.key": present}

    manifest = a_manifest(inputs=INPUTS, outputs=OUTPUTS, targets=(), saved=(), adapters={})
    return SimpleNamespace(manifest=manifest, random_side_inputs=dict, run=run)


@pytest.mark.parametrize(
    ("kind", "expected"), [("right", True), ("no mask", False), ("one token", False)]
)
def test_a_wrong_mask_after_a_past_is_detected(kind: str, expected: bool) -> None:
    sample = Sample(INPUTS, {"vocab_size": 50}, pad=0)
    assert reads_in_parts(a_trial(kind), sample, 0) is expected


def test_a_graph_without_a_cache_cannot_process_parts() -> None:
    trial = a_trial("right")
    trial.manifest = a_manifest()
    assert reads_in_parts(trial, Sample(INPUTS, {"vocab_size": 50}, pad=0), 0) is None
