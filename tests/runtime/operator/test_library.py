"""Build the operators' library; other files are refused by name."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest

from loradeploy.bundle.names import LORA_ADD_OPERATOR, OPERATORS
from loradeploy.errors import MissingDependencyError, OperatorError, UsageError
from loradeploy.runtime.operator.build import build_operator
from loradeploy.runtime.operator.library import check_library, check_runs, register, source_digest
from tests.cli.calling import call


@pytest.fixture
def quick_compiler(operator_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that writes the library that the real one made of these sources in a minute."""
    _compiler(
        tmp_path, monkeypatch, f'while [ "$1" != -o ]; do shift; done\ncp "{operator_library}" "$2"'
    )


def _compiler(place: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    compiler = place / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


def test_the_command_builds_a_library(quick_compiler: None, tmp_path: Path) -> None:
    output = tmp_path / "new" / "lora_add.so"
    assert "wrote" in call("operator", str(output))
    assert check_library(output) <= set(OPERATORS)
    assert LORA_ADD_OPERATOR in check_library(output)
    assert list(output.parent.iterdir()) == [output]


def test_an_earlier_library_is_replaced(
    quick_compiler: None, operator_library: Path, tmp_path: Path
) -> None:
    output = tmp_path / "lora_add.so"
    shutil.copyfile(operator_library, output)
    before = output.stat().st_ino
    build_operator(output)
    assert output.stat().st_ino != before


def test_a_file_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "notes.txt"
    output.write_text("mine")
    with pytest.raises(UsageError, match="exists and is not a library of the operator"):
        build_operator(output)
    assert output.read_text() == "mine"


def test_without_a_compiler_the_build_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MissingDependencyError, match="install one of g\\+\\+, clang\\+\\+"):
        build_operator(tmp_path / "lora_add.so")
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(MissingDependencyError, match="no-such-compiler, named in \\$CXX"):
        build_operator(tmp_path / "lora_add.so")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_compilation_leaves_the_earlier_library(
    operator_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "lora_add.so"
    shutil.copyfile(operator_library, output)
    before = output.read_bytes()
    monkeypatch.setenv("CXXFLAGS", "-include no-such-header.h")
    with pytest.raises(OperatorError, match=r"cannot compile the operator: .*no-such-header\.h"):
        build_operator(output)
    assert output.read_bytes() == before
    assert list(tmp_path.iterdir()) == [output]


def test_a_linker_that_fails_is_reported_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _compiler(
        tmp_path,
        monkeypatch,
        "echo 'ld: final link failed: No space left on device' >&2\n"
        "echo 'collect2: error: ld returned 1 exit status' >&2\n"
        "exit 1",
    )
    with pytest.raises(OperatorError, match="final link failed: No space left on device"):
        build_operator(tmp_path / "lora_add.so")


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="lora_add.so does not exist: build it with"):
        check_library(tmp_path / "lora_add.so")


@pytest.mark.parametrize("content", [b"", b"not a library", b"loradeploy_operator\0"])
def test_a_file_that_is_no_library_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "lora_add.so"
    file.write_bytes(content)
    with pytest.raises(OperatorError, match=r"is not the library|cannot be loaded"):
        check_library(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lora_add.so")
    with pytest.raises(OperatorError, match="FIFO"):
        check_library(tmp_path / "lora_add.so")


def test_the_library_of_another_version_is_refused(operator_library: Path, tmp_path: Path) -> None:
    digest = source_digest().encode()
    content = operator_library.read_bytes()
    assert content.count(digest) == 1
    other = tmp_path / "lora_add.so"
    other.write_bytes(content.replace(digest, digest[:-1] + b"?"))
    with pytest.raises(OperatorError, match="built by another version of loradeploy: build it"):
        register(other, onnxruntime.SessionOptions())


def test_the_library_of_another_processor_is_refused(
    operator_library: Path, tmp_path: Path
) -> None:
    source, other = tmp_path / "other.c", tmp_path / "lora_add.so"
    source.write_text(
        f'const char* loradeploy_operator() {{ return "{source_digest()}"; }}\n'
        'const char* loradeploy_operator_lacks() { return "avx1024"; }\n'
        'const char* loradeploy_operators() { return ""; }\n'
    )
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("a C compiler is needed")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", other], check=True)
    with pytest.raises(OperatorError, match="for a processor with avx1024, which this one lacks"):
        check_library(other)


@pytest.mark.parametrize(
    ("kernels", "ran", "message"),
    [
        (["LoraAdd", "Attention"], ["LoraAdd", "Attention"], None),
        (["LoraAdd"], ["LoraAdd"], None),  # the processor has no fast kernel for the other
        (["LoraAdd"], None, None),  # onnxruntime before 1.24 does not report it
        (
            ["LoraAdd", "Attention"],
            ["LoraAdd"],
            "does not use the operators' library for Attention",
        ),
        (["MatMulNBits"], [], "has no kernel for LoraAdd, Attention on this processor"),
    ],
)
def test_every_call_that_the_library_has_a_kernel_for_has_to_run_it(
    kernels: list[str], ran: list[str] | None, message: str | None
) -> None:
    called = ["LoraAdd", "Attention"]
    if message is None:
        check_runs(called, kernels, ran)
        return
    with pytest.raises(OperatorError, match=message):
        check_runs(called, kernels, ran)


def test_options_of_an_earlier_session_can_be_used_again(operator_library: Path) -> None:
    options = onnxruntime.SessionOptions()
    register(operator_library, options)
    register(operator_library, options)
