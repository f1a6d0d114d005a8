"""Writes random adapters for a bundle's base, without PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from loradeploy.adapter.files.tensors import write_arrays
from loradeploy.bundle.manifest import read_manifest

_SCALE = 0.05  # standard deviation of B: large enough to change generated texts


def make_adapters(
    bundle: Path,
    place: Path,
    count: int,
    *,
    rank: int,
    modules: tuple[str, ...] = (),
    seed: int = 0,
) -> dict[str, str]:
    """Write `count` PEFT directories to `place`, and return their paths by name.

    The adapters are on all targets of the bundle, or on those whose names end in `modules`. Calls
    with the same `seed` write the same adapters, which a session keeps once.
    """
    targets = read_manifest(bundle).targets
    if modules:
        targets = tuple(target for target in targets if target.module.endswith(modules))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({target.module.rpartition(".")[2] for target in targets}),
    }
    found = {}
    for number in range(count):
        directory = place / f"{place.name}{number}"
        directory.mkdir(parents=True)
        random = np.random.default_rng(seed + number)
        arrays = {}
        for target in targets:
            name = f"base_model.model.{target.module}"
            A = random.standard_normal((rank, target.in_features), np.float32)
            B = random.standard_normal((target.out_features, rank), np.float32)
            arrays[f"{name}.lora_A.weight"] = A / np.float32(target.in_features**0.5)
            arrays[f"{name}.lora_B.weight"] = B * np.float32(_SCALE)
        write_arrays(directory / "adapter_model.safetensors", arrays, {})
        (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        found[directory.name] = str(directory)
    return found
