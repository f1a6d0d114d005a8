"""Products in functions and branches take adapters; unsupported subgraphs are refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from loradeploy.adapter.tasks import CAUSAL_LM
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import ExportError, LoraDeployError
from loradeploy.export.api import export
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.conftest import MakeAdapter
from tests.export.graphs import numbers
from tests.export.reference import session
from tests.tolerances import tolerance

SIZE = 6
SWITCH = "use_cache_branch"
SCOPES = {"pkg.torch.onnx.name_scopes": str(["", "block.proj", "linear"])}
FLOAT, BOOL = TensorProto.FLOAT, TensorProto.BOOL
SHAPE = ["batch", "sequence", SIZE]


def _product(x: str, y: str, weight: str = "w") -> onnx.NodeProto:
    node = helper.make_node("MatMul", [x, weight], [y], name=f"/block/proj/{y}")
    for key, value in SCOPES.items():
        node.metadata_props.add(key=key, value=value)
    return node


def _weight(name: str = "w") -> onnx.TensorProto:
    return numpy_helper.from_array(numbers(SIZE, SIZE, seed=5), name)


def _value(
    name: str, kind: int = FLOAT, shape: list[int | str] | None = None
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, SHAPE if shape is None else shape)


def _saved(
    place: Path,
    nodes: list[onnx.NodeProto],
    *,
    switch: bool = False,
    functions: list[onnx.FunctionProto] | None = None,
    more: list[onnx.TensorProto] | None = None,
) -> Path:
    inputs = [_value("x"), *([_value(SWITCH, BOOL, [1])] if switch else [])]
    weights = [_weight(), *(more or [])]
    graph = helper.make_graph(nodes, "g", inputs, [_value("last_hidden_state")], weights)
    imports = [helper.make_opsetid("", 17), *([helper.make_opsetid("own", 1)] if functions else [])]
    model = helper.make_model(
        graph, opset_imports=imports, functions=functions or [], ir_version=10
    )
    place.mkdir()
    onnx.save(model, place / "model.onnx")
    return place


def _branch(
    name: str, *nodes: onnx.NodeProto, weights: list[onnx.TensorProto] | None = None
) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, [], [_value(nodes[-1].output[0])], weights or [])


def _choice(condition: str, then: onnx.GraphProto, other: onnx.GraphProto) -> onnx.NodeProto:
    return helper.make_node(
        "If", [condition], ["last_hidden_state"], name="chosen", then_branch=then, else_branch=other
    )


@pytest.fixture
def expected() -> np.ndarray:
    """The output of the product for `_x()` with the update of a different adapter in each row."""
    return _x() @ (numpy_helper.to_array(_weight()) + _A() @ _B())


def _x() -> np.ndarray:
    return numbers(2, 3, SIZE, seed=1)


def _A() -> np.ndarray:
    return numbers(2, SIZE, 2, seed=2)


def _B() -> np.ndarray:
    return numbers(2, 2, SIZE, seed=3)


def _given(bundle: Path) -> np.ndarray:
    side = {"block.proj.lora_A": _A(), "block.proj.lora_B": _B(), "adapter_ids": np.arange(2)}
    result: np.ndarray = session(bundle).run(None, {"x": _x(), **side})[0]
    return result


def _in_a_function(place: Path) -> Path:
    body = helper.make_function(
        "own", "Layer", ["a", "w"], ["b"], [_product("a", "b")], [helper.make_opsetid("", 17)]
    )
    call = helper.make_node("Layer", ["x", "w"], ["last_hidden_state"], domain="own", name="call")
    return _saved(place, [call], functions=[body])


def _in_equal_branches(place: Path) -> Path:
    """Like a merged decoder: one branch has its own weight, one an outer one, one is nested."""
    inner = _choice(
        SWITCH, _branch("deep", _product("x", "deep/y")), _branch("other", _product("x", "other/y"))
    )
    inner.output[0] = "then/y"
    then = _branch("then", inner)
    other = _branch("else", _product("x", "else/y", "own"), weights=[_weight("own")])
    return _saved(place, [_choice(SWITCH, then, other)], switch=True)


def _in_a_constant_choice(place: Path) -> Path:
    other = _branch("else", helper.make_node("Neg", ["x"], ["else/y"]))
    always = numpy_helper.from_array(np.array(True), "always")
    return _saved(
        place, [_choice("always", _branch("then", _product("x", "then/y")), other)], more=[always]
    )


def _behind_constant_nodes(place: Path) -> Path:
    held = helper.make_node("Constant", [], ["held"], value=_weight("held"))
    shape = helper.make_node(
        "Constant", [], ["shape"], value=numpy_helper.from_array(np.array([SIZE, SIZE]), "s")
    )
    same = helper.make_node("Identity", ["held"], ["same"])
    return _saved(place, [held, shape, same, _product("x", "last_hidden_state", "same")])


@pytest.mark.parametrize(
    "graph", [_in_a_function, _in_equal_branches, _in_a_constant_choice, _behind_constant_nodes]
)
def test_products_in_subgraphs_take_adapters(
    graph: object, expected: np.ndarray, tmp_path: Path
) -> None:
    made = export(graph(tmp_path / "source"), tmp_path / "bundle", layout="slots")  # type: ignore[operator]
    assert [spec.name for spec in made.inputs] == ["x"]
    assert np.abs(_given(tmp_path / "bundle") - expected).max() < tolerance("rows")
    assert np.abs(_x() @ numpy_helper.to_array(_weight()) - expected).max() > 1


# -- what is refused -----------------------------------------------------------------------------


def _in_unequal_branches(place: Path) -> Path:
    other = [_product("x", "else/x"), helper.make_node("Neg", ["else/x"], ["else/y"])]
    node = _choice(SWITCH, _branch("then", _product("x", "then/y")), _branch("else", *other))
    return _saved(place, [node], switch=True)


def _in_a_choice_that_is_computed(place: Path) -> Path:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["any"], to=BOOL),
    ]
    other = _branch("else", helper.make_node("Neg", ["x"], ["else/y"]))
    choice = _choice("any", _branch("then", _product("x", "then/y")), other)
    return _saved(place, [*nodes, choice])


def _in_a_loop(place: Path, *, before: str | None = None) -> Path:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), _product("h", "h/next")],
        "body",
        [_value("i", TensorProto.INT64, []), _value("go", BOOL, []), _value("h")],
        [_value("on", BOOL, []), _value("h/next")],
    )
    times = numpy_helper.from_array(np.array(2), "times")
    first = [] if before is None else [_product("x", before)]
    loop = helper.make_node(
        "Loop", ["times", "", before or "x"], ["last_hidden_state"], name="turns", body=body
    )
    return _saved(place, [*first, loop], more=[times])


def _in_a_loop_and_before_it(place: Path) -> Path:
    return _in_a_loop(place, before="first")


@pytest.mark.parametrize(
    ("graph", "cause"),
    [
        (
            _in_unequal_branches,
            f"the input {SWITCH} selects between two branches .* give different",
        ),
        (
            _in_a_choice_that_is_computed,
            r"inside an If \(chosen\), whose condition the graph computes",
        ),
        (_in_a_loop, r"inside a Loop \(turns\)"),
        (_in_a_loop_and_before_it, r"block.proj .*inside a Loop \(turns\)"),
    ],
)
def test_a_product_in_an_unsupported_subgraph_is_refused_by_its_place(
    graph: object, cause: str, tmp_path: Path
) -> None:
    source = graph(tmp_path / "source")  # type: ignore[operator]
    with pytest.raises(ExportError, match=cause) as refused:
        export(source, tmp_path / "bundle")
    assert len(str(refused.value)) < 300


def test_data_outside_the_model_s_directory_is_refused_in_branches_too(tmp_path: Path) -> None:
    place = _in_equal_branches(tmp_path / "source")
    model = onnx.load(place / "model.onnx")
    held = model.graph.node[0].attribute[0].g
    held = next(a.g for a in model.graph.node[0].attribute if a.g.initializer)
    held.initializer[0].ClearField("raw_data")
    held.initializer[0].data_location = TensorProto.EXTERNAL
    held.initializer[0].external_data.add(key="location", value="../elsewhere.data")
    onnx.save(model, place / "model.onnx")
    with pytest.raises(LoraDeployError, match="elsewhere"):
        export(place, tmp_path / "bundle")


# -- a decoder with both branches ----------------------------------------------------------------


def _merged_decoder(bundle: Path, place: Path) -> Path:
    """Write a decoder like optimum's decoder_model_merged.onnx: one branch ignores the cache."""
    model = onnx.load(bundle / "model.onnx")
    graph = model.graph
    outer = {value.name for value in (*graph.input, *graph.initializer)}
    past = [value.name for value in graph.input if value.name.startswith("past_key_values.")]

    def branch(tag: str, *, cached: bool) -> onnx.GraphProto:
        made = onnx.GraphProto(name=tag)
        instead = {}
        for name in [] if cached else past:
            instead[name] = f"{tag}/{name}"
            made.node.append(
                helper.make_node("Slice", [name, "zero", "zero", "two"], [instead[name]])
            )
        for node in graph.node:
            own = onnx.NodeProto()
            own.CopyFrom(node)
            own.output[:] = [f"{tag}/{name}" if name else "" for name in own.output]
            own.input[:] = [
                instead.get(n, n) if n in outer or not n else f"{tag}/{n}" for n in own.input
            ]
            made.node.append(own)
        for value in graph.output:
            own_value = onnx.ValueInfoProto()
            own_value.CopyFrom(value)
            own_value.name = f"{tag}/{value.name}"
            made.output.append(own_value)
        return made

    choice = helper.make_node(
        "If",
        [SWITCH],
        [value.name for value in graph.output],
        name="optimum::if",
        then_branch=branch("then", cached=True),
        else_branch=branch("else", cached=False),
    )
    numbers_of = {"zero": [0], "two": [2]}
    added = [numpy_helper.from_array(np.array(v, np.int64), n) for n, v in numbers_of.items()]
    inputs = [*graph.input, _value(SWITCH, BOOL, [1])]
    whole = helper.make_graph(
        [choice], "merged", inputs, list(graph.output), [*graph.initializer, *added]
    )
    made = helper.make_model(whole, opset_imports=model.opset_import, ir_version=10)
    place.mkdir()
    onnx.save(made, place / "decoder_model_merged.onnx")
    for file in bundle.iterdir():
        if file.suffix == ".json" and file.name != "loradeploy.json":
            (place / file.name).write_bytes(file.read_bytes())
    return place / "decoder_model_merged.onnx"


