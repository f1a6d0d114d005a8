"""Models with one different deep layer must not be traced by repeating their first layers.

The model types are added to the list of repeatable ones, so that only the layers decide.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers

from loradeploy.adapter.tasks import CAUSAL_LM
from loradeploy.export.trace import module
from loradeploy.export.trace.program.alike import LAYERS, alike_layers
from tests.export.reference import difference, token_feeds
from tests.export.small import SMALL
from tests.tolerances import tolerance

DEPTH: Final = 7
_SIZES: Final = {
    **SMALL,
    "num_hidden_layers": DEPTH,
    "vocab_size": 120,
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_EXPERTS: Final = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_GEMMA: Final = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
_GEMMA_3N: Final = {
    **_GEMMA,
    "layer_types": [_LOCAL] * DEPTH,
    "intermediate_size": [48] * DEPTH,
    "activation_sparsity_pattern": [0.0] * DEPTH,
    "vocab_size_per_layer_input": 120,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
}
# Model type, path of the layers, settings, and the settings that make all layers equal.
FAMILIES: Final[dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]]] = {
    "gemma3: local and global attention, each with its rotation": (
        *("gemma3_text", "layers"),
        {**_GEMMA, "layer_types": [_LOCAL] * 5 + [_GLOBAL, _LOCAL]},
        {"layer_types": [_LOCAL] * DEPTH},
    ),
    "smollm3: a layer without rotation": (
        *("smollm3", "layers"),
        {"no_rope_layers": [1] * 5 + [0, 1]},
        {"no_rope_layers": [1] * DEPTH},
    ),
    "gpt2: scores divided by the layer's number": (
        *("gpt2", "h"),
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_by_inverse_layer_idx": False},
    ),
    "gpt_neo: local attention behind": (
        *("gpt_neo", "h"),
        {
            "num_layers": DEPTH,
            "num_heads": 4,
            "window_size": 4,
            "attention_types": [[["global"] * 5 + ["local"] * 2, 1]],
        },
        {"attention_types": [[["global"], DEPTH]]},
    ),
    "qwen2_moe: experts in every sixth layer": (
        *("qwen2_moe", "layers"),
        {**_EXPERTS, "decoder_sparse_step": 6},
        {"decoder_sparse_step": 1},
    ),
    "qwen2_moe: a layer without experts": (
        *("qwen2_moe", "layers"),
        {**_EXPERTS, "mlp_only_layers": [5]},
        {"mlp_only_layers": []},
    ),
    "gemma3n: layers with the cache of an earlier one": (
        *("gemma3n_text", "layers"),
        {**_GEMMA_3N, "num_kv_shared_layers": 2},
        {},
    ),
    "gemma3n: a sparse layer": (
        *("gemma3n_text", "layers"),
        {**_GEMMA_3N, "activation_sparsity_pattern": [0.0] * 5 + [0.9, 0.0]},
        {},
    ),
}
# The model types whose layers differ in nothing but the layer index.
_BARE: Final = ("smollm3", "gpt2", "qwen2_moe")
# The families whose graphs are run, one of each kind of difference.
_RUN: Final = ("gemma3: ", "smollm3: ", "gpt2: ")


def model_of(kind: str, settings: dict[str, Any]) -> Any:
    config = transformers.AutoConfig.for_model(kind, **{**_SIZES, **settings})
    config.initializer_range = 0.2
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_different_deep_layer_is_detected(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, inside, settings, _ = FAMILIES[family]
    model = model_of(kind, settings)
    monkeypatch.setitem(LAYERS, kind, inside)
    layers = model.base_model.get_submodule(inside)
    assert len(layers) == DEPTH
    assert alike_layers(model) is None
    if len(set(getattr(model.config, "layer_types", None) or [0])) > 1:
        monkeypatch.setattr(model.config, "layer_types", None)
        assert alike_layers(model) is None, "the layers themselves show it"


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name][0] in _BARE])
def test_without_the_difference_the_layers_are_equal(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, inside, settings, same = FAMILIES[family]
    monkeypatch.setitem(LAYERS, kind, inside)
    found = alike_layers(model_of(kind, {**settings, **same}))
    assert found is not None
    assert found.count == DEPTH


@pytest.mark.breadth
@pytest.mark.parametrize("family", [name for name in FAMILIES if name.startswith(_RUN)])
def test_the_graph_computes_what_the_model_computes(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, inside, settings, same = FAMILIES[family]
    monkeypatch.setitem(LAYERS, kind, inside)
    model, alike = model_of(kind, settings), model_of(kind, {**settings, **same})
    graph = ir.to_proto(module.trace(model, CAUSAL_LM)).SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(5, 110, (2, 9))
    (got, *_) = session.run(None, token_feeds(session, ids))
    with torch.no_grad():
        expected, others = (
            each(input_ids=torch.from_numpy(ids)).logits.numpy() for each in (model, alike)
        )
    allowed = tolerance("torch-onnx-tiny")
    assert difference(got, expected) <= allowed
    assert difference(others, expected) > 10 * allowed, "the layer makes no difference"
