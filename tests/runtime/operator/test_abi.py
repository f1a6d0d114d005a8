"""The excerpt of ONNX Runtime's C API has every entry at its place in the original header."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from loradeploy.runtime.operator.library import HEADERS
from tools.onnxruntime_headers import headers

(EXCERPT,) = (path for path in HEADERS if path.name == "onnxruntime_abi.h")


def test_every_entry_is_at_its_place(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("a compiler for C++ is needed")
    try:
        include = headers()
    except RuntimeError as problem:
        pytest.skip(f"no headers of onnxruntime: {problem}; set ONNXRUNTIME_INCLUDE")
    checks = []
    for table in ("OrtApi", "OrtApiBase", "OrtCustomOp"):
        body = EXCERPT.read_text().partition(f"struct {table} {{")[2].partition("\n};")[0]
        entries = re.findall(r"\(\*(\w+)\)\(", body)
        entries = [name for name in entries if name != "task"]  # a parameter
        assert len(entries) > 1
        checks += [
            f'static_assert(offsetof(ours::{table}, {name}) == offsetof(::{table}, {name}), "");'
            for name in entries
        ]
    constants = re.findall(
        r"\b(?:ORT_\w+|ONNX_TENSOR_ELEMENT_DATA_TYPE_\w+|INPUT_OUTPUT_\w+|OrtMemTypeDefault)\b",
        EXCERPT.read_text(),
    )
    assert "ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL" in constants
    checks += [
        f'static_assert(int(ours::{name}) == int(::{name}), "");' for name in sorted(set(constants))
    ]
    source = tmp_path / "places.cc"
    text = [
        "#include <cstddef>\n#include <cstdint>\n#include <onnxruntime_c_api.h>",
        f'namespace ours {{\n#include "{EXCERPT}"\n}}',
        'static_assert(ours::kApiVersion <= ORT_API_VERSION, "");',
        *checks,
    ]
    source.write_text("\n".join(text))
    done = subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", "-I", include, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