def _traced(model: Path, place: Path) -> Path:
    """Write the decoder with its cache as an ONNX model outside of a bundle."""
    from loradeploy.export.trace import load_model, trace

    shutil.copytree(model, place, ignore=shutil.ignore_patterns("*.safetensors"))
    ir.save(trace(load_model(model, CAUSAL_LM)[0], CAUSAL_LM), place / "model.onnx")
    return place


def test_a_merged_decoder_generates_the_same_as_the_plain_one(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama, r=4, seed=2)
    plain = _traced(tiny_llama, tmp_path / "plain")
    merged = _merged_decoder(plain, tmp_path / "source")
    export(merged, tmp_path / "bundle", adapters={"own": adapter})
    export(plain / "model.onnx", tmp_path / "expected", adapters={"own": adapter})
    manifest = read_manifest(tmp_path / "bundle")
    assert SWITCH not in [spec.name for spec in manifest.inputs]
    assert len(manifest.targets) == len(read_manifest(tmp_path / "expected").targets)
    prompts = ["Shares rose on Monday", "A goal"]
    answers = [
        [
            answer.text
            for answer in TextGenerator(AdapterSession(tmp_path / name)).generate(
                prompts, adapters=["own", None], max_new_tokens=6
            )
        ]
        for name in ("bundle", "expected")
    ]
    assert answers[0] == answers[1]
