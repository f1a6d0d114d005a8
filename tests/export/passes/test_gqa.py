"""GroupQueryAttention instead of ONNX's Attention: the same results, and a cache of fixed size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import loradeploy as ld
from loradeploy.bundle.names import LOGITS_TO_KEEP
from loradeploy.errors import ExportError, UsageError
from loradeploy.export.api import export
from loradeploy.export.graph.file import load_graph
from loradeploy.export.passes.gqa import group_queries, updates_cache_in_place
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from loradeploy.runtime.timing import time_bundle
from tests.conftest import MakeAdapter
from tests.export.graphs import Arrays, Builder, numbers, ops, run
from tests.export.reference import difference, factors, onnx_output, session, torch_output
from tests.inputs.architectures import ARCHITECTURES, make_model
from tests.tolerances import tolerance

HEADS, KV_HEADS, SIZE = 4, 2, 8
INT64 = ir.DataType.INT64


def attention(*, window: bool = False, bare: bool = False) -> ir.Model:
    """The attention of one layer over its cache; with a `window`, or `bare`: heads not joined."""
    b = Builder()
    mask = b.input("attention_mask", ["batch", "total"], INT64)
    positions = b.input("position_ids", ["batch", "sequence"], INT64)
    heads = {}
    for name, count in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        x = b.input(name, ["batch", "sequence", count * SIZE])
        split = b.constant(f"{name}.split", np.array([0, 0, count, SIZE]))
        x = b.node("Reshape", [x, split], ["batch", "sequence", count, SIZE])
        heads[name] = b.node(
            "Transpose", [x], ["batch", count, "sequence", SIZE], perm=[0, 2, 1, 3]
        )
    presents = []
    for part, name in (("key", "k"), ("value", "v")):
        past = b.input(f"past_key_values.0.{part}", ["batch", KV_HEADS, "past", SIZE])
        shape: list[int | str] = ["batch", KV_HEADS, "total", SIZE]
        present = f"present.0.{part}"
        presents.append(b.node("Concat", [past, heads[name]], shape, name=present, axis=2))
    one = b.constant("one", np.array([1]))
    axes = [b.constant(name, np.array(at)) for name, at in (("keys", [1, 2]), ("queries", [1, 3]))]
    place = b.node("Sub", [b.node("CumSum", [mask, one]), one])
    key, query = (
        b.node("Unsqueeze", [v, a]) for v, a in zip((place, positions), axes, strict=True)
    )
    real = b.node("Cast", [b.node("Unsqueeze", [mask, axes[0]])], to=int(ir.DataType.BOOL))
    seen = b.node("Or", [real, b.node("Equal", [key, query])])
    seen = b.node("And", [seen, b.node("LessOrEqual", [key, query])])
    if window:
        behind = b.node("Greater", [key, b.node("Sub", [query, b.constant("w", np.array([4]))])])
        seen = b.node("And", [seen, behind])
    for node in b.nodes:
        if node.op_type not in ("Concat", "Reshape", "Transpose"):
            node.outputs[0].type = None  # integers and booleans
    shape = ["batch", HEADS, "sequence", SIZE]
    y = b.node("Attention", [heads["q"], *presents, seen], shape, scale=0.25)
    if not bare:
        y = b.node("Transpose", [y], ["batch", "sequence", HEADS, SIZE], perm=[0, 2, 1, 3])
        joined = b.constant("joined", np.array([0, 0, HEADS * SIZE]))
        y = b.node("Reshape", [y, joined], ["batch", "sequence", HEADS * SIZE], name="y")
    model = b.model(y, *presents)
    model.graph.opset_imports[""] = 23
    model.ir_version = 11
    return model


def feeds(past: int, new: int) -> Arrays:
    rows = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    cache = {f"past_key_values.0.{part}": (2, KV_HEADS, past, SIZE) for part in ("key", "value")}
    return {
        "attention_mask": np.ones((2, past + new), np.int64),
        "position_ids": np.arange(past, past + new)[None].repeat(2, 0),
        **{name: numbers(2, new, count * SIZE, seed=count) for name, count in rows.items()},
        **{name: numbers(*shape, seed=5) for name, shape in cache.items()},
    }


@pytest.mark.parametrize(("past", "new"), [(0, 5), (4, 1)], ids=["prompt", "step"])
def test_one_node_computes_the_same_as_the_attention_and_its_mask(past: int, new: int) -> None:
    model = attention()
    expected = run(attention(), feeds(past, new))
    group_queries(model)
    assert ops(model) == [
        "ReduceSum",
        "Sub",
        "Cast",
        "Shape",
        "Squeeze",
        "Cast",
        "GroupQueryAttention",
    ]
    assert [value.name for value in model.graph.outputs] == [
        "y",
        "present.0.key",
        "present.0.value",
    ]
    model.graph.inputs.pop(1)  # position_ids, which is not used any more
    given = {name: values for name, values in feeds(past, new).items() if name != "position_ids"}
    assert difference(run(model, given), expected) < tolerance("rows")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (attention(window=True), "a mask that is more than causal"),
        (attention(bare=True), "heads that are not merged after it"),
    ],
    ids=["window", "bare"],
)
def test_an_attention_that_gqa_cannot_compute_is_refused_by_name(
    broken: ir.Model, message: str
) -> None:
    with pytest.raises(ExportError, match=f"has {message}"):
        group_queries(broken)


@pytest.fixture(scope="module")
def grouped(
    tiny_llama_bundle: Path,
    tiny_llama: Path,
    make_adapter: MakeAdapter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The tiny Llama's bundle with two adapters, exported again with GroupQueryAttention."""
    place = tmp_path_factory.mktemp("grouped") / "bundle"
    adapters = {"a": make_adapter(tiny_llama, r=4, seed=1), "b": make_adapter(tiny_llama, r=2)}
    manifest = export(tiny_llama_bundle, place, adapters=adapters, attention="gqa")
    assert manifest.padding == "right" and manifest.cache_in_place
    graph = load_graph(place / "model.onnx")
    found = ops(graph)
    assert found.count("GroupQueryAttention") == 2
    expanded = [n for n in graph.graph if n.op_type == "Expand" and LOGITS_TO_KEEP not in n.name]
    assert not {"Attention", "LessOrEqual", "Transpose"} & set(found) and not expanded
    return place


