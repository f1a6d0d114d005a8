from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import BundleError, ExportError
from loradeploy.export.api import export
from loradeploy.export.building import adapted
from loradeploy.export.graph.file import load_graph
from loradeploy.export.match.linears import find_linears
from loradeploy.export.passes.forms import branches
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter
from tests.export.reference import apart, difference, factors, onnx_output, torch_output
from tests.tolerances import tolerance

IDS = np.random.default_rng(0).integers(3, 500, (2, 9))


@pytest.mark.breadth(2)
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("merge", [False, True])
def test_lower_precisions_are_close_to_the_adapted_model(
    precision: str,
    merge: bool,
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    adapter = make_adapter(tiny_llama, scale=0.1)
    source = tiny_llama if precision == "fp16" else tiny_llama_bundle
    manifest = export(
        source, tmp_path / "b", adapters={"a": adapter}, precision=precision, merge=merge
    )
    side = {} if merge else factors(tmp_path / "b", adapter)
    expected = torch_output(tiny_llama, IDS, adapter=adapter)
    turned = apart(onnx_output(tmp_path / "b", IDS, side=side), expected)
    assert turned <= tolerance(f"export-{precision}")
    assert apart(torch_output(tiny_llama, IDS), expected) > 2 * tolerance("export-int4")
    assert manifest.precision == precision
    if not merge:
        assert manifest.factor_dtype == ("float16" if precision == "fp16" else "float32")


@pytest.mark.parametrize("merge", [False, True])
def test_an_fp16_graph_is_packed_and_computes_in_fp16(
    merge: bool,
    tiny_llama: Path,
    tiny_llama_fp16_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    adapter = make_adapter(tiny_llama, scale=0.1)
    place = tmp_path / "b"
    manifest = export(
        tiny_llama_fp16_bundle, place, adapters={"a": adapter}, precision="int4", merge=merge
    )
    assert manifest.precision == "int4" and not manifest.branches
    assert {s.dtype for s in manifest.inputs if s.name.startswith("past")} == {"float16"}
    side = {} if merge else factors(place, adapter)
    expected = torch_output(tiny_llama, IDS, adapter=adapter)
    assert apart(onnx_output(place, IDS, side=side), expected) <= tolerance("export-int4")
    assert merge or manifest.factor_dtype == "float16"
    with pytest.raises(ExportError, match="in fp16 and cannot be made bf16"):
        export(tiny_llama_fp16_bundle, tmp_path / "no", precision="bf16")


def test_packed_weights_in_fp16_have_no_branches(
    tiny_llama_fp16_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "b"
    with pytest.raises(ExportError, match="packed weights in fp16 .* wrong in branches"):
        export(tiny_llama_fp16_bundle, place, precision="int4", branches=True)
    # A bundle with branches, forced here, cannot be opened, but it can be exported again.
    for module in (branches, adapted):
        monkeypatch.setattr(module, "branches_problem", lambda _: None)
    assert export(tiny_llama_fp16_bundle, place, precision="int4", branches=True).branches
    with pytest.raises(BundleError, match="int4 weights in branches .* --no-branches"):
        AdapterSession(place)
    export(place, tmp_path / "again", branches=False)
    assert not AdapterSession(tmp_path / "again").manifest.branches


def test_packed_weights_are_named_in_the_manifest(tiny_llama_bundle: Path, tmp_path: Path) -> None:
    export(tiny_llama_bundle, tmp_path / "b", precision="int4")
    graph = load_graph(tmp_path / "b" / "model.onnx")
    reached: dict[str, int] = {}  # the number of outputs per weight
    for target in read_manifest(tmp_path / "b").targets:
        _, end = target.slice or (0, target.out_features)
        reached[target.weight] = max(end, reached.get(target.weight, 0))
    for name, outputs in reached.items():
        weight = graph.graph.initializers[name]
        assert weight.shape is not None and weight.shape[0] == outputs


def test_a_packed_bundle_accepts_more_adapters_and_refuses_a_merge(
    tiny_llama: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama)
    export(tiny_llama_bundle, tmp_path / "b", precision="int4")
    export(tmp_path / "b", tmp_path / "more", adapters={"a": adapter})
    assert difference(onnx_output(tmp_path / "b", IDS), onnx_output(tmp_path / "more", IDS)) == 0
    with pytest.raises(ExportError, match="is already quantized"):
        export(tmp_path / "b", tmp_path / "m", adapters=[adapter], merge=True)
    with pytest.raises(ExportError, match="in int4 and cannot be made fp16"):
        export(tmp_path / "b", tmp_path / "h", precision="fp16")


def test_an_fp32_graph_is_packed_without_its_checkpoint(
    tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    export(tiny_llama_bundle, tmp_path / "b", precision="int8")
    linears = find_linears(load_graph(tmp_path / "b" / "model.onnx")).linears
    assert all(linear.quantized for linear in linears.values())
    turned = apart(onnx_output(tmp_path / "b", IDS), onnx_output(tiny_llama_bundle, IDS))
    assert 0 < turned <= tolerance("export-int8")


def test_half_precision_merges_round_once(
    tiny_llama: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama)
    export(tiny_llama_bundle, tmp_path / "whole", adapters=[adapter], merge=True)
    export(tiny_llama, tmp_path / "half", adapters=[adapter], merge=True, precision="fp16")
    whole = find_linears(load_graph(tmp_path / "whole" / "model.onnx")).linears
    half = find_linears(load_graph(tmp_path / "half" / "model.onnx")).linears
    assert whole.keys() == half.keys()
    for module, linear in whole.items():
        exact = linear.weight.const_value.numpy()
        exact = exact if linear.transposed == half[module].transposed else exact.T
        assert np.array_equal(exact.astype(np.float16), half[module].weight.const_value.numpy())
