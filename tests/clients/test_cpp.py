"""The C++ example generates the same tokens as the runtime, with and without adapters."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from loradeploy.export.api import export
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.conftest import ROOT, MakeAdapter, once
from tools.onnxruntime_headers import headers

EXAMPLE = ROOT / "examples" / "clients" / "cpp"
PROMPT = [5, 6, 7, 8, 9]
COUNT = 8


def _library() -> Path:
    """Return the onnxruntime library of the installed wheel."""
    wheel = Path(onnxruntime.__file__).parent / "capi"
    found = sorted(wheel.glob("libonnxruntime.so.*"))
    if not found:
        pytest.skip("this onnxruntime has no library beside its Python module")
    return found[0]


@pytest.fixture(scope="session")
def program(shared: Path) -> Path:
    """The example, built with its CMakeLists.txt against the installed onnxruntime."""
    if not sys.platform.startswith("linux") or None in map(shutil.which, ("cmake", "c++")):
        pytest.skip("a compiler for C++ and cmake on Linux are needed")
    library = _library()
    try:
        include = headers()
    except RuntimeError as problem:
        pytest.skip(f"no headers of onnxruntime: {problem}; set ONNXRUNTIME_INCLUDE")
    version = re.search(r"define ORT_API_VERSION (\d+)", _read(include, "onnxruntime_c_api.h"))
    if version and int(version[1]) > int(onnxruntime.__version__.split(".")[1]):
        pytest.skip(f"the headers are of 1.{version[1]}, onnxruntime is {onnxruntime.__version__}")

    def build(place: Path) -> None:
        (place / "onnxruntime" / "lib").mkdir(parents=True)
        (place / "onnxruntime" / "include").symlink_to(include)
        for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
            (place / "onnxruntime" / "lib" / name).symlink_to(library)
        configure = ["cmake", "-S", EXAMPLE, "-B", place, f"-DONNXRUNTIME={place / 'onnxruntime'}"]
        for command in (
            [*configure, "-DCMAKE_CXX_FLAGS=-Wall -Wextra"],
            ["cmake", "--build", place],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "warning:" not in done.stderr, done.stderr

    return once(shared / "cpp", build)


def _read(include: Path, name: str) -> str:
    return (include / name).read_text(encoding="utf-8")


def _run(program: Path, *words: object) -> subprocess.CompletedProcess[str]:
    libraries = {"LD_LIBRARY_PATH": str(program / "onnxruntime" / "lib")}
    return subprocess.run(
        [str(program / "swap_adapters"), *map(str, words)],
        env={**os.environ, **libraries},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(
    "options",
    [{"layout": "slots"}, {}, {"branches": True}, {"precision": "int4"}],
    ids=["slots", "rows", "branches", "int4"],
)
def test_cpp_generates_the_same_as_the_runtime(
    options: dict[str, object],
    program: Path,
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    adapters = {
        "all": make_adapter(tiny_llama, r=4, seed=5, scale=0.3),
        "few": make_adapter(tiny_llama, r=2, seed=6, scale=0.3, target_modules=["q_proj"]),
    }
    bundle = tmp_path / "bundle"
    export(tiny_llama_bundle, bundle, adapters=adapters, required_inputs=True, **options)  # type: ignore[arg-type]
    done = _run(program, bundle, COUNT, ",".join(map(str, PROMPT)))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    theirs = {(line["how"], line["name"]): line["tokens"] for line in lines}

    generator = TextGenerator(AdapterSession(bundle))
    names = [None, "all", "few"]
    results = generator.generate([PROMPT] * 3, names, max_new_tokens=COUNT)
    ours = {result.adapter or "base": list(result.token_ids) for result in results}
    for how in ("adapter", "row"):
        for name, tokens in ours.items():
            assert theirs[how, name][: len(tokens)] == tokens, (how, name)
    assert len({tuple(tokens) for tokens in ours.values()}) == 3, "the adapters did nothing"


def test_cpp_refuses_a_bundle_without_required_inputs_with_advice(
    program: Path, tiny_llama_bundle: Path
) -> None:
    done = _run(program, tiny_llama_bundle, COUNT, "5,6")
    assert done.returncode == 2
    assert "export --required-inputs" in done.stderr


@pytest.mark.parametrize("words", [("-3", "5,6"), ("8", "5,x"), ("8", "-5"), ("eight", "5")])
def test_cpp_refuses_words_that_are_not_numbers_from_0(
    words: tuple[str, str], program: Path, tmp_path: Path
) -> None:
    (tmp_path / "required.safetensors").touch()
    done = _run(program, tmp_path, *words)
    assert done.returncode == 2
    assert "tokens as 5,6,7" in done.stderr
