"""Adapters are matched with the checkpoint's model before tracing like with its graph after."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from loradeploy.adapter import Adapter, AdapterConfig
from loradeploy.adapter.adapter import Factors
from loradeploy.bundle.manifest import BaseIdentity
from loradeploy.errors import AdapterMismatchError
from loradeploy.export.adapters.given import check_adapters
from loradeploy.export.api import export
from tests.conftest import MakeAdapter


class TextModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.patches = nn.Conv2d(3, 6, 2)


def adapter(*modules: str, value: float) -> Adapter:
    A = np.ones((2, 6), np.float32)
    config = AdapterConfig(r=2, lora_alpha=2.0, target_modules=("q_proj",))
    pair = Factors(A, np.full((6, 2), value, np.float32))
    factors = {"q_proj": Factors(A, np.ones((6, 2), np.float32))}
    factors |= dict.fromkeys(modules, pair)
    return Adapter(config, factors)


def check(given: Adapter, *, merge: bool) -> None:
    base = BaseIdentity(name="m", kind="safetensors", digest="sha256:" + "0" * 64)
    with torch.device("meta"):
        model = TextModel()
    check_adapters(model, {"own": given}, task="causal-lm", base=base, merge=merge)


@pytest.mark.parametrize("merge", [False, True], ids=["side inputs", "merged"])
def test_zero_factors_of_a_module_that_is_not_exported_are_omitted(merge: bool) -> None:
    check(adapter("vision.q_proj", value=0.0), merge=merge)
    with pytest.raises(AdapterMismatchError, match=r"own: .*vision\.q_proj"):
        check(adapter("vision.q_proj", value=1.0), merge=merge)


@pytest.mark.parametrize("changed", [1, 96], ids=["in one row", "in all rows"])
def test_a_changed_weight_of_a_linear_layer_is_refused_as_such(
    changed: int, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = shutil.copytree(make_adapter(tiny_llama, target_modules=["q_proj"]), tmp_path / "a")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_file(tiny_llama / "model.safetensors")[name].copy()
    weight[:changed] += 1
    tensors[f"base_model.model.{name}"] = weight
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatchError, match=f"{name} is in the adapter and .*: merge it"):
        export(tiny_llama, tmp_path / "b", adapters={"a": adapter})
