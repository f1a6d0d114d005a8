"""What transformers keeps in fp32 in a model of fp16 is exact in the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import loradeploy as ld
from tests.conftest import MakeAdapter
from tests.export.reference import difference
from tests.export.small import SMALL
from tests.tolerances import tolerance

FAR = 6000


def test_rotary_frequencies_of_an_fp16_graph_are_exact_at_far_positions(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {**SMALL, "max_position_embeddings": 2 * FAR}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).eval()
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):  # scores that depend on the positions
            getattr(model.model.layers[0].self_attn, name).weight *= 20
    model.save_pretrained(tmp_path / "model")
    ld.export(tmp_path / "model", tmp_path / "half", precision="fp16")
    ids, positions = np.arange(3, 11)[None], np.array([[0, 1, 2, 3, *range(FAR, FAR + 4)]])

    def logits(at: np.ndarray[Any, Any]) -> Any:
        with torch.no_grad():
            tokens, places = torch.from_numpy(ids), torch.from_numpy(at)
            return model(input_ids=tokens, position_ids=places).logits.numpy()

    session = ld.AdapterSession(tmp_path / "half")
    empty = np.zeros((1, 2, 0, 8), np.float16)
    past = {f"past_key_values.0.{part}": empty for part in ("key", "value")}
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}
    found = session.run(["logits"], {**feeds, **past})[0].astype(np.float32)
    expected, near = logits(positions), logits(np.arange(8)[None])
    scale = float(np.abs(expected).max())
    assert difference(expected, near) > 0.05 * scale, "the positions change nothing"
    assert difference(found, expected) <= tolerance("fp16-rounding") * scale


@pytest.mark.parametrize("merge", [False, True], ids=["side inputs", "merged"])
def test_weights_that_transformers_keeps_in_fp32_are_not_rounded(
    merge: bool, tiny_t5: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    adapter = make_adapter(tiny_t5, task="seq2seq-lm", r=2, scale=0.2, target_modules=["q"])
    ld.export(tiny_t5, tmp_path / "b", adapters={"a": adapter}, precision="fp16", merge=merge)
    weights = load_file(tiny_t5 / "model.safetensors")
    for part, file in (("encoder", "encoder.onnx"), ("decoder", "model.onnx")):
        wo = [
            values for name, values in weights.items() if name.startswith(part) and ".wo." in name
        ]
        graph = ir.load(tmp_path / "b" / file).graph
        found = [
            value.const_value.numpy()
            for value in graph.initializers.values()
            if value.const_value is not None and value.dtype is ir.DataType.FLOAT
        ]
        assert wo
        for values in wo:
            assert any(
                np.array_equal(each, values) or np.array_equal(each, values.T) for each in found
            )


@pytest.mark.parametrize("entry", ["wo", "gate.weight", "norm", "experts.*.bias", "blocks.1"])
def test_an_entry_keeps_the_weights_that_transformers_loads_in_fp32(
    entry: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from loradeploy.export.trace.loading.float16 import to_float16

    class Small(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            for name in ("gate", "gates", "wo", "word_embeddings", "layernorm"):
                setattr(self, name, nn.Linear(2, 2))
            for name in ("blocks", "experts"):
                setattr(self, name, nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
            self.post_init()

    monkeypatch.setattr(Small, "_keep_in_fp32_modules_strict", [entry])
    Small(PretrainedConfig()).save_pretrained(tmp_path)
    theirs, ours = (
        {name for name, p in model.named_parameters() if p.dtype == torch.float32}
        for model in (
            Small.from_pretrained(tmp_path, dtype=torch.float16),
            to_float16(Small.from_pretrained(tmp_path, dtype=torch.float32)),
        )
    )
    assert ours == theirs
    assert 0 < len(ours) < len(dict(Small(PretrainedConfig()).named_parameters()))
