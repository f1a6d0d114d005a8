"""Libraries of other compilers and for other processors compute the same within the tolerance."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from loradeploy.errors import OperatorError
from loradeploy.runtime.operator import build
from loradeploy.runtime.operator.build import build_operator
from loradeploy.runtime.operator.library import SOURCES, check_library, instructions_of
from tests.runtime.operator import (
    test_attention,
    test_fused,
    test_group_query_attention,
    test_mat_mul_n_bits,
    test_swiglu,
)
from tests.runtime.operator.kernel import call, expected, inputs, session
from tests.tolerances import tolerance

# Compiler and flags, which stand after -march=native.
BUILDS = {
    "plain x86-64": ("g++", "-march=x86-64"),
    "AVX2": ("g++", "-march=haswell"),
    "AVX-512 without VNNI": ("g++", "-march=x86-64-v4"),
    "clang": ("clang++", ""),
}


@pytest.mark.breadth
@pytest.mark.parametrize("name", BUILDS)
def test_other_builds_compute_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler, flags = BUILDS[name]
    if shutil.which(compiler) is None or (flags and platform.machine() != "x86_64"):
        pytest.skip(f"{compiler} is needed, on x86-64")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("CXXFLAGS", flags)
    try:
        library = build_operator(tmp_path / "other.so")
    except OperatorError as problem:
        if "which this one lacks" not in str(problem):
            raise
        pytest.skip(str(problem))
    if "AVX" in name:
        assert instructions_of(library) == name.removesuffix(" without VNNI")
    opened = session(library)
    for sizes in ({"into": 70, "out": 150}, {"into": 2051, "out": 1030}):
        given = inputs(batch=5, sequence=9, ranks=[69, 16, 0], ids=[0, 1, 2, 0, 1], **sizes)
        together, correct = call(opened, given), expected(given)
        assert np.abs(together - correct).max() <= tolerance("operator") * np.abs(correct).max()
        assert np.abs(together - given["y"])[[0, 1, 3, 4]].max(axis=(1, 2)).min() > 1
        alone = given | {each: given[each][:, [4]] for each in ("x", "y")}
        np.testing.assert_array_equal(together[:, [4]], call(opened, alone))
    _check_other_kernels(library)


def _check_other_kernels(library: Path) -> None:
    """Check the kernels that stand for standard nodes, in all of their shapes."""
    for shape in test_attention.SHAPES.values():
        for mask in ("left padding", "tree", "numbers"):
            test_attention.test_the_kernel_computes_what_onnxruntime_computes(library, shape, mask)
            test_attention.test_a_row_does_not_depend_on_the_other_rows(library, shape, mask)
    grouped = test_group_query_attention
    for calls in grouped.CALLS:
        for heads in grouped.HEADS:
            grouped.test_the_kernel_computes_what_onnxruntime_computes(library, calls, heads, {})
    for name, sizes in test_fused.CASES:
        for given in test_fused.CALLS:
            test_fused.test_one_call_computes_what_calls_for_each_layer_compute(
                library, name, sizes, given
            )
    for given in test_fused.CALLS:
        test_fused.test_a_residual_is_added_to_what_lora_add_computes(library, 70, given)
    for shape in test_swiglu.SHAPES:
        test_swiglu.test_both_kernels_compute_silu_of_the_gate_times_up(library, shape)
    packed = test_mat_mul_n_bits
    if packed.NAME in check_library(library):
        for shape in packed.SHAPES:
            for layout in packed.LAYOUTS:
                packed.test_the_kernel_computes_what_onnxruntime_computes(library, shape, layout)
                packed.test_a_row_does_not_depend_on_the_other_rows(library, shape, layout)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_the_sources_compile_for_arm(source: Path) -> None:
    compiler = "aarch64-linux-gnu-g++"
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is needed")
    flags = (*build.FLAGS, "-fsyntax-only", '-DLORADEPLOY_SOURCE="x"')
    subprocess.run([compiler, *flags, source], check=True)


def test_on_windows_the_build_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "_SYSTEM", "Windows")
    with pytest.raises(OperatorError, match="built on Linux and macOS"):
        build_operator(tmp_path / "operators.dll")
    assert list(tmp_path.iterdir()) == []