def test_parity_passes(grouped: Path, tiny_llama: Path) -> None:
    prompts = ["The capital of", "Hi"]
    report = ld.parity(grouped, model=tiny_llama, prompts=prompts, tokens=3, certificate=False)
    assert report.passed, report.failures


def test_a_batch_of_different_lengths_generates_the_same_as_each_row_alone(
    grouped: Path, tiny_llama_bundle: Path
) -> None:
    generator = TextGenerator(AdapterSession(grouped))
    prompts = [[5, 17, 42, 99, 7], [9, 8], [7, 6, 5, 4]]
    names = ["a", None, "b"]
    together = generator.generate(prompts, names, max_new_tokens=8)
    for prompt, name, row in zip(prompts, names, together, strict=True):
        (alone,) = generator.generate([prompt], [name], max_new_tokens=8)
        assert row.token_ids == alone.token_ids
    base = TextGenerator(AdapterSession(tiny_llama_bundle))
    (expected,) = base.generate([prompts[1]], max_new_tokens=8)
    assert together[1].token_ids == expected.token_ids


def test_past_and_present_can_share_one_buffer(grouped: Path) -> None:
    graph, most = session(grouped), 12
    ids = np.random.default_rng(0).integers(3, 500, (2, 9))
    whole = onnx_output(grouped, ids)  # all positions in one run
    caches = {
        value.name: onnxruntime.OrtValue.ortvalue_from_numpy(
            np.zeros((2, value.shape[1], most, value.shape[3]), np.float32)
        )
        for value in graph.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    for begin, end in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        binding = graph.io_binding()
        binding.bind_cpu_input("input_ids", ids[:, begin:end])
        binding.bind_cpu_input("attention_mask", np.ones((2, end), np.int64))
        binding.bind_cpu_input("position_ids", np.arange(begin, end)[None].repeat(2, 0))
        for name, cache in caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)
        binding.bind_output("logits")
        graph.run_with_iobinding(binding)
        (logits,) = (v.numpy() for v in binding.get_outputs() if v.shape()[-1] == 512)
        assert difference(logits, whole[:, begin:end]) < tolerance("rows"), begin


