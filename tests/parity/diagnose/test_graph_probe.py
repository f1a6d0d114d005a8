"""Which values of a graph are taken for the outputs of which modules, on minimal graphs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.bundle.manifest import BaseIdentity, Manifest, read_manifest
from loradeploy.bundle.names import GRAPH_NAME, MANIFEST_NAME
from loradeploy.export.match.linears import find_linears
from loradeploy.export.match.modules.naming import FUSED_MODULES
from loradeploy.export.passes.side_inputs.inject import inject_side_inputs
from loradeploy.parity.diagnose.graph_probe import ProbedGraph, probe_graph
from loradeploy.parity.diagnose.torch_probe import Modules, Site
from tests.export.graphs import IN, OUT, Builder, manifest_of

BATCH: list[int | str] = ["batch", "sequence"]
PLAIN = Manifest(
    task="causal-lm",
    mode="merged",
    base=BaseIdentity("b", None, "onnx"),
    precision="fp32",
    opset=21,
    inputs=(),
    outputs=(),
)


def out(*modules: str, size: int = OUT, into: Sequence[str] = ()) -> Site:
    return Site(modules, tuple(into), (1, 3, size))


def probed(
    model: ir.Model, place: Path, sites: Sequence[Site], manifest: Manifest = PLAIN
) -> ProbedGraph:
    ir.save(model, place / GRAPH_NAME)
    named = {name for site in sites for name in (*site.given_by, *site.taken_by)}
    parents = {name.rpartition(".")[0] for name in named} - {""}
    return probe_graph(place, manifest, sites, Modules(tuple(named | parents), frozenset(named)))


def names(found: ProbedGraph) -> dict[str, tuple[str | None, str]]:
    return {probe.module: (probe.value.name, probe.op) for probe in found.probes}


def test_the_output_of_a_module_is_the_last_value_that_leaves_it(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", [*BATCH, IN])
    y = b.node("MatMul", [x, b.weight("w", IN, OUT)], [*BATCH, OUT], module="m.proj", name="y")
    z = b.node("Add", [y, b.weight("b", OUT)], [*BATCH, OUT], module="m.proj", name="z")
    end = b.node("Relu", [z], [*BATCH, OUT], module="m.act", name="end")
    found = probed(b.model(end), tmp_path, [out("m.proj"), out("m.act"), out("m.none")])
    assert names(found) == {"m.proj": ("z", "MatMul"), "m.act": ("end", "Relu")}
    assert found.unmatched == ("m.none",)
    assert found.upstream() == [0b0, 0b1]


def test_the_output_of_a_layer_with_side_inputs_includes_the_update(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", [*BATCH, IN])
    q, k = (
        b.node("MatMul", [x, b.weight(f"w{n}", IN, OUT)], [*BATCH, OUT], module=f"m.{n}", name=n)
        for n in "qk"
    )
    o = b.node("Add", [q, k], [*BATCH, OUT], module="m", name="sum")
    p = b.node("MatMul", [o, b.weight("wo", OUT, OUT)], [*BATCH, OUT], module="m.o", name="o")
    model = b.model(b.node("Relu", [p], [*BATCH, OUT], module="act", name="end"))
    added = inject_side_inputs(model, list(find_linears(model).linears.values()))
    sites = [out("m.q"), out("m.k"), out(into=["m.o"]), out("m.o", "m")]
    found = probed(model, tmp_path, sites, manifest_of(added))
    assert [(probe.module, probe.value.name, probe.op) for probe in found.probes] == [
        ("m.q", "m.q/lora_add", "MatMul"),  # parts of one fused product
        ("m.k", "m.k/lora_add", "MatMul"),
        ("m", "sum", "Add"),  # computed by m itself, an input of m.o
        ("m.o", "m.o/lora_add", "MatMul"),
    ]
    assert found.upstream() == [0b0, 0b0, 0b11, 0b111]


def test_a_packed_projection_is_split_into_its_parts(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", [*BATCH, IN])
    y = b.node("MatMul", [x, b.weight("w", IN, 2 * OUT)], [*BATCH, 2 * OUT], name="/m/qkv/MatMul")
    b.nodes[-1].metadata_props[FUSED_MODULES] = json.dumps([["m.q", OUT], ["m.k", OUT]])
    model = b.model(b.node("Relu", [y], [*BATCH, 2 * OUT], name="/m/act/Relu"))
    found = probed(model, tmp_path, [out("m.q"), out("m.k")])
    assert [(probe.module, probe.value.name, probe.part) for probe in found.probes] == [
        ("m.q", "/m/qkv/MatMul", (0, OUT)),
        ("m.k", "/m/qkv/MatMul", (OUT, 2 * OUT)),
    ]


def test_one_value_is_not_assigned_to_two_modules(tmp_path: Path) -> None:
    # No node computes the sum of the block, so the last value is not the output of the block.
    b = Builder()
    x = b.input("x", [*BATCH, IN])
    y = b.node("MatMul", [x, b.weight("w", IN, OUT)], [*BATCH, OUT], module="l.0.o", name="y")
    found = probed(b.model(y), tmp_path, [out("l.0.o"), out("l.0")])
    assert names(found) == {"l.0.o": ("y", "MatMul")}
    assert found.unmatched == ("l.0",)


def test_the_last_call_counts_for_a_module_that_is_called_twice(tmp_path: Path) -> None:
    b = Builder()
    w = b.weight("w", OUT, OUT)
    value = b.input("x", [*BATCH, OUT])
    for call in "12":
        value = b.node("Relu", [value], [*BATCH, OUT], module="m", name=f"into{call}")
        value = b.node("MatMul", [value, w], [*BATCH, OUT], module="m.o", name=f"out{call}")
    end = b.node("Relu", [value], [*BATCH, OUT], module="end", name="end")
    found = probed(b.model(end), tmp_path, [out(into=["m.o"]), out("m.o")])
    assert names(found) == {"m": ("into2", "Relu"), "m.o": ("out2", "MatMul")}


def test_a_value_of_another_size_is_not_assigned_to_a_module(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", [*BATCH, IN])
    y = b.node("MatMul", [x, b.weight("w", IN, OUT)], [*BATCH, OUT], module="m.o", name="y")
    assert probed(b.model(y), tmp_path, [out("m.o", size=OUT + 1)]).unmatched == ("m.o",)


def test_the_probed_graph_also_outputs_the_values_and_the_bundle_is_not_changed(
    tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(tiny_llama_bundle)
    site = Site(("model.layers.0.mlp.down_proj",), (), (1, 3, 64))
    modules = Modules(site.given_by, frozenset(site.given_by))
    written = probe_graph(tiny_llama_bundle, manifest, [site], modules).write(tmp_path / "probed")
    assert [spec.name for spec in written.outputs][-1] == "model.layers.0.mlp.down_proj/lora_add"
    assert read_manifest(tiny_llama_bundle) == manifest
    assert not (tmp_path / "probed/model.onnx.data").exists()
    assert (tmp_path / "probed" / MANIFEST_NAME).is_file()


@pytest.mark.parametrize("op", ["SkipSimplifiedLayerNormalization", "SkipLayerNormalization"])
def test_a_norm_with_a_fused_residual_sum_outputs_the_sum_too(op: str, tmp_path: Path) -> None:
    b = Builder()
    x, s = b.input("x", [*BATCH, OUT]), b.input("s", [*BATCH, OUT])
    node = ir.Node(
        "com.microsoft",
        op,
        [x, s, b.constant("scale", np.ones(OUT, np.float32))],
        num_outputs=4,
        name="/l.1/norm/SkipLayerNorm",
    )
    for index, name in enumerate(("normed", "", "", "summed")):
        node.outputs[index].name = name
        node.outputs[index].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[index].shape = ir.Shape([*BATCH, OUT])
    b.nodes.append(node)
    model = b.model(node.outputs[0], node.outputs[3])
    sites = [out("l.0", into=["l.1.norm"]), out("l.1.norm")]
    found = probed(model, tmp_path, sites)
    assert names(found) == {"l.0": ("summed", op), "l.1.norm": ("normed", op)}
