"""Fixed dimensions are numbers everywhere in the graph, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from loradeploy.bundle.manifest import Manifest, read_manifest
from loradeploy.cli.export import parse_sizes
from loradeploy.errors import UsageError
from loradeploy.export.api import export
from loradeploy.export.graph.file import load_graph
from loradeploy.export.passes.forms.static_shapes import use_static_shapes
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.conftest import MakeAdapter
from tests.export.graphs import OUT, linear
from tests.export.reference import session

DECODE = {"batch": 2, "sequence": 1, "past": 4}


def step(manifest: Manifest, batch: int, past: int, new: int) -> dict[str, NDArray[Any]]:
    """Return random inputs of a decoder with `past` positions in the cache."""
    generator = np.random.default_rng(0)
    feeds: dict[str, NDArray[Any]] = {
        "input_ids": generator.integers(3, 500, (batch, new)),
        "attention_mask": np.ones((batch, past + new), np.int64),
        "position_ids": np.arange(past, past + new)[None].repeat(batch, 0),
    }
    for spec in manifest.inputs:
        if spec.name.startswith("past_key_values."):
            shape = (batch, int(spec.shape[1]), past, int(spec.shape[3]))
            feeds[spec.name] = generator.standard_normal(shape).astype(np.float32)
    return feeds


def symbols(graph: ir.Graph) -> set[str]:
    """Return the symbolic dimensions of all values except side inputs."""
    values = [v for v in graph.inputs if not v.is_initializer()]
    values += [v for node in ir.traversal.RecursiveGraphIterator(graph) for v in node.outputs]
    shapes = [value.shape for value in values if value.shape is not None]
    return {str(dim) for shape in shapes for dim in shape if not isinstance(dim, int)}


def test_a_symbol_becomes_its_number_and_other_symbols_are_kept() -> None:
    model = linear()
    use_static_shapes(model.graph, {"batch": 3})
    for value in (model.graph.inputs[0], model.graph.outputs[0]):
        assert value.shape is not None
        assert value.shape[0] == 3
        assert str(value.shape[1]) == "sequence"
    assert model.graph.outputs[0].shape[2] == OUT  # type: ignore[index]


@pytest.mark.parametrize(
    "options", [{"layout": "slots"}, {"branches": True}], ids=["slots", "branches"]
)
def test_a_fixed_decoder_computes_the_same_as_the_dynamic_one(
    options: dict[str, Any],
    tiny_llama_bundle: Path,
    tiny_llama: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    adapters = {"a": make_adapter(tiny_llama, r=4), "b": make_adapter(tiny_llama, r=2, seed=1)}
    open_, fixed = tmp_path / "open", tmp_path / "fixed"
    export(tiny_llama_bundle, open_, adapters=adapters, **options)
    manifest = export(open_, fixed, adapters=adapters, fixed=DECODE, **options)
    shapes = {spec.name: spec.shape for spec in manifest.inputs}
    assert shapes["attention_mask"] == (2, 5)  # total is inferred from the others
    assert shapes["past_key_values.1.value"] == (2, 2, 4, 16)
    assert manifest.outputs[0].shape == (2, 1, 512)
    assert {v.name: tuple(v.shape) for v in session(fixed).get_inputs()} == shapes
    feeds = step(manifest, 2, 4, 1)
    one, other = AdapterSession(open_), AdapterSession(fixed)
    for use in (None, "a", ["b", None], ["a", "b"]):
        expected, got = one.run(None, feeds, use), other.run(None, feeds, use)
        for theirs, ours in zip(expected, got, strict=True):
            np.testing.assert_array_equal(theirs, ours)
    with pytest.raises(UsageError, match=r"input_ids is int64 \[2, 3\], .* takes int64 \[2, 1\]"):
        other.run(None, step(manifest, 2, 4, 3))


def test_a_merged_graph_has_no_symbols_left(
    tiny_llama_bundle: Path, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"adapters": [make_adapter(tiny_llama)], "merge": True}
    fixed = {"batch": 1, "sequence": 8, "past": 0}  # a prompt of 8 tokens
    manifest = export(tiny_llama_bundle, tmp_path / "fixed", fixed=fixed, **options)
    assert symbols(load_graph(tmp_path / "fixed" / "model.onnx").graph) == set()
    export(tiny_llama_bundle, tmp_path / "open", **options)
    feeds = step(manifest, 1, 0, 8)
    (expected,) = AdapterSession(tmp_path / "open").run(["logits"], feeds)
    (got,) = AdapterSession(tmp_path / "fixed").run(["logits"], feeds)
    np.testing.assert_array_equal(got, expected)


def test_a_fixed_encoder_keeps_its_adapters_heads(
    tiny_bert_bundle: Path, tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    options = {"task": "sequence-classification", "modules_to_save": ["classifier"]}
    adapters = {"a": make_adapter(tiny_bert, **options)}
    manifest = export(
        tiny_bert_bundle, tmp_path / "b", adapters=adapters, fixed={"batch": 2, "sequence": 8}
    )
    assert {spec.shape for spec in manifest.inputs} == {(2, 8)}
    ids = np.random.default_rng(0).integers(3, 500, (2, 8))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds["token_type_ids"] = np.zeros_like(ids)
    export(tiny_bert_bundle, tmp_path / "open", adapters=adapters)
    expected = AdapterSession(tmp_path / "open").run(["logits"], feeds, ["a", None])[0]
    got = AdapterSession(tmp_path / "b").run(["logits"], feeds, ["a", None])[0]
    np.testing.assert_array_equal(got, expected)


def test_text_generation_refuses_a_fixed_bundle(tiny_llama_bundle: Path, tmp_path: Path) -> None:
    export(tiny_llama_bundle, tmp_path / "b", fixed=DECODE)
    assert not (tmp_path / "b" / "genai_config.json").exists()
    with pytest.raises(UsageError, match=r"only takes input_ids \[2, 1\]"):
        TextGenerator(AdapterSession(tmp_path / "b"))
    # A dimension that is still dynamic can be fixed later.
    export(tiny_llama_bundle, tmp_path / "one", fixed={"batch": 1})
    export(tmp_path / "one", tmp_path / "all", fixed={"sequence": 1, "total": 9})
    assert read_manifest(tmp_path / "all").inputs[3].shape == (1, 2, 8, 16)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"length": 3}, "no dimension 'length', it has batch, sequence, total, past"),
        ({"batch": 0}, "batch is 0: give 1 or more"),
        ({"past": 3, "sequence": 2, "total": 4}, "3 past and 2 new positions are not 4 in total"),
        ({"sequence": 5, "total": 4}, "-1 past and 5 new positions"),
    ],
)
def test_impossible_sizes_are_refused(
    sizes: dict[str, int], message: str, tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        export(tiny_llama_bundle, tmp_path / "b", fixed=sizes)
    assert not (tmp_path / "b").exists()


def test_sizes_are_parsed_from_one_option() -> None:
    assert parse_sizes("batch=1, sequence=128") == {"batch": 1, "sequence": 128}
    for text in ("batch", "batch=x", "batch=1,batch=2", "batch=-1", ""):
        with pytest.raises(UsageError, match="give each dimension once"):
            parse_sizes(text)