@pytest.mark.parametrize(
    "form",
    [
        {"layout": "slots"},
        {"layout": "rows", "branches": True},
        {"precision": "int8"},
    ],
    ids=["slots", "branches", "int8"],
)
def test_generation_with_a_cache_of_fixed_size_equals_that_with_a_growing_cache(
    form: dict[str, Any], grouped: Path, tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    adapters = {"a": grouped / "adapters" / "a", "b": grouped / "adapters" / "b"}
    rows = [[5, 17, 42, 99, 7], [9, 8], [7, 6, 5, 4]], ["a", None, "b"]
    texts = []
    for source, attention in ((grouped, "gqa"), (tiny_llama_bundle, "standard")):
        place = tmp_path / attention
        export(source, place, adapters=adapters, attention=attention, **form)
        generator = TextGenerator(AdapterSession(place))
        # Twice: a second batch must not read values of the first in the buffers.
        for _ in range(2):
            texts.append([r.token_ids for r in generator.generate(*rows, max_new_tokens=24)])
    assert all(len(ids) == 24 for ids in texts[0])
    assert texts[1:] == texts[:1] * 3


def test_a_cache_with_other_readers_or_writers_is_not_shared(grouped: Path) -> None:
    model = load_graph(grouped / "model.onnx")
    assert updates_cache_in_place(model)
    past = next(v for v in model.graph.inputs if v.name == "past_key_values.0.key")
    model.graph.append(ir.node("Shape", [past]))  # for example, to compute positions
    assert not updates_cache_in_place(model)
    model = load_graph(grouped / "model.onnx")
    places = {value.name: place for place, value in enumerate(model.graph.outputs)}
    key, value = places["present.0.key"], places["present.0.value"]
    outputs = model.graph.outputs
    outputs[key].name, outputs[value].name = "present.0.value", "present.0.key"
    assert not updates_cache_in_place(model)
    assert not updates_cache_in_place(Builder().model())


@pytest.mark.parametrize("form", [{}, {"layout": "rows", "branches": True}], ids=["", "branches"])
def test_a_run_writes_its_cache_to_the_given_buffers(
    form: dict[str, Any], grouped: Path, tmp_path: Path
) -> None:
    place = tmp_path / "b"
    adapters = {"a": grouped / "adapters" / "a"}
    assert export(grouped, place, adapters=adapters, attention="gqa", **form).cache_in_place
    session = AdapterSession(place)
    cache = session.empty_cache(1)
    cache.make_room(4)
    read = {name: value.numpy().copy() for name, value in cache.inputs.items()}
    feeds = {
        "input_ids": np.array([[5, 6, 7, 8]]),
        "attention_mask": np.ones((1, 4), np.int64),
        "position_ids": np.arange(4)[None],
        **cache.inputs,
    }
    given = session.run_with_ort_values(cache.outputs, feeds, "a", buffers=cache.buffers)
    assert [v.data_ptr() for v in given] == [v.data_ptr() for v in cache.inputs.values()]
    for name, value in cache.inputs.items():
        assert np.abs(value.numpy()[:, :, :4] - read[name][:, :, :4]).min(axis=(1, 3)).all()
        np.testing.assert_array_equal(value.numpy()[:, :, 4:], read[name][:, :, 4:])
    with pytest.raises(UsageError, match=r"a buffer for 'present.0.key', which is not requested"):
        session.run_with_ort_values(["logits"], feeds, "a", buffers=cache.buffers)


def test_a_bundle_of_fixed_shapes_can_be_benchmarked(grouped: Path, tmp_path: Path) -> None:
    fixed = {"batch": 1, "sequence": 1, "past": 7}
    export(grouped, tmp_path / "fixed", attention="gqa", fixed=fixed)
    timings = time_bundle(AdapterSession(tmp_path / "fixed"), length=7, rounds=1)
    assert all(timing.median > 0 for timing in timings)


def test_group_query_attention_is_kept_by_merges_branches_and_further_exports(
    grouped: Path, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama, r=4, seed=1)
    ids = np.random.default_rng(1).integers(3, 500, (2, 6))
    expected = torch_output(tiny_llama, ids, adapter=adapter)
    export(grouped, tmp_path / "merged", adapters=[adapter], merge=True)
    assert difference(onnx_output(tmp_path / "merged", ids), expected) < tolerance(
        "torch-onnx-tiny"
    )
    again = export(grouped, tmp_path / "b", layout="rows", branches=True, attention="gqa")
    assert again.padding == "right" and again.cache_in_place
    adapted = onnx_output(tmp_path / "b", ids, side=factors(tmp_path / "b", adapter))
    assert difference(adapted, expected) < tolerance("torch-onnx-tiny")


@pytest.mark.breadth(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3: normalized heads", "gpt-neox: partial rotation"])
def test_normalized_and_partially_rotated_heads_are_supported(
    name: str, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "m", *ARCHITECTURES[name])
    adapter = make_adapter(model, out=tmp_path / "a", scale=0.1)
    export(model, tmp_path / "b", adapters={"a": adapter}, attention="gqa")
    ids = np.random.default_rng(0).integers(5, 110, (2, 9))
    mask = np.ones_like(ids)
    mask[0, 5:] = 0
    got = onnx_output(tmp_path / "b", ids, mask, side=factors(tmp_path / "b", adapter))
    expected = torch_output(model, ids, mask, adapter=adapter)
    assert difference(got[mask == 1], expected[mask == 1]) < tolerance("torch-onnx-tiny")


@pytest.mark.slow
def test_a_window_is_refused_by_name(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", *ARCHITECTURES["mistral: a sliding window"])
    with pytest.raises(ExportError, match="more than causal .*`attention=.standard.`"):
        export(model, tmp_path / "b", attention="gqa")
    assert not (tmp_path / "b").exists()


def test_group_query_attention_is_only_for_decoders(tiny_bert_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="for decoders with a cache, not for sequence-class"):
        export(tiny_bert_bundle, tmp_path / "b", attention="gqa")
    with pytest.raises(UsageError, match="`attention='flash'`: expected one of standard, gqa"):
        export(tiny_bert_bundle, tmp_path / "b", attention="flash")
