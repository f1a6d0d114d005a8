"""The options for the form of a graph: every allowed pair of them computes the same."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.adapter.files.tensors import read_arrays
from loradeploy.bundle.graph_form import BY_NAME, FORM_OPTIONS, GraphForm, form_of
from loradeploy.bundle.manifest import read_manifest
from loradeploy.bundle.run_target import RUN_TARGETS
from loradeploy.errors import ExportError
from loradeploy.export.building import content
from tests.conftest import ROOT, MakeAdapter, once
from tests.export.reference import apart, difference, factors, onnx_output, torch_output
from tests.tolerances import tolerance

IDS = np.random.default_rng(0).integers(3, 500, (2, 5))

# The tested values of each option. All pairs that are not in REFUSED have to work.
VALUES: Mapping[str, tuple[Any, ...]] = {
    "merge": (False, True),
    "precision": ("fp32", "fp16", "bf16", "int8", "int4"),
    "side_inputs": ((), ("dora",), ("bias",), ("embedding",)),
    "layout": (None, "slots", "rows"),
    "branches": (None, True, False),
    "required_inputs": (None, True),
    "fixed": (None, {"batch": 2, "sequence": 5, "past": 0}),
    "attention": (None, "gqa"),
    "logits_to_keep": (None, False),
    "quantize_embedding": (False, True),
    "target": (None, "cuda", "openvino", "web"),
    "operator": (None, True),
}
REFUSED: Mapping[tuple[str, Any, str, Any], str] = {
    ("layout", "rows", "side_inputs", ("embedding",)): "do not go together",
    **{
        ("merge", True, name, value): "do not go together: a merged graph has no side inputs"
        for name in ("side_inputs", "layout", "branches", "required_inputs")
        for value in VALUES[name]
        if value
    },
    ("branches", True, "target", "openvino"): "does not run on the device of `target='openvino'`",
    ("precision", "fp16", "operator", True): "`operator` do not go together: its kernels",
    **{
        ("operator", True, "target", target): "`operator=True` does not run on the device"
        for target in ("cuda", "openvino", "web")
    },
    ("quantize_embedding", True, "side_inputs", ("embedding",)): "do not go together",
    **{
        ("quantize_embedding", True, "precision", precision): "is for `precision='int8'`"
        for precision in ("fp32", "fp16", "bf16")
    },
}
# CUDA computes GroupQueryAttention only in fp16.
OFF_CUDA = {"attention": "gqa", "target": "cuda"}


def refusal(form: Mapping[str, Any]) -> str | None:
    """Return the error message for an impossible form, None for an allowed one."""
    if form["precision"] != "fp16" and OFF_CUDA.items() <= form.items():
        return "does not run on the device of `target='cuda'`"
    return next(
        (
            message
            for (one, value, other, its), message in REFUSED.items()
            if form[one] == value and form[other] == its
        ),
        None,
    )


def pairs(form: Mapping[str, Any]) -> set[tuple[str, str]]:
    return set(itertools.combinations([f"{name}={value}" for name, value in form.items()], 2))


def covering() -> Iterator[dict[str, Any]]:
    """Yield allowed forms in which every allowed pair of values occurs."""
    every = [
        dict(zip(VALUES, values, strict=True)) for values in itertools.product(*VALUES.values())
    ]
    possible = [form for form in every if refusal(form) is None]
    left = set().union(*map(pairs, possible))
    while left:
        best = max(possible, key=lambda form: len(pairs(form) & left))
        left -= pairs(best)
        yield best


def named(form: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={value}" for name, value in form.items() if value not in (None, (), False)
    )


@pytest.mark.breadth(4)
@pytest.mark.parametrize("form", list(covering()), ids=named)
def test_every_pair_of_options_computes_what_pytorch_computes(
    form: dict[str, Any], tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama, scale=0.1)
    manifest = ld.export(tiny_llama, tmp_path / "b", adapters={"a": adapter}, **form)
    expected = torch_output(tiny_llama, IDS, adapter=adapter)
    side = {} if form["merge"] else factors(tmp_path / "b", adapter)
    exact = form["precision"] == "fp32"
    error = difference if exact else apart
    allowed = tolerance("torch-onnx-tiny" if exact else f"export-{form['precision']}")
    assert error(onnx_output(tmp_path / "b", IDS, side=side), expected) <= allowed
    if not form["merge"]:
        base = torch_output(tiny_llama, IDS)
        assert error(onnx_output(tmp_path / "b", IDS), base) <= allowed
        assert apart(base, expected) > tolerance("export-int4")  # the adapter has an effect
    has = form_of(manifest)
    assert {kind for kind in form["side_inputs"] if kind != "bias"} <= has.side_inputs
    asked = {
        "precision": form["precision"],
        "merge": form["merge"],
        "layout": form["layout"],
        "branches": None if form["merge"] else form["branches"],  # not defined for a merged graph
        "attention": form["attention"],
        "required_inputs": form["required_inputs"],
        "logits_to_keep": form["logits_to_keep"],
        "quantize_embedding": form["quantize_embedding"],
        "target": form["target"],
        "operator": form["operator"],
    }
    actual = {name: getattr(has, name) for name in asked}
    assert actual == {
        name: actual[name] if value is None else value for name, value in asked.items()
    }
    assert dict(has.static_shapes) == ({**form["fixed"], "total": 5} if form["fixed"] else {})


def test_a_kind_of_side_inputs_that_no_layer_can_have_is_named(
    tiny_llama_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="loradeploy.export"):
        ld.export(
            tiny_llama_bundle, tmp_path / "b", side_inputs=["lora", "bias", "experts", "embedding"]
        )
    absent = [text.partition(":")[0] for text in caplog.messages if "can have" in text]
    assert absent == ["`side_inputs=['bias']`", "`side_inputs=['experts']`"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, "`required_inputs` is not for encoder-decoders, which are two graphs: leave it out"),
        ("web", "`target='web'` has `required_inputs`, which is not .*: choose another target"),
    ],
)
def test_an_encoder_decoder_is_refused_by_the_option_that_was_given(
    target: str | None, message: str, tiny_t5: Path, tmp_path: Path
) -> None:
    required = None if target else True
    with pytest.raises(ld.UsageError, match=message):
        ld.export(tiny_t5, tmp_path / "b", target=target, required_inputs=required)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [({one: value, other: its}, message) for (one, value, other, its), message in REFUSED.items()],
    ids=lambda value: named(value) if isinstance(value, dict) else "",
)
def test_an_impossible_pair_is_refused_before_anything_is_read(
    asked: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ld.UsageError, match=message):
        ld.export(tmp_path / "no model", tmp_path / "b", **asked)


def test_the_table_excludes_what_the_test_expects() -> None:
    refused = {(one, other) for one, _, other, _ in REFUSED if one == "merge"}
    excluded = {(option.name, other) for option in FORM_OPTIONS for other in option.excludes}
    assert refused | {("logits_to_keep", "fixed")} == excluded


@pytest.mark.parametrize("option", [o for o in FORM_OPTIONS if o.values], ids=lambda o: o.name)
def test_a_value_that_does_not_exist_is_refused_with_those_that_do(
    option: Any, tmp_path: Path
) -> None:
    with pytest.raises(ld.UsageError, match=f"expected one of .*{option.values[-1]}"):
        ld.export(tmp_path / "no model", tmp_path / "b", **{option.name: "other"})


# -- a bundle that is exported again ---------------------------------------------------------------

Again = Callable[..., GraphForm]


@pytest.fixture
def again(tiny_llama: Path, shared: Path, tmp_path: Path) -> Again:
    """(form of a bundle, options of a second export of it) → form of the second bundle."""

    def export(first: dict[str, Any], **asked: Any) -> GraphForm:
        name = "".join(c if c.isalnum() else "-" for c in named(first)) or "plain"
        bundle = once(shared / "forms" / name, lambda p: ld.export(tiny_llama, p, **first))
        ld.export(bundle, tmp_path / "again", **asked)
        return form_of(read_manifest(tmp_path / "again"))

    return export


@pytest.mark.parametrize(
    "first",
    [
        {"layout": "slots", "branches": True},
        {"attention": "gqa", "required_inputs": True},
        {"precision": "int8", "layout": "slots", "branches": False},
        {"side_inputs": ("dora", "embedding"), "fixed": {"batch": 2}},
        {"operator": True, "attention": "gqa"},
    ],
    ids=named,
)
def test_options_that_are_not_given_are_inherited(first: dict[str, Any], again: Again) -> None:
    form = again(first)
    for name, value in first.items():
        if name == "fixed":
            assert dict(form.static_shapes) == value
        elif name == "side_inputs":
            assert set(value) <= form.side_inputs
        else:
            assert getattr(form, name) == value, name


@pytest.mark.parametrize(
    ("first", "asked"),
    [
        ({"layout": "rows", "branches": True}, {"layout": "slots"}),
        ({"layout": "slots", "branches": True}, {"branches": False}),
        ({"attention": "gqa", "required_inputs": True}, {"required_inputs": False}),
        ({}, {"attention": "gqa"}),
        ({}, {"precision": "bf16"}),
        ({"layout": "rows"}, {"operator": True, "layout": "slots"}),
        ({"precision": "int8"}, {"operator": True, "layout": "slots", "branches": False}),
        ({"operator": True}, {"layout": "rows", "operator": False}),
        ({"operator": True}, {"precision": "int8"}),
    ],
    ids=lambda value: named(value) or "plain",
)
def test_given_options_are_applied_and_the_others_inherited(
    first: dict[str, Any], asked: dict[str, Any], again: Again
) -> None:
    form = again(first, **asked)
    for name, value in {**first, **asked}.items():
        assert getattr(form, name) == value, name


@pytest.mark.parametrize(
    ("first", "asked", "expected"),
    [
        ({"precision": "int8"}, {"operator": True}, ("slots", False, True)),
        ({"layout": "rows", "branches": True}, {"operator": True}, ("slots", False, True)),
        ({"operator": True}, {"layout": "rows"}, ("rows", False, True)),
        ({"operator": True}, {"branches": True}, ("slots", True, True)),
        ({"operator": True, "layout": "rows"}, {}, ("rows", False, True)),
        ({"operator": True}, {"target": "openvino"}, ("rows", False, False)),
    ],
    ids=lambda value: named(value) if isinstance(value, dict) else "",
)
def test_the_operator_is_kept_where_it_runs_and_does_not_keep_a_form_with_which_it_does_less(
    first: dict[str, Any], asked: dict[str, Any], expected: tuple[str, bool, bool], again: Again
) -> None:
    form = again(first, **asked)
    assert (form.layout, form.branches, form.operator) == expected


def test_a_graph_that_no_operator_is_for_is_refused_if_the_operator_is_asked_for(
    tiny_llama_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = ld.export(tiny_llama_bundle, tmp_path / "called", operator=True)
    assert called.operators
    monkeypatch.setattr(content, "use_operators", lambda *_: ())
    with pytest.raises(ExportError, match="no node of the graph can be a call of the operators'"):
        ld.export(tiny_llama_bundle, tmp_path / "again", operator=True)
    assert ld.export(tmp_path / "called", tmp_path / "again").operators == ()  # not asked for


@pytest.mark.parametrize(
    ("first", "asked", "expected"),
    [
        ({}, {"precision": "int8"}, ("rows", True)),
        ({"layout": "slots"}, {"precision": "int8"}, ("slots", True)),
        ({}, {"side_inputs": ("embedding",)}, ("slots", False)),
        ({"side_inputs": ("embedding",)}, {"precision": "int8"}, ("slots", True)),
    ],
    ids=str,
)
def test_what_a_bundle_has_by_default_is_not_a_choice(
    first: dict[str, Any], asked: dict[str, Any], expected: tuple[str, bool], again: Again
) -> None:
    form = again(first, **asked)
    assert (form.layout, form.branches) == expected


@pytest.mark.parametrize(
    ("first", "asked", "message"),
    [
        ({"attention": "gqa"}, {"attention": "standard"}, "GroupQueryAttention.*checkpoint"),
        ({"fixed": {"batch": 2}}, {"fixed": {"batch": 3}}, "'batch': 3.* has batch=2"),
        ({"precision": "int8"}, {"precision": "fp32"}, "int8 and cannot be made fp32"),
        (
            {},
            {"layout": "rows", "side_inputs": ("embedding",)},
            "embeddings need slot numbers",
        ),
        ({"precision": "fp16"}, {"operator": True}, "compute in float16, the operators compute"),
    ],
    ids=lambda value: named(value) if isinstance(value, dict) else "",
)
def test_an_impossible_conversion_of_a_bundle_is_refused_by_name(
    first: dict[str, Any], asked: dict[str, Any], message: str, again: Again
) -> None:
    with pytest.raises(ld.LoraDeployError, match=message):
        again(first, **asked)


# -- the target device of a bundle -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "asked", "expected"),
    [
        ({}, {"target": "cuda"}, {"layout": "rows", "branches": False, "attention": "standard"}),
        ({"layout": "slots"}, {"target": "cuda"}, {"layout": "rows", "branches": False}),
        ({}, {"target": "cuda", "layout": "slots"}, {"layout": "slots", "branches": False}),
        ({}, {"target": "cuda", "precision": "int4"}, {"layout": "rows", "branches": False}),
        ({}, {"target": "webgpu"}, {"precision": "fp32", "layout": "rows", "branches": False}),
        ({}, {"target": "openvino"}, {"branches": False, "required_inputs": True}),
        ({}, {"target": "web"}, {"precision": "int4", "required_inputs": True, "branches": True}),
        ({}, {"target": "web", "precision": "fp32"}, {"precision": "fp32", "layout": "rows"}),
        # Options given to the first export for another device are chosen again.
        ({"layout": "rows", "branches": True}, {"target": "cuda"}, {"branches": False}),
        # The target is inherited, with its defaults at another precision, and with given options.
        ({"target": "cuda"}, {"precision": "int8"}, {"target": "cuda", "branches": False}),
        ({"target": "cuda", "layout": "slots"}, {}, {"target": "cuda", "layout": "slots"}),
        # The CPU's choices are the defaults again.
        ({"target": "cuda"}, {"target": "cpu"}, {"layout": "rows", "target": "cpu"}),
        ({"target": "openvino"}, {"target": "cpu"}, {"required_inputs": False}),
    ],
    ids=lambda value: named(value) or "plain",
)
def test_a_target_sets_the_options_that_are_not_given(
    first: dict[str, Any], asked: dict[str, Any], expected: dict[str, Any], again: Again
) -> None:
    form = again({"precision": "fp32", **first} if "target" in first else first, **asked)
    assert {name: getattr(form, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("first", "asked", "message"),
    [
        ({}, {"target": "cuda", "attention": "gqa"}, "`attention='gqa'` with `precision='fp32'`"),
        (
            {"attention": "gqa"},
            {"target": "cuda"},
            "CUDA computes GroupQueryAttention only in fp16",
        ),
        ({}, {"target": "openvino", "branches": True}, "leaves all nodes within branches"),
        ({}, {"target": "web", "required_inputs": False}, "would answer as the base"),
        (
            {"target": "openvino"},
            {"branches": True},
            "does not run on the device of `target='openvino'`",
        ),
    ],
    ids=lambda value: named(value) if isinstance(value, dict) else "",
)
def test_a_form_that_the_device_cannot_run_is_refused_by_name(
    first: dict[str, Any], asked: dict[str, Any], message: str, again: Again
) -> None:
    with pytest.raises(ld.UsageError, match=message):
        again(first, **asked)


def test_web_clients_get_zeros_of_rank_one(
    tiny_llama_bundle: Path, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapters = {"a": make_adapter(tiny_llama, target_modules=["q_proj"])}
    for target, rank in (("web", 1), ("openvino", 0)):
        place = tmp_path / target
        ld.export(tiny_llama_bundle, place, adapters=adapters, target=target, precision="fp32")
        base, _ = read_arrays(place / "required.safetensors", error=ld.BundleError)
        assert {v.shape[2] for name, v in base.items() if name.endswith("lora_A")} == {rank}
        assert not any(values.any() for name, values in base.items() if ".lora_" in name)
        own, _ = read_arrays(place / "adapters" / "a.safetensors", error=ld.BundleError)
        ranks = {v.shape[2] for name, v in own.items() if name.endswith("lora_A")}
        assert ranks == {rank, 4}
        side = {name: v for name, v in own.items() if name in base}
        np.testing.assert_allclose(
            onnx_output(place, IDS, side=side),
            onnx_output(place, IDS, side=factors(place, adapters["a"])),
            atol=tolerance("rows"),
        )


def test_giving_the_inherited_value_is_no_conflict(again: Again) -> None:
    assert again({"fixed": {"batch": 2}}, fixed={"batch": 2}).static_shapes == {"batch": 2}
    assert BY_NAME["fixed"].inherited


# -- the table in the documentation ----------------------------------------------------------------


def test_the_documentation_has_the_table_of_targets() -> None:
    text = (ROOT / "docs" / "bundles.md").read_text(encoding="utf-8")
    for row in RUN_TARGETS:
        assert f"| `{row.name}` | {row.runs_in} |" in text, row.name
        for refusal in row.refuses:
            flags = [BY_NAME[name].flag.partition("/")[0] for name in refusal.form]
            assert (
                flags[0].removeprefix("--") in text.partition(f"| `{row.name}` |")[2].split("\n")[0]
            )


def test_the_documentation_has_the_table() -> None:
    text = (ROOT / "docs" / "bundles.md").read_text(encoding="utf-8")
    for option in FORM_OPTIONS:
        values = ", ".join(option.values)
        excluded = ", ".join(BY_NAME[name].flag.partition("/")[0] for name in option.excludes)
        row = f"| `{option.flag}` | {values} | {option.default} |"
        row += f" {'kept' if option.inherited else 'asked for each time'} | {excluded} |"
        assert row in text, row
