"""Node placement: on CUDA, every form of a graph runs on the device. Tested on stub libraries.

`tools.cuda_placement` opens onnxruntime's CUDA provider without a GPU. Nothing is computed; other
tests of the export show that all forms compute the same on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

import loradeploy as ld
from tests.conftest import ROOT, MakeAdapter
from tools.cuda_placement import Placement, StubsUnavailableError, place, placements, stubs
from tools.cuda_placement.__main__ import described
from tools.gpu_check import misplaced

GQA: Final = "com.microsoft:GroupQueryAttention"
# GroupQueryAttention reads the total number of positions from host memory.
TOTAL: Final = {"Squeeze": 1, "Cast": 1}
# CUDA has no fp32 kernel for it, so it is on the CPU together with its neighbors.
FP32_GQA: Final = {GQA: 2, **TOTAL}
FP32_GQA_ROWS: Final = {**FP32_GQA, "MatMul": 4}
# The nodes that compute sizes from the input `logits_to_keep`, in each branch.
KEPT: Final = {"model.onnx": {"Concat": 1, "Mul": 1}, "required.onnx": {"Concat": 1}}
NOTHING: Final[Mapping[str, int]] = {}
STEP: Final = {"batch": 1, "sequence": 1, "past": 127}
CONTROL_FLOW: Final = "control flow"
ON_CPU: Final = "not been partitioned"

# For each form: the source it is exported from, the export options, the number of nodes allowed on
# the CPU by operator, and a word of ONNX Runtime's reason not to capture a CUDA graph, or None.
FORMS: Final[Mapping[str, tuple[str, dict[str, Any], Mapping[str, int], str | None]]] = {
    "fp32 slots": ("fp32", {"layout": "slots"}, NOTHING, None),
    "fp32 rows": ("fp32", {}, NOTHING, None),
    "fp32 step": ("fp32", {"layout": "slots", "fixed": STEP}, NOTHING, None),
    "fp32 merged": ("fp32", {"merge": True}, NOTHING, None),
    "fp32 branches": ("fp32", {"branches": True}, NOTHING, CONTROL_FLOW),
    "fp32 gqa": ("fp32", {"attention": "gqa", "layout": "slots"}, FP32_GQA, ON_CPU),
    "fp32 gqa rows": ("fp32", {"attention": "gqa"}, FP32_GQA_ROWS, ON_CPU),
    "fp16 slots": ("fp16", {"layout": "slots"}, NOTHING, None),
    "fp16 rows": ("fp16", {}, NOTHING, None),
    "fp16 branches": ("fp16", {"layout": "slots", "branches": True}, NOTHING, CONTROL_FLOW),
    "fp16 gqa": ("fp16", {"attention": "gqa", "layout": "slots"}, TOTAL, None),
    "fp16 gqa rows": ("fp16", {"attention": "gqa"}, TOTAL, None),
    "fp16 gqa step": (
        "fp16",
        {"attention": "gqa", "layout": "slots", "fixed": STEP},
        NOTHING,
        None,
    ),
    "bf16 slots": ("fp32", {"precision": "bf16", "layout": "slots"}, NOTHING, None),
    "bf16 rows step": ("fp32", {"precision": "bf16", "fixed": STEP}, NOTHING, None),
    "bf16 gqa": (
        "fp32",
        {"precision": "bf16", "attention": "gqa", "layout": "slots"},
        FP32_GQA,
        ON_CPU,
    ),
    "bf16 rows": ("fp32", {"precision": "bf16"}, NOTHING, None),
    "int8 slots": ("fp32", {"precision": "int8", "layout": "slots", "branches": False}, {}, None),
    "int8 rows": ("fp32", {"precision": "int8", "branches": False}, NOTHING, None),
    "int4 slots": ("fp32", {"precision": "int4", "layout": "slots", "branches": False}, {}, None),
    "int4 rows": ("fp32", {"precision": "int4", "branches": False}, NOTHING, None),
    "int4 rows step": (
        "fp32",
        {"precision": "int4", "branches": False, "fixed": STEP},
        NOTHING,
        None,
    ),
    "int4 branches": ("fp32", {"precision": "int4"}, NOTHING, CONTROL_FLOW),
    "int4 gqa rows": (
        "fp32",
        {"precision": "int4", "branches": False, "attention": "gqa"},
        FP32_GQA_ROWS,
        ON_CPU,
    ),
    # Exported from an fp16 bundle, it computes in fp16, entirely on the device.
    "int4 fp16 gqa rows": (
        "fp16",
        {"precision": "int4", "attention": "gqa", "target": "cuda"},
        TOTAL,
        None,
    ),
}


# The forms tested with captured sessions: they include every layout and precision.
CAPTURED: Final = (
    *("fp32 slots", "fp32 rows", "fp16 slots", "fp16 rows", "fp16 gqa", "fp16 gqa rows"),
    *("bf16 slots", "bf16 rows", "int8 rows", "int4 slots", "int4 rows", "int4 fp16 gqa rows"),
    "fp32 step",
)
REFUSED: Final = {"fp32 branches": "has branches", "fp32 gqa rows": "leaves nodes of"}


@pytest.fixture(scope="module")
def forms(
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    tiny_llama_fp16_bundle: Path,
    make_adapter: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Mapping[str, Path]:
    """A bundle of every form, by name."""
    try:
        stubs()
    except StubsUnavailableError as problem:
        pytest.skip(str(problem))
    sources = {"fp32": tiny_llama_bundle, "fp16": tiny_llama_fp16_bundle}
    bundles: dict[str, Path] = {}
    for name, (source, form, *_) in FORMS.items():
        bundle = tmp_path_factory.mktemp("placed") / name.replace(" ", "-")
        if form.get("merge"):
            ld.export(sources[source], bundle, adapters=[make_adapter(tiny_llama)], **form)
        else:
            ld.export(sources[source], bundle, required_inputs=True, **form)
        bundles[name] = bundle
    return bundles


@pytest.fixture(scope="module")
def placed(forms: Mapping[str, Path]) -> Mapping[str, list[Placement]]:
    """The placement of model.onnx and required.onnx of every form, by one process on stubs."""
    files = [file for bundle in forms.values() for file in sorted(bundle.glob("*.onnx"))]
    found: dict[str, list[Placement]] = {name: [] for name in FORMS}
    for file, placement in zip(files, place(files), strict=True):
        found[file.parent.name.replace("-", " ")].append(placement)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_only_what_the_table_allows_is_on_the_cpu(
    form: str, placed: Mapping[str, list[Placement]]
) -> None:
    _, options, allowed, refusal = FORMS[form]
    expected = ["model.onnx"] if options.get("merge") else ["model.onnx", "required.onnx"]
    assert [found.graph for found in placed[form]] == expected
    for found in placed[form]:
        sizes = Counter(allowed)
        for _ in range(2 if options.get("branches", form == "int4 branches") else 1):
            sizes += Counter({} if {"fixed", "merge"} & options.keys() else KEPT[found.graph])
        assert found.on_cpu == sizes, found.graph
        assert found.counts["CUDAExecutionProvider"] > 50
        if refusal is None:
            assert found.refusal is None and found.copies == 0
        else:
            assert refusal in str(found.refusal) and found.copies > 0


@pytest.fixture(scope="module")
def captured(
    forms: Mapping[str, Path], tiny_llama: Path, make_adapter: MakeAdapter
) -> Mapping[str, Any]:
    """Results of sessions that capture their runs, on the stubs, by form."""
    adapters = {"small": make_adapter(tiny_llama), "large": make_adapter(tiny_llama, r=16, seed=2)}
    job = {"bundles": {name: forms[name] for name in (*CAPTURED, *REFUSED)}, "adapters": adapters}
    child = subprocess.run(
        [sys.executable, "-m", "tests.export.capture"],
        input=json.dumps(job, default=str),
        env={**os.environ, "LD_LIBRARY_PATH": str(stubs()), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", CAPTURED)
def test_a_session_captures_its_runs_on_buffers_with_fixed_addresses(
    form: str, captured: Mapping[str, Any]
) -> None:
    found = captured[form]
    assert found["enable_cuda_graph"] == "1"
    assert found["same addresses"] and found["memory"] == ["cuda"]
    ranks = {"(1, 16)": [16], "(1, 8)": [4]}
    if form != "fp32 step":  # that form has batch size one
        ranks["(2, 8)"] = [0, 4]
    assert found["ranks"] == ranks  # of the slots, copied back from the device
    assert found["captured"] == 1 + len(ranks)  # one more for the base, without side inputs


@pytest.mark.parametrize("form", REFUSED)
def test_a_session_refuses_to_capture_what_cuda_refuses(
    form: str, captured: Mapping[str, Any]
) -> None:
    assert captured[form]["refused"].startswith("`capture_graphs`: ")
    assert REFUSED[form] in captured[form]["refused"]


@pytest.mark.parametrize("form", ["fp32 slots", "fp16 slots", "fp16 gqa", "int4 rows"])
def test_a_rotation_is_one_node_in_every_precision(
    form: str, placed: Mapping[str, list[Placement]]
) -> None:
    for found in placed[form]:
        operators = [op for op, _ in found.nodes["CUDAExecutionProvider"]]
        assert operators.count("RotaryEmbedding") == 4  # queries and keys in two layers
        assert "Neg" not in operators
        assert operators.count("Slice") <= 1  # for the kept logits


def test_nodes_on_the_cpu_are_listed_first_with_their_reason(
    placed: Mapping[str, list[Placement]],
) -> None:
    lines = described(placed["fp32 gqa"][0])
    assert "2 com.microsoft:GroupQueryAttention: CUDA computes it in fp16 and bf16 only" in lines[2]
    assert lines[-1].startswith("  enable_cuda_graph=1 is refused: ")
    assert described(placed["fp32 slots"][0])[-1] == "  enable_cuda_graph=1 is accepted"


def test_the_check_on_a_gpu_machine_fails_where_nodes_leave_the_device(
    placed: Mapping[str, list[Placement]],
) -> None:
    on_cpu = misplaced(placed["fp32 gqa"][0])
    assert on_cpu[0] == "2 com.microsoft:GroupQueryAttention on the CPU"
    assert on_cpu[-1].startswith("no CUDA graph: ")
    assert misplaced(placed["fp16 branches"][0])[-1].startswith("no CUDA graph: ")
    for form in ("fp16 gqa rows", "fp32 rows", "int4 rows"):  # the forms chosen by --target cuda
        assert misplaced(placed[form][0]) == []


def test_a_directory_without_a_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ld.UsageError, match="is not a bundle or an ONNX file"):
        placements(tmp_path)
