"""A base quantized to 8 or 4 bits: close to the original, and trainable by every method."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loradeploy.adapter import AdapterConfig, load_adapter, save_adapter
from loradeploy.errors import MissingDependencyError, UsageError
from loradeploy.lora.inject import adapted, inject
from loradeploy.lora.layers.quantized import dequantized_weight, is_quantized, quantize
from tests.lora import tiny

# Bytes per weight, and the relative error of normally distributed weights.
WIDTHS = {"int8": (1, 0.01), "int4": (0.5, 0.12)}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "head": {"modules_to_save": ("lm_head",)},
    "bias": {"bias": "all"},
}


def bytes_of(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("bitsandbytes")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_quantized_base_is_small_and_close_to_the_original(
    width: str, dtype: torch.dtype
) -> None:
    base = tiny.model("llama-wide").to(dtype)
    linear = {
        name: module.weight.detach().clone()
        for name, module in base.named_modules()
        if type(module) is torch.nn.Linear
    }
    before, size = tiny.logits(base, "llama-wide").float(), bytes_of(base)
    packed = quantize(base, width)

    each, error = WIDTHS[width]
    assert set(linear) - set(packed) == {"lm_head"}
    numbers = sum(linear[name].numel() for name in packed)
    assert bytes_of(base) <= size - numbers * (dtype.itemsize - each)
    for name in packed:
        layer, weight = base.get_submodule(name), linear[name].float()
        assert is_quantized(layer)
        difference = dequantized_weight(layer).float() - weight
        assert 0 < difference.norm() / weight.norm() <= error, name
    after = tiny.logits(base, "llama-wide").float()
    assert 0 < (after - before).norm() <= 10 * error * before.norm()
    for name in packed:  # evaluation did not change the stored weight
        weight = linear[name].float()
        difference = dequantized_weight(base.get_submodule(name)).float() - weight
        assert difference.norm() <= error * weight.norm()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("width", WIDTHS)
def test_an_adapter_trains_on_a_quantized_base(width: str, method: str, tmp_path: Path) -> None:
    config = AdapterConfig(r=4, target_modules=("q_proj", "down_proj"), **METHODS[method])
    base = tiny.model("llama-wide")
    quantize(base, width, keep=config.modules_to_save)
    before = tiny.logits(base, "llama-wide")
    start = tiny.loss(base, "llama-wide").item()
    injection = inject(base, config, seed=1)
    assert tiny.difference(tiny.logits(base, "llama-wide"), before) <= 1e-4
    tiny.train(base, "llama-wide", injection.parameters())
    after = tiny.logits(base, "llama-wide")
    assert tiny.loss(base, "llama-wide").item() < start - 0.1
    with pytest.raises(UsageError, match="is quantized to 8 or 4 bits"):
        injection.merge()

    save_adapter(injection.adapter(), tmp_path / "a")
    injection.remove()
    assert torch.equal(tiny.logits(base, "llama-wide"), before)
    with adapted(base, load_adapter(tmp_path / "a")):
        assert torch.equal(tiny.logits(base, "llama-wide"), after)


@pytest.mark.usefixtures("library")
def test_layers_that_cannot_be_quantized_are_refused() -> None:
    with pytest.raises(
        UsageError, match="unknown precision 'int3' of a quantized base: use int8, int4"
    ):
        quantize(tiny.model("llama-wide"), "int3")
    with pytest.raises(UsageError, match="no linear layers that can be quantized to int4"):
        quantize(tiny.model("gpt2"), "int4")
    with pytest.raises(UsageError, match="no linear layers that can be quantized to int4"):
        quantize(tiny.model("llama"), "int4")  # 32 and 48 input features
    assert len(quantize(tiny.model("llama"), "int8")) == 14


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'loradeploy\[quantized\]'"):
        quantize(tiny.model("llama-wide"), "int4")
