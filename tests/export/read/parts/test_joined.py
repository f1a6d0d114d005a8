"""The parts of an encoder-decoder that optimum exports become one bundle that generates."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from loradeploy.errors import ExportError, ModelError
from loradeploy.export.api import export
from loradeploy.parity.api import parity
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.conftest import MakeAdapter
from tests.export.read.optimum import IDS, write_encoder, write_part
from tests.export.reference import apart, difference
from tests.tolerances import tolerance

TARGETS = ["q", "k", "v", "wi", "wo"]
PROMPTS = ["The first house", "of the second", "one"]
ENCODER = "encoder_model.onnx"
FIRST, FURTHER = "decoder_model.onnx", "decoder_with_past_model.onnx"
MERGED = "decoder_model_merged.onnx"


def _write_decoder(model: Any, file: Path, *, cached: bool, fixed: bool = False) -> None:
    """Export the decoder without a cache, or with one that it goes on with.

    `fixed`: a mistake, the number of source tokens is a constant.
    """
    import torch
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    config, forward = model.config, model.forward
    layers = range(config.num_decoder_layers)
    own, cross = (
        [f"{layer}.{of}.{part}" for layer in layers for part in ("key", "value")]
        for of in ("decoder", "encoder")
    )
    ids = torch.from_numpy(IDS)
    feeds: dict[str, Any] = {"encoder_attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    if cached:
        sizes = (config.num_heads, 3, config.d_kv)
        feeds |= {"input_ids": ids[:, :1]}
        feeds |= {f"past_key_values.{name}": torch.randn(2, *sizes) for name in own}
        sizes = (config.num_heads, 5, config.d_kv)
        feeds |= {f"past_key_values.{name}": torch.randn(2, *sizes) for name in cross}
    else:
        feeds |= {"input_ids": ids, "encoder_hidden_states": torch.randn(2, 5, config.d_model)}
    names = list(feeds)

    def run(*given: Any) -> Any:
        fed = dict(zip(names, given, strict=True))
        caches = []
        for of in (own, cross):
            kept = [fed[f"past_key_values.{name}"] for name in of] if cached else []
            caches.append(DynamicCache(list(zip(kept[::2], kept[1::2], strict=True))))
        cache = EncoderDecoderCache(*caches)
        key = fed.get(f"past_key_values.{cross[0]}")
        states = (
            fed["encoder_hidden_states"]
            if key is None
            else key.new_zeros(2, 5, config.d_model)
            if fixed
            else key.new_zeros(key.shape[0], key.shape[2], config.d_model)
        )
        logits = forward(
            attention_mask=fed["encoder_attention_mask"],
            decoder_input_ids=fed["input_ids"],
            encoder_outputs=(states,),
            past_key_values=cache,
            use_cache=True,
        ).logits
        made = [cache.self_attention_cache, *([] if cached else [cache.cross_attention_cache])]
        parts = (
            part for each in made for layer in each.layers for part in (layer.keys, layer.values)
        )
        return logits, *parts

    model.forward = run
    made = own if cached else [*own, *cross]
    write_part(model, feeds, ["logits", *(f"present.{name}" for name in made)], file)
    model.forward = forward


@pytest.fixture(scope="module")
def parts(tiny_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three graphs of the tiny T5, with its config and tokenizer."""
    from transformers import T5ForConditionalGeneration

    place = tmp_path_factory.mktemp("parts") / "t5"
    shutil.copytree(tiny_t5, place, ignore=shutil.ignore_patterns("*.safetensors"))
    model = T5ForConditionalGeneration.from_pretrained(tiny_t5, attn_implementation="eager").eval()
    write_encoder(model, place / ENCODER)
    _write_decoder(model, place / FIRST, cached=False)
    _write_decoder(model, place / FURTHER, cached=True)
    return place


def _as_parts(parts: Path, place: Path) -> Path:
    return Path(shutil.copytree(parts, place))


