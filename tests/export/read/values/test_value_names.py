"""Inputs and outputs of other exporters are renamed to the names of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.errors import ExportError, UsageError
from loradeploy.export.api import export
from loradeploy.export.read.values.value_names import check_mask, rename_values
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.conftest import MakeAdapter, once
from tests.export import others
from tests.export.graphs import IN, OUT, Builder, numbers, run
from tests.export.others import IDS
from tests.export.reference import difference, torch_output
from tests.tolerances import tolerance

INTEGERS = ir.DataType.INT64


def renamed(graph: Path, place: Path, names: dict[str, str], *, inverted: bool = False) -> Path:
    """Rename inputs of a graph; `inverted`: its mask is 1 at padding."""
    model = ir.load(graph)
    for value in model.graph.inputs:
        value.name = names.get(str(value.name), value.name)
    if inverted:
        mask = next(v for v in model.graph.inputs if v.name == names["attention_mask"])
        one = ir.node("Constant", [], attributes={"value_int": 1})
        flip = ir.node("Sub", [one.outputs[0], mask])
        one.outputs[0].name, flip.outputs[0].name = "one", "flipped"
        for node, index in list(mask.uses()):
            if node is not flip:
                node.replace_input_with(index, flip.outputs[0])
        model.graph.insert_before(model.graph[0], [one, flip])
    place.mkdir()
    for file in graph.parent.iterdir():
        if file.suffix != ".onnx":
            (place / file.name).write_bytes(file.read_bytes())
    ir.save(model, place / "model.onnx")
    return place


@pytest.fixture(scope="module")
def decoder(shared: Path, tiny_llama: Path) -> Path:
    place = once(
        shared / "decoder-without-cache",
        lambda out: others.export_decoder(tiny_llama, out, cache=False),
    )
    return place / "model.onnx"


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "new"),
    [
        ("input_ids:0", ["batch", "sequence"], INTEGERS, "input_ids"),
        ("tokens", ["batch", "sequence"], ir.DataType.INT32, "input_ids"),
        ("input_mask:0", ["batch", "sequence"], INTEGERS, "attention_mask"),
        ("segment_ids", ["batch", "sequence"], INTEGERS, "token_type_ids"),
        ("past_key_3", ["batch", 2, "past", 8], ir.DataType.FLOAT, "past_key_values.3.key"),
        ("past_3_value", ["batch", 2, "past", 8], ir.DataType.FLOAT, "past_key_values.3.value"),
        # only a similar name
        ("input", ["batch", 3, 8, 8], ir.DataType.FLOAT, "input"),
        ("tokens", ["batch", 8], ir.DataType.FLOAT, "tokens"),
        ("past_3", [2, "batch", 2, "past", 8], ir.DataType.FLOAT, "past_3"),
    ],
)
def test_an_input_gets_its_name_in_transformers(
    name: str, shape: list[int | str], dtype: ir.DataType, new: str
) -> None:
    b = Builder()
    value = b.input(name, shape, dtype)
    if new != "input_ids":
        b.input("input_ids", ["batch", "sequence"], INTEGERS)
    before = rename_values(b.model(b.node("Identity", [value], name="y")))
    assert value.name == new
    assert before == ({} if new == name else {new: name})


@pytest.mark.parametrize("name", ["present_key_0", "present_key_values.0.key", "present.0.key"])
def test_an_updated_cache_is_named_after_its_input(name: str) -> None:
    b = Builder()
    shape: list[int | str] = ["batch", 2, "past", 8]
    model = b.model(b.node("Identity", [b.input("past_key_0", shape)], shape, name=name))
    rename_values(model)
    assert model.graph.inputs[0].name == "past_key_values.0.key"
    assert model.graph.outputs[0].name == "present.0.key"


def test_a_mask_without_tokens_keeps_its_name() -> None:
    b = Builder()
    mask = b.input("mask", ["batch", "patches"], ir.DataType.BOOL)
    assert rename_values(b.model(b.node("Identity", [mask], name="y"))) == {}


def test_a_name_that_exists_is_not_used_twice() -> None:
    b = Builder()
    ids, tokens = (b.input(n, ["batch", "sequence"], INTEGERS) for n in ("input_ids", "tokens"))
    assert rename_values(b.model(b.node("Add", [ids, tokens], name="y"))) == {}


def test_a_graph_with_other_names_takes_adapters_and_generates(
    decoder: Path, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama, r=4, seed=1)
    other = renamed(decoder, tmp_path / "other", {"input_ids": "tokens", "attention_mask": "mask"})
    export(other, tmp_path / "bundle", adapters={"mine": adapter}, checkpoint=tiny_llama)
    session = AdapterSession(tmp_path / "bundle")
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    adapted = session.run(["logits"], feeds, adapters="mine")[0]
    expected = torch_output(tiny_llama, IDS, adapter=adapter)
    assert difference(adapted, expected) < tolerance("torch-onnx-tiny")
    assert difference(adapted, torch_output(tiny_llama, IDS)) > 0.1, "the adapter did nothing"
    rows = TextGenerator(session).generate([[5, 17, 42], [9, 8]], ["mine", None], max_new_tokens=6)
    (alone,) = TextGenerator(session).generate([[9, 8]], [None], max_new_tokens=6)
    assert rows[1].token_ids == alone.token_ids


MASKS = ("mask", "attn_mask", "input_mask", "attention_masks", "mask:0", "input_mask:0")


def masked(mask: str, *, inverted: bool) -> ir.Model:
    """Return an attention over tokens; `inverted`: a 1 in the mask hides a token."""
    b = Builder()
    ids = b.input("input_ids", ["batch", "sequence"], INTEGERS)
    given = b.input(mask, ["batch", "sequence"], INTEGERS)
    x = b.node("Gather", [b.weight("words", 50, 8), ids])
    scores = b.node("MatMul", [x, b.node("Transpose", [x], perm=[0, 2, 1])])
    one, most = (b.constant(n, np.float32(v)) for n, v in (("one", 1), ("most", 1e4)))
    kept = b.node("Cast", [given], to=ir.DataType.FLOAT)
    hidden = b.node("Neg", [kept]) if inverted else b.node("Sub", [kept, one])
    bias = b.node("Unsqueeze", [b.node("Mul", [hidden, most]), b.constant("axis", np.array([1]))])
    shares = b.node("Softmax", [b.node("Add", [scores, bias])], axis=-1)
    shape: list[int | str] = ["batch", "sequence", 8]
    return b.model(b.node("MatMul", [shares, x], shape, name="last_hidden_state"))


@pytest.mark.parametrize("inverted", [False, True], ids=["transformers", "inverted"])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_another_name_is_accepted_if_0_hides_a_token(
    name: str, inverted: bool, tmp_path: Path
) -> None:
    model = masked(name, inverted=inverted)
    before = rename_values(model)
    assert before == {"attention_mask": name}
    if not inverted:
        check_mask(model, before, tmp_path, {})
        return
    with pytest.raises(ExportError, match=f"{name} does not hide a token where it is 0"):
        check_mask(model, before, tmp_path, {})


def test_a_mask_that_cannot_be_tested_is_refused(tmp_path: Path) -> None:
    model = masked("mask", inverted=True)
    model.graph[0].op_type = "Unknown"
    with pytest.raises(ExportError, match=r"cannot be run .* input mask hides .* rename it"):
        check_mask(model, rename_values(model), tmp_path, {})


def test_an_inverted_mask_is_refused(decoder: Path, tmp_path: Path) -> None:
    names = {"input_ids": "tokens", "attention_mask": "mask"}
    graph = renamed(decoder, tmp_path / "other", names, inverted=True)
    with pytest.raises(ExportError, match="mask does not hide a token where it is 0"):
        export(graph, tmp_path / "bundle")


def test_text_generation_refuses_token_inputs_of_an_unknown_name(
    decoder: Path, tmp_path: Path
) -> None:
    graph = renamed(decoder, tmp_path / "other", {"input_ids": "symbols"})
    export(graph, tmp_path / "bundle")
    with pytest.raises(UsageError, match="takes symbols, attention_mask, not input_ids"):
        TextGenerator(AdapterSession(tmp_path / "bundle"))


def test_embeddings_may_be_the_only_tokens(tmp_path: Path) -> None:
    """As in graphs of onnxruntime-genai's builder with exclude_embeds."""
    b = Builder()
    x = b.input("inputs_embeds", ["batch", "sequence", IN])
    sizes = ["batch", "sequence", OUT]
    hidden = b.node("MatMul", [x, b.weight("w", IN, OUT)], [*sizes], module="block.proj")
    y = b.node("MatMul", [hidden, b.weight("v", OUT, OUT)], [*sizes], module="lm_head")
    y.name = "logits"
    ir.save(b.model(y), tmp_path / "m.onnx")
    manifest = export(tmp_path / "m.onnx", tmp_path / "b")
    assert manifest.task == "causal-lm"
    embedded = numbers(2, 3, IN)
    got = AdapterSession(tmp_path / "b").run(["logits"], {"inputs_embeds": embedded})[0]
    expected = run(ir.load(tmp_path / "m.onnx"), {"inputs_embeds": embedded})
    assert difference(got, expected) < tolerance("torch-onnx-tiny")
