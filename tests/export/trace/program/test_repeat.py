"""Deep models are traced by their first layers; the graph equals that of a full trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
import transformers

from loradeploy.adapter.tasks import CAUSAL_LM, FEATURE_EXTRACTION, TASK_TABLE
from loradeploy.errors import ExportError
from loradeploy.export import trace
from loradeploy.export.api import export
from loradeploy.export.trace import module
from loradeploy.export.trace.patches import traceable
from loradeploy.export.trace.program import repeat
from loradeploy.export.trace.program.alike import LAYERS, Layers, alike_layers, equal, shortened
from loradeploy.export.trace.wrapper import WRAPPED, wrapper_of

DEPTH = 6
ENCODERS = ("bert", "roberta")


def model_of(kind: str, **settings: Any) -> Any:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "vocab_size": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    if kind not in (*ENCODERS, "gpt2"):
        sizes["num_key_value_heads"] = 2
    config = transformers.AutoConfig.for_model(kind, **sizes, **settings)
    torch.manual_seed(0)
    auto = transformers.AutoModel if kind in ENCODERS else transformers.AutoModelForCausalLM
    return auto.from_config(config).eval()


def task_of(kind: str) -> str:
    return FEATURE_EXTRACTION if kind in ENCODERS else CAUSAL_LM


def written(graph: ir.Model) -> bytes:
    return ir.to_proto(graph).SerializeToString(deterministic=True)


@pytest.mark.breadth
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2", "qwen3", "roberta", "bert"])
def test_the_graph_is_byte_identical_to_a_full_trace(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kind)
    layers = alike_layers(model)
    assert layers is not None
    assert layers.count == DEPTH
    extended = []
    every = module.extend
    monkeypatch.setattr(module, "extend", lambda *a: (every(*a), extended.append(a))[0])
    repeated = written(module.trace(model, task_of(kind)))
    assert extended, "it was traced whole"
    assert alike_layers(model) == layers, "the model is as it was"
    monkeypatch.setattr(module, "alike_layers", lambda _: None)
    assert repeated == written(module.trace(model, task_of(kind)))


def test_every_architecture_of_the_table_is_compared() -> None:
    (mark,) = [
        m
        for m in test_the_graph_is_byte_identical_to_a_full_trace.pytestmark  # type: ignore[attr-defined]
        if m.name == "parametrize"
    ]
    assert set(mark.args[1]) == set(LAYERS)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda layers: setattr(layers[5].input_layernorm, "variance_epsilon", 1e-3), "a setting"),
        (lambda layers: setattr(layers[4].self_attn, "scaling", 0.3), "a scale"),
        (lambda layers: setattr(layers[5], "mlp", layers[4].mlp), "shared weights"),
        (lambda layers: layers[5].mlp.up_proj.register_forward_hook(lambda *_: None), "a hook"),
        (lambda layers: layers[4].register_buffer("more", torch.ones(1)), "a buffer"),
        (lambda layers: setattr(layers[4].mlp, "act_fn", torch.nn.ReLU()), "an activation"),
        (lambda layers: layers[4].mlp.down_proj.train(), "training"),
    ],
)
def test_models_with_different_layers_are_traced_in_full(change: Any, why: str) -> None:
    model = model_of("llama")
    assert alike_layers(model) is not None
    change(model.model.layers)
    assert alike_layers(model) is None, why


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 4}),
        ("llama", {"num_hidden_layers": 5}),
        ("phi", {}),
    ],
)
def test_other_models_are_traced_in_full(kind: str, settings: dict[str, Any]) -> None:
    config = {"num_hidden_layers": DEPTH, "hidden_size": 32, "vocab_size": 64, **settings}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48}
    made = transformers.AutoConfig.for_model(kind, **config, **heads)
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    assert alike_layers(model) is None


def test_constants_that_differ_between_layers_are_detected_in_the_program() -> None:
    model = model_of("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert alike_layers(model) is None
    layers = Layers("transformer.h", DEPTH)  # bypasses the check of its settings
    kind = TASK_TABLE[CAUSAL_LM]
    with traceable(), torch.no_grad(), shortened(model, layers):
        program = module._exported(model, kind).program
    path = f"{WRAPPED}.{layers.path}"
    with pytest.raises(repeat.NotAlikeError, match="different inputs"):
        repeat.extend(program, wrapper_of(model, kind), path, layers.count)


class Layer(torch.nn.Module):
    """A layer that maps two tensors to two others of the same shape."""

    def __init__(self, swaps: bool, longer: bool) -> None:
        super().__init__()
        self.up, self.gate = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.swaps, self.longer = swaps, longer

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.swaps:
            one, other = other, one
        if self.longer:
            one = one * 1
        return self.up(one), self.gate(other).tanh()


class Layered(torch.nn.Module):
    def __init__(self, count: int, swaps: int = -1, longer: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Layer(i == swaps, i == longer) for i in range(count))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        one, other = x, x + 1
        for layer in self.layers:
            one, other = layer(one, other)
        return (one - other,)


def test_a_program_extended_by_layers_computes_them() -> None:
    short, whole = Layered(repeat.TRACED), Layered(DEPTH)
    x = torch.randn(2, 4)
    program = torch.export.export(short, (x,))
    repeat.extend(program, whole, "layers", DEPTH)
    (got,), (expected,), (fewer,) = program.module()(x), whole(x), short(x)
    assert torch.equal(got, expected)
    assert not torch.allclose(fewer, expected)


@pytest.mark.parametrize("swaps", [1, 2, 3])
def test_a_layer_that_reads_another_output_of_its_predecessor_is_detected(swaps: int) -> None:
    x, whole = torch.randn(2, 4), Layered(DEPTH, swaps)
    program = torch.export.export(Layered(repeat.TRACED, swaps), (x,))
    if swaps == 1:  # only later layers are compared
        repeat.extend(program, whole, "layers", DEPTH)
        assert torch.equal(program.module()(x)[0], whole(x)[0])
    else:
        with pytest.raises(repeat.NotAlikeError, match="different inputs"):
            repeat.extend(program, whole, "layers", DEPTH)


@pytest.mark.parametrize("swaps", [-1, 2, 3])
def test_layer_outputs_that_cannot_be_paired_are_not_taken_for_equal(swaps: int) -> None:
    """Layer 1 has one more node, so its connections to layer 2 say nothing about layer 3."""
    model = Layered(repeat.TRACED, swaps, longer=1)
    program = torch.export.export(model, (torch.randn(2, 4),))
    with pytest.raises(repeat.NotAlikeError, match="different inputs"):
        repeat.extend(program, Layered(DEPTH, swaps, longer=1), "layers", DEPTH)


def test_a_model_whose_program_cannot_be_extended_is_traced_in_full(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, kind = model_of("bert"), TASK_TABLE[FEATURE_EXTRACTION]
    made: dict[int, Any] = {}
    exported = module._exported

    def once(model: Any, kind: Any) -> Any:
        depth = len(model.encoder.layer)
        if depth not in made:
            with traceable(), torch.no_grad():
                made[depth] = exported(model, kind)
        return made[depth]

    def raises(problem: Exception) -> Any:
        def fails(*_: Any) -> None:
            raise problem

        return fails

    before = alike_layers(model)
    monkeypatch.setattr(module, "_exported", once)
    kept = torch.export.ExportedProgram
    copied = property(lambda program: dict(program._state_dict))
    breakages: list[tuple[Any, str, Any, str]] = [
        (repeat, "_value", raises(TypeError("of torch")), "TypeError: of torch"),
        (repeat, "_Repeated", raises(AttributeError("_moved")), "AttributeError: _moved"),
        (module, "alike_layers", raises(RuntimeError("ambiguous")), "RuntimeError: ambiguous"),
        (kept, "state_dict", copied, "not where they were"),
    ]
    caplog.set_level("DEBUG", logger="loradeploy")
    for where, name, broken, why in breakages:
        caplog.clear()
        with monkeypatch.context() as one:
            one.setattr(where, name, broken)
            traced = module._program(model, kind)
        assert traced.program is made[DEPTH].program, why
        (message,) = [text for text in caplog.messages if text.startswith("tracing all layers: ")]
        assert why in message
        assert alike_layers(model) == before, "the model is as it was"
    assert set(made) == {repeat.TRACED, DEPTH}


def test_a_model_that_cannot_be_restored_to_full_depth_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The config still has the reduced depth: a full trace would have 4 layers."""
    model = model_of("llama")

    def exported(model: Any, _: Any) -> Any:
        kind = type(model.config)
        every = kind.__setattr__

        def fixed(self: Any, name: str, value: Any) -> None:
            if name == "num_hidden_layers":
                raise AttributeError("a setting that cannot be changed")
            every(self, name, value)

        monkeypatch.setattr(kind, "__setattr__", fixed)

    monkeypatch.setattr(module, "_exported", exported)
    with pytest.raises(AttributeError, match="cannot be changed"):
        module._program(model, TASK_TABLE[CAUSAL_LM])
    assert len(model.model.layers) == DEPTH


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((torch.ones(2), 1), (torch.ones(2), 1), True),
        ((torch.ones(2), 1), (torch.zeros(2), 1), False),
        ([{"a": torch.ones(2)}], [{"a": torch.ones(3)}], False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, False),
        ((1,), (True,), False),
        ((1, 2), (1,), False),
    ],
)
def test_settings_with_tensors_are_compared(one: Any, other: Any, same: bool) -> None:
    assert equal(one, other) is same


def test_layers_with_exchanged_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_of("llama").save_pretrained(tmp_path / "model")
    moved = repeat._Repeated._in

    def wrong(self: Any, path: str, layer: int) -> str:
        return moved(self, path, {4: 5, 5: 4}.get(layer, layer))

    monkeypatch.setattr(repeat._Repeated, "_in", wrong)
    monkeypatch.setattr(trace, "trace", module.trace)  # of this run, without a cache of traces
    with pytest.raises(ExportError, match="of its size from the source's"):
        export(tmp_path / "model", tmp_path / "bundle", task=CAUSAL_LM)
    assert not (tmp_path / "bundle").exists()