def _as_merged(parts: Path, place: Path) -> Path:
    """Both decoders in the branches of an If, as in decoder_model_merged.onnx."""
    _as_parts(parts, place)
    without, cached = (onnx.load(place / name).graph for name in (FIRST, FURTHER))
    given = {value.name: value for graph in (without, cached) for value in graph.input}
    names = [value.name for value in without.output]

    def branch(graph: onnx.GraphProto, tag: str) -> onnx.GraphProto:
        made = onnx.GraphProto(name=tag)
        weights = {value.name for value in graph.initializer}
        for value in graph.initializer:
            made.initializer.add().CopyFrom(value)
            made.initializer[-1].name = f"{tag}/{value.name}"
        for node in graph.node:
            own = made.node.add()
            own.CopyFrom(node)
            own.input[:] = [
                n if (n in given and n not in weights) or not n else f"{tag}/{n}"
                for n in node.input
            ]
            own.output[:] = [f"{tag}/{name}" for name in node.output]
        present = {value.name for value in graph.output}
        for name in names:
            value = made.output.add()
            value.CopyFrom(next(v for v in without.output if v.name == name))
            value.name = f"{tag}/{name}"
            if name not in present:  # keys and values of the states pass through
                past = name.replace("present.", "past_key_values.")
                made.node.append(helper.make_node("Identity", [past], [value.name]))
        return made

    choice = helper.make_node(
        "If",
        ["use_cache_branch"],
        names,
        name="optimum::if",
        then_branch=branch(cached, "then"),
        else_branch=branch(without, "else"),
    )
    switch = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    graph = helper.make_graph([choice], "merged", [*given.values(), switch], list(without.output))
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), place / MERGED)
    (place / FIRST).unlink()
    (place / FURTHER).unlink()
    return place


FORMS: dict[str, Callable[[Path, Path], Path]] = {"parts": _as_parts, "merged": _as_merged}


def _expected(model: Path, adapter: Path | None) -> list[str]:
    """The texts that transformers and PEFT generate."""
    import peft
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    plain = T5ForConditionalGeneration.from_pretrained(model).eval()
    used = plain if adapter is None else peft.PeftModel.from_pretrained(plain, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = []
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt")
        given.pop("token_type_ids", None)
        ids = used.generate(**given, max_new_tokens=8, do_sample=False)
        texts.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("form", FORMS)
def test_parts_generate_what_peft_generates(
    form: str, parts: Path, tiny_t5: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_t5, target_modules=TARGETS, task="seq2seq-lm", seed=4, scale=0.3)
    source = FORMS[form](parts, tmp_path / "source")
    manifest = export(source, tmp_path / "bundle", adapters={"mine": adapter})
    assert {target.module.partition(".")[0] for target in manifest.targets} >= {
        "encoder",
        "decoder",
    }
    generator = TextGenerator(AdapterSession(tmp_path / "bundle"))
    of_base, adapted = _expected(tiny_t5, None), _expected(tiny_t5, adapter)
    assert of_base != adapted, "the adapter did nothing"
    for name, expected in ((None, of_base), ("mine", adapted)):
        got = generator.generate(PROMPTS, adapters=[name] * len(PROMPTS), max_new_tokens=8)
        assert [answer.text for answer in got] == expected
    assert parity(tmp_path / "bundle", model=tiny_t5).passed
    export(source, tmp_path / "merged", adapters={"mine": adapter}, merge=True)
    merged = TextGenerator(AdapterSession(tmp_path / "merged"))
    assert [answer.text for answer in merged.generate(PROMPTS, max_new_tokens=8)] == adapted


def _logits(
    model: Path, adapter: Path | None, feeds: dict[str, NDArray[np.int64]]
) -> NDArray[np.float32]:
    """The logits of transformers and PEFT for tokens of the source and of the target."""
    import peft
    import torch
    from transformers import T5ForConditionalGeneration

    plain = T5ForConditionalGeneration.from_pretrained(model).eval()
    used = plain if adapter is None else peft.PeftModel.from_pretrained(plain, adapter).eval()
    with torch.no_grad():
        made = used(**{name: torch.from_numpy(values) for name, values in feeds.items()})
    logits: NDArray[np.float32] = made.logits.numpy()
    return logits


def _as_halves(*names: str) -> Callable[[Path], None]:
    """Convert parts to float16, as onnxruntime's tool does."""

    def convert(source: Path) -> None:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        for name in names:
            half = convert_float_to_float16(onnx.load(source / name), disable_shape_infer=True)
            onnx.save(half, source / name)

    return convert


def _as_opset_17(source: Path) -> None:
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(source / "weights").eval()
    write_encoder(model, source / ENCODER, opset=17)


def _with_cache_position(source: Path) -> None:
    """Give the decoder with a cache its tokens' positions as an input, as transformers 4 does."""
    model = ir.load(source / FURTHER)
    given = ir.Value(
        name="cache_position", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["sequence"])
    )
    positions = [node.outputs[0] for node in model.graph if node.op_type == "Add" and _counts(node)]
    assert positions, "the graph computes no positions behind its cache"
    for value in positions:
        value.replace_all_uses_with(given)
    model.graph.inputs.append(given)
    ir.save(model, source / FURTHER)


def _counts(add: ir.Node) -> bool:
    """Whether a Range, of the tokens, is added to what their cache has."""
    made = (value.producer() for value in add.inputs if value is not None)
    return any(node is not None and node.op_type == "Range" for node in made)


