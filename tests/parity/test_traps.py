"""Known bugs of exporters and runtimes, reproduced: correct graphs pass, buggy ones fail.

Each trap makes the same small change to the graph of a tiny bundle as the bug. If a bug affects
only some phases, the test lists them: a comparison of single prompts would miss it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnxruntime import GraphOptimizationLevel

import loradeploy as ld
from loradeploy.adapter.files.digest import base_digest, file_digest
from loradeploy.bundle.names import GRAPH_NAME, MANIFEST_NAME
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import add_constant, constant_of, set_constant
from loradeploy.parity.report.results import ParityReport
from tests.conftest import MakeAdapter, once
from tests.export.reference import difference
from tests.inputs.edits import edited_json
from tests.parity.conftest import PROMPTS
from tests.runtime.feeds import logits, random_ids
from tests.tolerances import tolerance

BATCHED = {"padded batch", "permuted batch"}
CACHED = {"chunked prefill", "decode"}
ALL = {"prefill", *BATCHED, *CACHED}
Change = Callable[[ir.Graph], None]
# (bundle, model, change) → the phases in which the changed graph fails for the base model.
Phases = Callable[[Path, Path, Change], set[str | None]]


def changed(bundle: Path, place: Path, change: Change) -> Path:
    """Copy `bundle` with a changed graph, and update the digest in its manifest."""
    shutil.copytree(bundle, place)
    graph = place / GRAPH_NAME
    model = ir.load(graph)
    change(model.graph)
    ir.save(model, graph)
    with edited_json(place / MANIFEST_NAME) as manifest:
        manifest["graph_digest"] = file_digest(graph)
    return place


def failing(report: ParityReport) -> set[str | None]:
    """Return the phases that have a failure."""
    assert {result.outcome for result in report.results} <= {"passed", "failed"}
    return {result.phase for result in report.results if result.outcome == "failed"}


@pytest.fixture
def phases(tmp_path: Path) -> Phases:

    def run(bundle: Path, model: Path, change: Change) -> set[str | None]:
        report = ld.parity(
            changed(bundle, tmp_path / "changed", change),
            model=model,
            prompts=PROMPTS,
            tokens=6,
            backends=["onnx-side-inputs"],
            certificate=False,
        )
        assert report.passed == (not failing(report))
        return failing(report)

    return run


# -- steps of graph surgery --------------------------------------------------------------------


def nodes(graph: ir.Graph, op: str) -> list[ir.Node]:
    found = [node for node in graph if node.op_type == op]
    assert found, f"the graph has no {op}"
    return found


def insert(graph: ir.Graph, before: ir.Node, op: str, inputs: list[Any], **attributes: Any) -> Any:
    """Insert a node ahead of `before` and return its output."""
    node = ir.node(op, inputs, attributes=attributes)
    graph.insert_before(before, node)
    return node.outputs[0]


def inputs_of(graph: ir.Graph) -> dict[str | None, ir.Value]:
    return {value.name: value for value in graph.inputs}


def query_positions(graph: ir.Graph) -> ir.Value:
    """Return the positions of the queries relative to the last key: 1 - n, …, 0."""
    (node,) = (node for node in graph if node.name == "positions.sequence/from_the_end")
    return node.outputs[0]


def size(graph: ir.Graph, before: ir.Node, name: str, axis: int) -> ir.Value:
    """Return the size of an axis of an input, as a value of shape [1]."""
    shape: ir.Value = insert(
        graph, before, "Shape", [inputs_of(graph)[name]], start=axis, end=axis + 1
    )
    return shape


def untouched(graph: ir.Graph) -> None:
    """Change nothing (the control)."""


# -- the traps ---------------------------------------------------------------------------------


def causal_from_the_top_left(graph: ir.Graph) -> None:
    """Let query i attend to keys 0 … i, ignoring the length of the cache."""
    places = query_positions(graph)
    users = list(places.uses())
    at = next(node for node in graph if any(node is user for user, _ in users))
    past = size(graph, at, "past_key_values.0.key", 2)
    first = insert(graph, at, "Sub", [places, past])
    for node, index in users:
        node.replace_input_with(index, first)


def test_a_causal_mask_that_ignores_the_cache_fails_in_the_phases_with_a_cache(
    tiny_llama: Path, tiny_llama_bundle: Path, phases: Phases
) -> None:
    """Attention's `is_causal` with fewer queries than keys and no past: onnxruntime's CPU provider
    aligned the mask to the bottom right, its CUDA provider to the top left
    (microsoft/onnxruntime#29020)."""
    assert phases(tiny_llama_bundle, tiny_llama, causal_from_the_top_left) == CACHED


def positions_include_padding(graph: ir.Graph) -> None:
    """Number positions 0, 1, 2, … in every row, including padding."""
    _positions(graph, cached_only=False)


def cached_positions_include_padding(graph: ir.Graph) -> None:
    """Include padding in the positions of decode steps only; those of the prompt are correct."""
    _positions(graph, cached_only=True)


def _positions(graph: ir.Graph, *, cached_only: bool) -> None:
    message = inputs_of(graph)["position_ids"]
    users = [(node, index) for node, index in message.uses() if node.op_type != "Shape"]
    at = next(node for node in graph if any(node is user for user, _ in users))
    last = insert(
        graph,
        at,
        "Sub",
        [size(graph, at, "attention_mask", 1), add_constant(graph, "one", np.array([1]))],
    )
    counted = insert(graph, at, "Add", [query_positions(graph), last])
    like = insert(graph, at, "Shape", [message])
    positions = insert(graph, at, "Expand", [counted, like])
    if cached_only:
        past = size(graph, at, "past_key_values.0.key", 2)
        zero = add_constant(graph, "no_past", np.array(0))
        cached = insert(graph, at, "Greater", [past, zero])
        positions = insert(graph, at, "Where", [cached, positions, message])
    for node, index in users:
        node.replace_input_with(index, positions)
    graph.sort()


def test_learned_positions_that_include_padding_fail_in_batches(
    tiny_gpt2: Path, tiny_gpt2_bundle: Path, phases: Phases
) -> None:
    """Decoders exported or run without `position_ids` number left-padded rows wrongly: optimum
    computed them only in its generation tests (huggingface/optimum#2326)."""
    found = phases(tiny_gpt2_bundle, tiny_gpt2, positions_include_padding)
    assert found == {*BATCHED, "decode"}


def test_rotary_positions_that_include_padding_only_with_a_cache_fail_in_decoding(
    tiny_llama: Path, tiny_llama_bundle: Path, phases: Phases
) -> None:
    """RoPE depends only on distances, so shifting all positions of a row changes nothing. It
    breaks if positions of the prompt exclude padding and those of new tokens include it: unsloth's
    generation for left-padded batches (unslothai/unsloth#3795)."""
    found = phases(tiny_llama_bundle, tiny_llama, cached_positions_include_padding)
    assert found == {"decode"}


def repeat_heads(order: list[int]) -> Change:
    """Repeat the key and value heads to one per query head, in `order`."""

    def change(graph: ir.Graph) -> None:
        chosen = add_constant(graph, "heads", np.array(order))
        for node in nodes(graph, "Attention"):
            for index in (1, 2):
                repeated = insert(graph, node, "Gather", [node.inputs[index], chosen], axis=1)
                node.replace_input_with(index, repeated)

    return change


@pytest.mark.parametrize(
    ("order", "expected"),
    [([0, 0, 1, 1], set()), ([0, 1, 0, 1], ALL)],
    ids=["interleaved", "tiled"],
)
def test_tiled_key_heads_fail_and_interleaved_ones_pass(
    order: list[int],
    expected: set[str | None],
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    phases: Phases,
) -> None:
    """Query heads 0 and 1 share the first key head. The function body of ONNX's Attention
    repeated key heads with Tile, so that head 1 used the second key head (onnx/onnx#7274)."""
    assert phases(tiny_llama_bundle, tiny_llama, repeat_heads(order)) == expected


# -- tied weights ------------------------------------------------------------------------------


def embedding_uses_the_merged_head(graph: ir.Graph) -> None:
    """Replace the input embedding by the merged output head."""
    table = nodes(graph, "Gather")[0].inputs[0]
    head = graph.outputs[0].producer().inputs[1]
    merged = head.producer().inputs[0] if head.producer() is not None else head
    assert merged is not table, "the head was not untied"
    numbers = constant_of(merged)
    set_constant(table, numbers if numbers.shape == constant_of(table).shape else numbers.T)


@pytest.fixture(scope="module")
def tied_head(tiny_gpt2: Path, make_adapter: MakeAdapter, shared: Path) -> tuple[Path, Path]:
    """An adapter for the tied head of the tiny GPT-2, and a bundle with it merged."""
    adapter = make_adapter(tiny_gpt2, target_modules=["lm_head", "c_attn"])
    bundle = once(
        shared / "tied-head",
        lambda place: ld.export(tiny_gpt2, place, adapters=[adapter], merge=True),
    )
    return adapter, bundle


@pytest.mark.parametrize(
    ("change", "expected"), [(untouched, set()), (embedding_uses_the_merged_head, ALL)]
)
def test_a_merge_into_a_tied_head_that_also_changes_the_embedding_fails(
    change: Change,
    expected: set[str | None],
    tiny_gpt2: Path,
    tied_head: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    """PEFT merges an adapter of `lm_head` into the weight shared with the embedding
    (huggingface/peft#2018)."""
    adapter, bundle = tied_head
    report = ld.parity(
        changed(bundle, tmp_path / "changed", change),
        model=tiny_gpt2,
        adapters=[adapter],
        prompts=PROMPTS,
        tokens=6,
        backends=["onnx-merged"],
        certificate=False,
    )
    assert failing(report) == expected, report.failures


# -- masks and overflow ------------------------------------------------------------------------


def attention_in_float32(graph: ir.Graph, *, masks_own: bool = False) -> None:
    """Replace Attention by float32 matrix products and a softmax, masked with -inf.

    With `masks_own`, a padded position does not attend even to itself.
    """
    first = nodes(graph, "Attention")[0]
    visible = first.inputs[3]  # [batch, 1, sequence, total]
    if masks_own:
        causal, seen = visible.producer().inputs
        (padding,) = (v for v in seen.producer().inputs if v.producer().op_type == "Unsqueeze")
        visible = insert(graph, first, "And", [causal, padding])
    zero, infinite = (
        add_constant(graph, name, np.array(number, np.float32))
        for name, number in (("zero", 0), ("infinite", -np.inf))
    )
    bias = insert(graph, first, "Where", [visible, zero, infinite])
    for node in nodes(graph, "Attention"):
        dtype, shapes = node.inputs[1].dtype, [node.inputs[index].shape for index in (0, 1)]
        query, key, value = (
            insert(graph, node, "Cast", [v], to=ir.DataType.FLOAT) for v in node.inputs[:3]
        )
        queries, keys = (int(shape[1]) for shape in shapes)
        chosen = add_constant(graph, f"{node.name}/heads", np.arange(keys).repeat(queries // keys))
        key, value = (insert(graph, node, "Gather", [v, chosen], axis=1) for v in (key, value))
        scale = np.array(node.attributes["scale"].value, np.float32)
        query = insert(graph, node, "Mul", [query, add_constant(graph, f"{node.name}/s", scale)])
        turned = insert(graph, node, "Transpose", [key], perm=[0, 1, 3, 2])
        scores = insert(graph, node, "Add", [insert(graph, node, "MatMul", [query, turned]), bias])
        weights = insert(graph, node, "Softmax", [scores], axis=-1)
        output = insert(graph, node, "MatMul", [weights, value])
        node.outputs[0].replace_all_uses_with(insert(graph, node, "Cast", [output], to=dtype))
        graph.remove(node, safe=True)


@pytest.mark.parametrize(("masks_own", "expected"), [(False, set()), (True, {*BATCHED, "decode"})])
def test_fully_masked_rows_fail_in_batches(
    masks_own: bool,
    expected: set[str | None],
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    phases: Phases,
) -> None:
    """A padded position that attends to nothing is NaN, and the next layer multiplies it by
    zero, which is NaN too: torch.onnx's translation of attention masked with -inf until
    microsoft/onnxscript#2654."""
    change = partial(attention_in_float32, masks_own=masks_own)
    assert phases(tiny_llama_bundle, tiny_llama, change) == expected


def raise_scores(weight: Any, bias: Any, size: int) -> None:
    """Change the projection of queries and keys [in, 3 × in] so that all scores are about 75,000.

    A softmax ignores a common offset of its inputs, so the result in float32 does not change.
    """
    for start in range(0, 2 * len(weight), size):  # one feature per query and key head
        weight[:, start] = 0
        bias[start] = 512  # 512² / √12 = 75,674


@pytest.fixture(scope="module")
def large_scores_gpt2(tiny_gpt2: Path, shared: Path) -> Path:
    """The tiny GPT-2 with attention scores of about 75,000, the same for all keys."""

    def make(place: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
        with torch.no_grad():
            for block in model.transformer.h:
                layer = block.attn.c_attn
                raise_scores(layer.weight, layer.bias, model.config.n_embd // model.config.n_head)
        model.save_pretrained(place)
        AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(place)

    return once(shared / "loud-gpt2", make)


@pytest.fixture(scope="module")
def large_scores_fp16_bundle(tiny_gpt2: Path, large_scores_gpt2: Path, shared: Path) -> Path:
    """`large_scores_gpt2` in float16, built from a tiny GPT-2 bundle because export refuses it."""
    half = once(shared / "half-gpt2", lambda place: ld.export(tiny_gpt2, place, precision="fp16"))

    def loud(graph: ir.Graph) -> None:
        for layer in range(2):
            weight, bias = (
                graph.initializers[f"transformer.h.{layer}.attn.c_attn.{name}"]
                for name in ("weight", "bias")
            )
            values = constant_of(weight).copy(), constant_of(bias).copy()
            raise_scores(*values, size=12)
            set_constant(weight, values[0])
            set_constant(bias, values[1])

    def make(place: Path) -> None:
        bundle = changed(half, place, loud)
        with edited_json(bundle / MANIFEST_NAME) as manifest:
            manifest["base"]["digest"] = base_digest(large_scores_gpt2)

    return once(shared / "loud-half", make)


@pytest.mark.parametrize(
    ("change", "expected"),
    [(attention_in_float32, set()), (untouched, {*ALL, "repeat"})],
    ids=["fp32", "fp16"],
)
def test_scores_that_overflow_float16_fail_and_attention_in_float32_passes(
    change: Change,
    expected: set[str | None],
    large_scores_gpt2: Path,
    large_scores_fp16_bundle: Path,
    phases: Phases,
) -> None:
    """The largest float16 is 65504. OPT's attention in float16 gave NaN until its softmax was
    computed in float32 (huggingface/transformers#17437); onnxruntime's Attention on the CPU
    multiplies float16 queries and keys in float16."""
    assert phases(large_scores_fp16_bundle, large_scores_gpt2, change) == expected


def test_an_export_whose_scores_overflow_float16_is_refused(
    large_scores_gpt2: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"logits is NaN or infinite .*`precision=.fp32.`"):
        ld.export(large_scores_gpt2, tmp_path / "half", precision="fp16")
    assert not (tmp_path / "half").exists()


# -- fusions -----------------------------------------------------------------------------------


def residual_reads_the_normalized_output(graph: ir.Graph) -> None:
    """Fuse a sum and its normalization into one node and exchange its two outputs."""
    norm = nodes(graph, "RMSNormalization")[1]
    total = norm.inputs[0]
    for node, index in list(total.uses()):
        if node is not norm:
            node.replace_input_with(index, norm.outputs[0])
    graph.sort()


def gelu_without_tanh(graph: ir.Graph) -> None:
    """Replace the tanh approximation of GELU by the exact GELU, which is nearly the same."""
    for tanh in nodes(graph, "Tanh"):
        (end,) = (node for node, _ in next(iter(tanh.outputs[0].uses()))[0].outputs[0].uses())
        (half,) = (v for v in end.inputs if v.producer().op_type == "Mul")
        (x,) = (v for v in half.producer().inputs if v.const_value is None)
        exact = insert(graph, end, "Gelu", [x], approximate="none")
        end.outputs[0].replace_all_uses_with(exact)
        graph.remove(end, safe=True)


@pytest.mark.parametrize(
    ("name", "change"),
    [("llama", residual_reads_the_normalized_output), ("gpt2", gelu_without_tanh)],
)
def test_a_wrong_fusion_fails_in_every_phase(
    name: str, change: Change, request: pytest.FixtureRequest, phases: Phases
) -> None:
    """Optimizers replaced chains of nodes by a node that computes something else: onnxruntime's
    fusion of a sum and a LayerNormalization (microsoft/onnxruntime#17689)."""
    model = request.getfixturevalue(f"tiny_{name}")
    bundle = request.getfixturevalue(f"tiny_{name}_bundle")
    assert phases(bundle, model, change) == ALL


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_levels_of_optimization_agree(name: str, request: pytest.FixtureRequest) -> None:
    """ORT_ENABLE_ALL has given other outputs than ORT_DISABLE_ALL (microsoft/onnxruntime#20321);
    it does not for these graphs."""
    bundle = request.getfixturevalue(f"tiny_{name}_bundle")
    outputs = []
    for level in (GraphOptimizationLevel.ORT_DISABLE_ALL, GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = ld.AdapterSession(bundle, session_options=options)
        outputs.append(logits(session, random_ids(2, 9)))
    plain, optimized = outputs
    assert difference(plain, optimized) <= tolerance("torch-onnx-tiny")
