"""A bundle that is exported again in another form has the graph of a direct export of that form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from loradeploy.bundle.graph_form import GraphForm, form_of
from loradeploy.bundle.manifest import read_manifest
from loradeploy.export.api import export
from loradeploy.export.building import content
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter, once
from tests.export.reference import apart, difference
from tests.runtime.feeds import logits, random_ids
from tests.tolerances import tolerance

Form = dict[str, Any]

_FORM: Form = {"operator": False, "branches": False, "layout": "slots", "logits_to_keep": True}
FORMS: dict[str, Form] = {
    "slots": _FORM,
    "rows": {**_FORM, "layout": "rows"},
    "branches": {**_FORM, "branches": True},
    "all logits": {**_FORM, "logits_to_keep": False},
    "operator": {**_FORM, "operator": True},
    "operator in branches": {**_FORM, "operator": True, "branches": True},
    "operator in rows": {**_FORM, "operator": True, "layout": "rows"},
    "operator in place": {**_FORM, "operator": True, "attention": "gqa"},
    "small embedding": {**_FORM, "operator": True, "quantize_embedding": True},
}
# The precision and the form of the bundle, and those of the export of it.
CONVERSIONS = [
    ("fp32", "rows", "fp32", "operator"),
    ("fp32", "operator in branches", "fp32", "branches"),
    ("fp32", "operator", "int8", "operator"),
    ("fp32", "branches", "int4", "operator in place"),
    ("fp32", "rows", "bf16", "operator"),
    ("bf16", "operator", "bf16", "rows"),
    ("fp16", "branches", "fp16", "rows"),
    *(("int8", "operator", "int8", form) for form in FORMS if form != "small embedding"),
    *(("int4", form, "int4", "operator") for form in list(FORMS)[:-2]),
    ("int4", "operator in place", "int4", "operator in place"),
    ("int8", "small embedding", "int8", "small embedding"),
]


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, make_adapter: MakeAdapter) -> dict[str, Path]:
    return {"one": make_adapter(tiny_llama), "two": make_adapter(tiny_llama, seed=1)}


@pytest.fixture(scope="module")
def direct(tiny_llama: Path, adapters: dict[str, Path], shared: Path) -> Callable[[str, str], Path]:
    """A function (precision, form) → the bundle that a checkpoint's export writes."""

    def make(precision: str, form: str) -> Path:
        return once(
            shared / "forms" / f"{precision}-{form}".replace(" ", "-"),
            lambda place: export(
                tiny_llama, place, adapters=adapters, precision=precision, **FORMS[form]
            ),
        )

    return make


def nodes(bundle: Path) -> Counter[str]:
    """The numbers of nodes by operator, in branches too."""
    graph = ir.load(bundle / "model.onnx").graph
    return Counter(f"{node.domain}:{node.op_type}" for node in graph.all_nodes())


def form(bundle: Path) -> GraphForm:
    return form_of(read_manifest(bundle))


def mixed(bundle: Path, library: Path | None = None, *, base: bool = False) -> NDArray[Any]:
    """The logits of a batch of both adapters and the base, or of the `base` only."""
    with AdapterSession(bundle, operator=library) as session:
        for name in session.manifest.adapters:
            session.load(name)
        rows = None if base else ["one", None, "two"]
        return logits(session, random_ids(3, 7), adapters=rows).astype(np.float32)


@pytest.mark.parametrize(("precision", "before", "into", "after"), CONVERSIONS)
def test_a_bundle_in_another_form_has_the_graph_and_the_numbers_of_that_form(
    precision: str,
    before: str,
    into: str,
    after: str,
    direct: Callable[[str, str], Path],
    operator_library: Path,
    tmp_path: Path,
) -> None:
    source, expected, again = direct(precision, before), direct(into, after), tmp_path / "again"
    changed = {} if precision == into else {"precision": into}
    export(source, again, adapters=["one", "two"], **FORMS[after], **changed)
    assert nodes(again) == nodes(expected)
    assert form(again) == form(expected)
    found, scale = mixed(again), np.abs(mixed(expected)).max()
    limit = tolerance("fp16-rounding") * scale if into == "fp16" else tolerance("rows")
    assert difference(found, mixed(expected)) <= limit
    if precision == into and form(source).quantize_embedding == form(again).quantize_embedding:
        assert difference(found, mixed(source)) <= limit
    if form(again).operator:
        library = "export-int8" if "int" in into else "torch-onnx-tiny"
        assert apart(mixed(again, operator_library), found) <= tolerance(library)
    effect = np.abs(found - mixed(again, base=True)).max(axis=(1, 2))
    assert effect[1] <= limit < 0.05 < min(effect[0], effect[2])


def test_the_same_conversion_writes_the_same_bytes(
    direct: Callable[[str, str], Path], tmp_path: Path
) -> None:
    source = direct("int8", "operator")
    for name in ("first", "second"):
        export(source, tmp_path / name, adapters=["one"], **FORMS["branches"])
    for name in ("model.onnx", "model.onnx.data"):
        first, second = ((tmp_path / place / name).read_bytes() for place in ("first", "second"))
        assert first == second


@pytest.mark.parametrize("operator", [False, True])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_merge_of_a_packed_bundle_has_the_graph_of_a_merge_of_the_checkpoint(
    precision: str,
    operator: bool,
    direct: Callable[[str, str], Path],
    tiny_llama: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
) -> None:
    asked: Form = {"merge": True, "precision": precision, "operator": operator}
    expected, found = tmp_path / "checkpoint", tmp_path / "bundle"
    export(tiny_llama, expected, adapters={"one": adapters["one"]}, **asked)
    export(direct(precision, "rows"), found, adapters=["one"], requantize=True, **asked)
    assert nodes(found) == nodes(expected)
    assert form(found) == form(expected)
    if precision == "int4":  # its rounding loses most of a random adapter
        return
    ids = random_ids(2, 7)
    with AdapterSession(found) as merged, AdapterSession(direct(precision, "rows")) as base:
        base.load("one")
        outputs, limit = logits(merged, ids), tolerance(f"export-{precision}")
        assert apart(outputs, logits(base, ids, "one")) <= limit < apart(outputs, logits(base, ids))


@pytest.mark.parametrize(("form", "runs"), [({}, 0), ({"fixed": {"batch": 2}}, 1)], ids=str)
def test_the_graph_of_a_traced_bundle_is_not_run_to_find_its_rows(
    form: Form,
    runs: int,
    tiny_llama: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export(tiny_llama, tmp_path / "source", adapters=adapters, **form)
    observed: list[ir.Model] = []
    monkeypatch.setattr(content, "observe", lambda model, *_: observed.append(model))
    export(tmp_path / "source", tmp_path / "again", adapters=["one"], precision="int8")
    assert len(observed) == runs, "a static size of a row may be that of the batch by chance"