@pytest.mark.parametrize(
    ("change", "precision"),
    [
        (_as_opset_17, "fp32"),
        (_with_cache_position, "fp32"),
        (_as_halves(ENCODER), "fp16"),
        (_as_halves(FIRST, FURTHER), "fp16"),
        (_as_halves(FURTHER), "fp16"),
    ],
    ids=[
        "encoder of an older opset",
        "cache_position",
        "encoder in fp16",
        "decoders in fp16",
        "one in fp16",
    ],
)
def test_parts_that_differ_in_opset_precision_or_inputs_are_joined(
    change: Callable[[Path], None],
    precision: str,
    parts: Path,
    tiny_t5: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    adapter = make_adapter(tiny_t5, target_modules=TARGETS, task="seq2seq-lm", seed=4, scale=0.3)
    source = _as_parts(parts, tmp_path / "source")
    (source / "weights").symlink_to(tiny_t5)
    change(source)
    manifest = export(source, tmp_path / "bundle", adapters={"mine": adapter})
    assert (manifest.opset, manifest.precision) == (18, precision)
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "decoder_input_ids": IDS[:, 1:]}
    (found,) = AdapterSession(tmp_path / "bundle").run(["logits"], feeds, adapters=["mine", None])
    of_base, adapted = _logits(tiny_t5, None, feeds), _logits(tiny_t5, adapter, feeds)
    effect = apart(of_base[0], adapted[0])
    assert effect > 0.1, "the adapter does nothing"
    for row, expected in enumerate((adapted[0], of_base[1])):
        assert apart(found[row], expected) < effect / 10
        if precision == "fp32":
            assert difference(found[row], expected) <= tolerance("torch-onnx-tiny")


def test_the_table_of_tokens_is_stored_once(parts: Path, tmp_path: Path) -> None:
    export(parts, tmp_path / "bundle", precision="fp32")
    graphs = [ir.load(tmp_path / "bundle" / name) for name in ("encoder.onnx", "model.onnx")]
    tables = [
        value.const_value
        for graph in graphs
        for node in graph.graph
        if node.op_type == "Gather" and (value := node.inputs[0]) is not None
        if value.const_value is not None and value.shape is not None and value.shape[0] > 100
    ]
    assert len(tables) == 2
    assert len({tensor.offset for tensor in tables}) == 1


def test_a_decoder_that_goes_on_wrongly_is_refused(parts: Path, tmp_path: Path) -> None:
    """One whose logits with a cache are those of another model."""
    source = _as_parts(parts, tmp_path / "source")
    model = ir.load(source / FURTHER)
    head = next(
        v for v in model.graph.initializers.values() if v.shape is not None and len(v.shape) == 2
    )
    head.const_value = ir.tensor(-head.const_value.numpy(), name=head.name)
    ir.save(model, source / FURTHER)
    with pytest.raises(ExportError, match="gives other logits for several tokens after an empty"):
        export(source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_decoder_for_one_length_of_the_source_is_refused(
    parts: Path, tiny_t5: Path, tmp_path: Path
) -> None:
    from transformers import T5ForConditionalGeneration

    source = _as_parts(parts, tmp_path / "source")
    model = T5ForConditionalGeneration.from_pretrained(tiny_t5, attn_implementation="eager").eval()
    _write_decoder(model, source / FURTHER, cached=True, fixed=True)
    with pytest.raises(ExportError, match="the parts cannot be run here"):
        export(source, tmp_path / "bundle")


def test_parts_without_a_cache_are_refused_with_advice(parts: Path, tmp_path: Path) -> None:
    source = _as_parts(parts, tmp_path / "source")
    (source / FURTHER).unlink()
    with pytest.raises(ModelError, match=r"not encoder_model\.onnx with a decoder with a cache"):
        export(source, tmp_path / "bundle")
    model = ir.load(parts / FIRST)
    keys = [value for value in model.graph.outputs if ".encoder." in str(value.name)]
    for value in keys:
        model.graph.outputs.remove(value)
    shutil.copy(parts / FURTHER, source)
    ir.save(model, source / FIRST)
    with pytest.raises(ExportError, match=r"gives no present\.0\.encoder\.key: export them with a"):
        export(source, tmp_path / "bundle")


def test_parts_with_unknown_inputs_are_refused(parts: Path, tmp_path: Path) -> None:
    source = _as_parts(parts, tmp_path / "source")
    model = ir.load(source / FURTHER)
    model.graph.inputs.append(
        ir.Value(name="decoder_mask", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"]))
    )
    ir.save(model, source / FURTHER)
    with pytest.raises(ExportError, match=r"other inputs \(decoder_mask\)"):
        export(source, tmp_path / "bundle")
