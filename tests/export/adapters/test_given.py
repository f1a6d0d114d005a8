"""Adapters are matched with the checkpoint's model before tracing like with its graph after."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from loradeploy.adapter import Adapter, AdapterConfig
from loradeploy.adapter.adapter import Factors
from loradeploy.bundle.manifest import BaseIdentity
from loradeploy.errors import AdapterMismatchError
from loradeploy.export.adapters.given import check_adapters


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
