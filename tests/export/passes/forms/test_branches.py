"""Branches make graphs without active adapters faster and change no result."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import loradeploy as ld
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import BundleError, UsageError
from loradeploy.export.api import export
from loradeploy.export.graph.file import load_graph
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter
from tests.export.reference import token_feeds
from tests.runtime.feeds import logits, random_ids

IDS = random_ids(4, 6)
MIXED = ["small", None, "large", "small"]
Kinds = dict[str, tuple[Path, dict[str, Path]]]
each_kind = pytest.mark.parametrize("kind", ["factors", "heads", "scales and offsets"])
Form = dict[str, object]
FORMS: Final[dict[str, Form]] = {
    "rows": {"layout": "rows", "branches": False},
    "rows and branches": {"layout": "rows", "branches": True},
    "slots and branches": {"layout": "slots", "branches": True},
}
ROWS_AND_BRANCHES = FORMS["rows and branches"]
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture(scope="module")
def kinds(
    tiny_llama: Path,
    tiny_bert: Path,
    tiny_gpt2: Path,
    make_adapter: MakeAdapter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Kinds:
    """A bundle without branches and two adapters, for each kind of side input."""
    task = "sequence-classification"
    options = {"task": task, "modules_to_save": ["classifier"]}
    whole = {"use_dora": True, "bias": "all", "scale": 0.2}
    models = {
        "factors": (
            tiny_llama,
            {"small": make_adapter(tiny_llama, r=2), "large": make_adapter(tiny_llama, r=16)},
        ),
        "heads": (
            tiny_bert,
            {
                "small": make_adapter(tiny_bert, r=2, **options),
                "large": make_adapter(tiny_bert, r=8, seed=1, **options),
            },
        ),
        "scales and offsets": (
            tiny_gpt2,
            {
                "small": make_adapter(tiny_gpt2, r=2, target_modules=["c_attn"], **whole),
                "large": make_adapter(tiny_gpt2, r=8, seed=1),
            },
        ),
    }
    made = {}
    for number, (kind, (model, adapters)) in enumerate(models.items()):
        bundle = tmp_path_factory.mktemp("plain") / str(number)
        export(model, bundle, adapters=adapters)
        made[kind] = bundle, adapters
    return made


def _branches(bundle: Path) -> dict[str, ir.Graph]:
    (choice,) = (n for n in load_graph(bundle / "model.onnx").graph if n.op_type == "If")
    return {name: attribute.as_graph() for name, attribute in choice.attributes.items()}


@pytest.mark.breadth(3)
@each_kind
@each_form
def test_results_with_branches_are_bit_identical_to_those_without(
    kinds: Kinds, kind: str, form: Form, tmp_path: Path
) -> None:
    model, adapters = kinds[kind]
    plain = AdapterSession(model)
    session = AdapterSession(_exported(model, tmp_path / "branched", adapters, form))
    message = session.manifest
    assert {"layout": message.layout, "branches": message.branches} == form
    base = logits(plain, IDS)
    for use in (None, "small", "large", MIXED, [None] * 4, MIXED[::-1], MIXED):
        got = logits(session, IDS, use)
        np.testing.assert_array_equal(got, logits(plain, IDS, use))
        assert (use in (None, [None] * 4)) == np.array_equal(got, base)


def _exported(model: Path, place: Path, adapters: dict[str, Path], form: Form) -> Path:
    export(model, place, adapters=adapters, **form)  # type: ignore[arg-type]
    return place


def test_the_branch_of_the_base_reads_no_side_inputs(kinds: Kinds, tmp_path: Path) -> None:
    branches = _branches(_exported(*_factors(kinds, tmp_path), ROWS_AND_BRANCHES))
    targets = read_manifest(tmp_path / "b").targets
    side_inputs = {name for target in targets for name in (target.lora_A, target.lora_B)}
    for name, uses_them in (("then_branch", True), ("else_branch", False)):
        used = {v.name for node in branches[name] for v in node.inputs if v is not None}
        assert bool(used & side_inputs) == uses_them
    assert not any(n.op_type == "If" for branch in branches.values() for n in branch)


def _factors(kinds: Kinds, tmp_path: Path) -> tuple[Path, Path, dict[str, Path]]:
    model, adapters = kinds["factors"]
    return model, tmp_path / "b", adapters


@pytest.mark.parametrize(
    ("precision", "layout", "branches"),
    [("fp32", "rows", False), ("int8", "rows", True), ("int4", "rows", True)],
)
def test_branches_are_the_default_where_they_cost_no_memory(
    kinds: Kinds, tmp_path: Path, precision: str, layout: str, branches: bool
) -> None:
    manifest = export(kinds["factors"][0], tmp_path / "b", precision=precision)
    assert (manifest.layout, manifest.branches) == (layout, branches)


def test_factors_of_embeddings_need_slots(tiny_llama_bundle: Path, tmp_path: Path) -> None:
    manifest = export(
        tiny_llama_bundle, tmp_path / "b", precision="int4", side_inputs=["embedding"]
    )
    assert (manifest.layout, manifest.branches) == ("slots", True)
    with pytest.raises(UsageError, match="embeddings need slot numbers"):
        export(tiny_llama_bundle, tmp_path / "c", side_inputs=["embedding"], layout="rows")


@each_form
def test_a_native_adapter_selects_its_branch_in_plain_onnxruntime(
    kinds: Kinds, form: Form, tmp_path: Path
) -> None:
    bundle = _exported(*_factors(kinds, tmp_path), form)
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3
    session = onnxruntime.InferenceSession(bundle / "model.onnx", quiet)
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(bundle / "adapters" / "small.onnx_adapter"))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    given = token_feeds(session, IDS)
    ours = AdapterSession(bundle)
    for run_options, name in ((options, "small"), (None, None)):
        (got,) = session.run(["logits"], given, run_options)
        np.testing.assert_array_equal(got, logits(ours, IDS, name))


@pytest.mark.breadth(3)
@each_kind
@each_form
def test_a_bundle_with_branches_can_be_exported_again(
    kinds: Kinds, kind: str, form: Form, tmp_path: Path
) -> None:
    model, adapters = kinds[kind]
    branched = _exported(model, tmp_path / "b", adapters, form)
    export(branched, tmp_path / "again", adapters=adapters, layout="slots", branches=False)
    one = {"small": adapters["small"]}
    for source, merged in ((branched, "bm"), (model, "pm")):
        export(source, tmp_path / merged, adapters=one, merge=True)
    np.testing.assert_array_equal(
        logits(AdapterSession(tmp_path / "again"), IDS, MIXED),
        logits(AdapterSession(model), IDS, MIXED),
    )
    np.testing.assert_array_equal(
        logits(AdapterSession(tmp_path / "bm"), IDS), logits(AdapterSession(tmp_path / "pm"), IDS)
    )


def test_parity_passes_with_branches(kinds: Kinds, tiny_llama: Path, tmp_path: Path) -> None:
    bundle = _exported(*_factors(kinds, tmp_path), ROWS_AND_BRANCHES)
    report = ld.parity(bundle, model=tiny_llama, prompts=["The capital of", "Hi"], tokens=2)
    assert report.passed


def test_the_row_order_is_recomputed_for_other_rows_and_dropped_with_the_adapter(
    kinds: Kinds, tmp_path: Path
) -> None:
    session = AdapterSession(_exported(*_factors(kinds, tmp_path), ROWS_AND_BRANCHES))
    alone = {name: logits(session, IDS, name) for name in (None, "small", "large")}
    for rows in (MIXED, MIXED[::-1], ["large"] * 3 + ["small"], MIXED):
        got = logits(session, IDS, rows)
        for row, name in enumerate(rows):
            assert np.abs(got[row] - alone[name][row]).max() < 1e-4
    session.unload("small")
    session.load("small", kinds["factors"][1]["large"])  # another adapter under the name
    np.testing.assert_array_equal(
        logits(session, IDS, MIXED), logits(session, IDS, ["large", None, "large", "large"])
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "leaves"}, "`layout='leaves'`: expected one of slots, rows"),
        ({"layout": "rows", "merge": True}, "`layout` and `merge` do not go together"),
        ({"branches": True, "merge": True}, "`branches` and `merge` do not go together"),
    ],
)
def test_impossible_branches_are_refused(
    tiny_llama: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export(tiny_llama, tmp_path / "b", **options)  # type: ignore[arg-type]


def test_a_manifest_that_hides_the_branches_is_refused(kinds: Kinds, tmp_path: Path) -> None:
    bundle = _exported(*_factors(kinds, tmp_path), ROWS_AND_BRANCHES)
    text = (bundle / "loradeploy.json").read_text()
    (bundle / "loradeploy.json").write_text(text.replace('"branches": true', '"branches": false'))
    with pytest.raises(BundleError, match="adapter_"):
        AdapterSession(bundle)
