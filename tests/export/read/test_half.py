"""The graphs of an encoder-decoder that other exporters write take their half of an adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from loradeploy.errors import AdapterError, UsageError
from loradeploy.export.api import export
from loradeploy.export.read.half import other_half
from loradeploy.parity.api import parity
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter
from tests.export.read.optimum import IDS, write_encoder, write_part
from tests.export.reference import difference
from tests.tolerances import tolerance

TARGETS = ["q", "v", "wi", "wo"]


def _write(module: Any, tensors: dict[str, Any], output: str, place: Path, config: Path) -> None:
    place.mkdir()
    write_part(module, tensors, [output], place / "model.onnx")
    shutil.copy(config, place / "config.json")


def _encoder(model: Any, place: Path, config: Path) -> dict[str, Any]:
    place.mkdir()
    shutil.copy(config, place / "config.json")
    return write_encoder(model, place / "model.onnx")


def _decoder(model: Any, place: Path, config: Path) -> dict[str, Any]:
    import torch

    forward = model.forward
    model.forward = lambda ids, states: forward(
        decoder_input_ids=ids, encoder_outputs=(states,), use_cache=False, return_dict=False
    )[:1]
    states = torch.randn(2, 5, model.config.d_model, generator=torch.manual_seed(0))
    feeds = {"input_ids": torch.from_numpy(IDS), "encoder_hidden_states": states}
    _write(model, feeds, "logits", place, config)
    model.forward = forward
    return feeds


def _expected(model: Any, half: str, feeds: dict[str, Any]) -> Any:
    import torch

    with torch.no_grad():
        if half == "encoder":
            return model.get_encoder()(**feeds).last_hidden_state.numpy()
        states = (feeds["encoder_hidden_states"],)
        return model(encoder_outputs=states, decoder_input_ids=feeds["input_ids"]).logits.numpy()


HALVES: dict[str, Callable[[Any, Path, Path], dict[str, Any]]] = {
    "encoder": _encoder,
    "decoder": _decoder,
}


@pytest.mark.parametrize("evidence", ["names", "checkpoint"])
@pytest.mark.parametrize("half", HALVES)
def test_each_half_has_its_part_of_the_adapter(
    half: str, evidence: str, tiny_t5: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    import peft
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(tiny_t5).eval()
    feeds = HALVES[half](model, tmp_path / "graph", tiny_t5 / "config.json")
    adapter = make_adapter(tiny_t5, target_modules=TARGETS, task="seq2seq-lm", seed=4, scale=0.3)
    given = {"checkpoint": tiny_t5} if evidence == "checkpoint" else {}
    manifest = export(tmp_path / "graph", tmp_path / "bundle", adapters={"mine": adapter}, **given)
    assert all(target.module.startswith(f"{half}.") for target in manifest.targets)
    session = AdapterSession(tmp_path / "bundle")
    session.load("again", adapter)
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    base = _expected(model, half, feeds)
    adapted = _expected(peft.PeftModel.from_pretrained(model, adapter).eval(), half, feeds)
    for name, expected in ((None, base), ("mine", adapted), ("again", adapted)):
        got = session.run(None, arrays, adapters=name)[0]
        assert difference(got, expected) < tolerance("torch-onnx-tiny")
    assert difference(base, adapted) > 0.01, "the adapter did nothing"
    with pytest.raises(UsageError, match="one half of an encoder-decoder"):
        parity(tmp_path / "bundle", model=tiny_t5)


def test_an_adapter_for_the_other_half_alone_is_refused(
    tiny_t5: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(tiny_t5).eval()
    _encoder(model, tmp_path / "graph", tiny_t5 / "config.json")
    adapter = make_adapter(tiny_t5, target_modules=r"decoder\..*\.q", task="seq2seq-lm")
    with pytest.raises(AdapterError, match="all of its tensors are of decoder, in another bundle"):
        export(tmp_path / "graph", tmp_path / "bundle", adapters={"mine": adapter})


def _bart_classifier(place: Path) -> tuple[Any, dict[str, Any]]:
    """Write a tiny BART classifier and its graph, which makes the decoder's input itself."""
    import torch
    from transformers import BartConfig, BartForSequenceClassification

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        init_std=0.3,
    )
    model = BartForSequenceClassification(config).eval()
    model.save_pretrained(place / "base")
    forward = model.forward
    model.forward = lambda ids, mask: forward(
        input_ids=ids, attention_mask=mask, use_cache=False, return_dict=False
    )[:1]
    ids = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 10, 11, 2]])
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    _write(model, feeds, "logits", place / "graph", place / "base" / "config.json")
    model.forward = forward
    return model, feeds


@pytest.mark.parametrize("named", [True, False])
def test_a_classifier_with_both_halves_in_one_graph_gets_the_whole_adapter(
    named: bool, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    import peft
    import torch

    model, feeds = _bart_classifier(tmp_path)
    base = tmp_path / "base"
    if not named:
        graph = ir.load(tmp_path / "graph" / "model.onnx")
        for number, node in enumerate(graph.graph):
            node.name = f"node_{number}"
        for number, value in enumerate([*graph.graph.initializers.values()]):
            value.name = f"weight_{number}"
        ir.save(graph, tmp_path / "graph" / "model.onnx")
    adapter = make_adapter(
        base,
        target_modules=["q_proj", "fc1"],
        task="sequence-classification",
        num_labels=3,
        scale=0.3,
    )
    given = {} if named else {"checkpoint": base}
    bundle = tmp_path / "bundle"
    export(tmp_path / "graph", bundle, adapters={"mine": adapter}, merge=True, **given)
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    got = AdapterSession(bundle).run(None, arrays)[0]
    with torch.no_grad():
        before = model(**feeds).logits.numpy()
        expected = peft.PeftModel.from_pretrained(model, adapter).eval()(**feeds).logits.numpy()
    assert difference(got, expected) < tolerance("torch-onnx-tiny")
    assert difference(before, expected) > 0.001, "the adapter did nothing"


@pytest.mark.parametrize(
    ("inputs", "model_type", "others"),
    [
        (["input_ids", "decoder_input_ids"], "bart", []),
        (["input_features"], "whisper", ["model.decoder", "lm_head", "proj_out"]),
        (["input_ids", "encoder_hidden_states"], "whisper", ["model.encoder"]),
        (
            ["input_ids", "past_key_values.0.encoder.key"],
            "bart",
            [
                "model.encoder",
                "model.decoder.layers.0.encoder_attn.k_proj",
                "model.decoder.layers.0.encoder_attn.v_proj",
            ],
        ),
        (
            ["input_ids", "past_key_values.0.encoder.key"],
            "t5",
            [
                "encoder",
                "decoder.block.0.layer.1.EncDecAttention.k",
                "decoder.block.0.layer.1.EncDecAttention.v",
            ],
        ),
    ],
)
def test_the_inputs_show_the_half(inputs: list[str], model_type: str, others: list[str]) -> None:
    values = [ir.Value(name=name) for name in inputs]
    graph = ir.Graph(values, [], nodes=[], name="g")
    config = {
        "is_encoder_decoder": True,
        "model_type": model_type,
        "decoder_layers": 1,
        "num_decoder_layers": 1,
    }
    assert list(other_half(graph, config)) == others
    assert other_half(graph, {**config, "is_encoder_decoder": False}) == ()
