"""Builds stub CUDA libraries, with which onnxruntime's CUDA provider opens sessions anywhere.

The required functions are taken from the provider's undefined symbols. Those that a session depends
on are implemented in cudart.c and cublas.c; all others do nothing and report success.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from filelock import FileLock

from loradeploy.errors import LoraDeployError
from tools.inputs.real_models import cache

# The source files of implemented functions, by the prefix of a library's name.
_WRITTEN: Final = {"libcudart.so.": "cudart.c", "libcublas.so.": "cublas.c"}
# Libraries whose symbols have no version, by the prefix of a symbol's name. They are always built.
_UNVERSIONED: Final = {"curand": "libcurand.so.10", "cuTensor": "libcuda.so.1"}
_VERSION: Final = 13  # the CUDA version whose structures cudart.c uses
_VERSIONED: Final = re.compile(r"(\w+)@@?(libcu\w*\.so\.(\d+))")
_DEFINED: Final = re.compile(r"\b(\w+)\(")


class StubsUnavailableError(LoraDeployError):
    """The stubs cannot be built or used here; the message says what is missing."""


def stubs() -> Path:
    """Return the directory of the stub libraries, for LD_LIBRARY_PATH; built once per onnxruntime.

    Raises:
        StubsUnavailableError: no C compiler, or this onnxruntime has no CUDA provider for CUDA 13.
    """
    library, compiler, reader = _provider_library(), _program("cc", "gcc"), _program("nm")
    key = hashlib.sha256(f"{library} {library.stat().st_mtime_ns}".encode())
    for source in (Path(__file__), *(_source(name) for name in _WRITTEN.values())):
        key.update(source.read_bytes())
    place = cache() / f"cuda-stubs-{key.hexdigest()[:12]}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.exists():
            partial = place.with_name(f"{place.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # left by a build that was killed
            partial.mkdir()
            for name, symbols in _symbols(reader, library).items():
                _compile(compiler, partial, name, symbols)
            partial.rename(place)
    return place


def _provider_library() -> Path:
    # Not imported, since that takes seconds, which the child process needs again.
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise StubsUnavailableError("onnxruntime is not installed: pip install onnxruntime-gpu")
    library = Path(spec.origin).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not library.is_file():
        raise StubsUnavailableError(
            "this onnxruntime has no CUDA provider for Linux: pip install onnxruntime-gpu"
        )
    return library


def _program(*names: str) -> str:
    for name in names:
        if found := shutil.which(name):
            return found
    raise StubsUnavailableError(f"there is no {names[0]}: install a C compiler and binutils")


def _symbols(reader: str, library: Path) -> Mapping[str, list[str]]:
    """Return the CUDA functions that the provider's library needs, by CUDA library."""
    listed = subprocess.run(
        [reader, "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, list[str]] = {name: [] for name in _UNVERSIONED.values()}
    for line in listed.splitlines():
        symbol = line.split()[-1]
        if versioned := _VERSIONED.fullmatch(symbol):
            name, owner, version = versioned.groups()
            if int(version) != _VERSION:
                raise StubsUnavailableError(
                    f"this onnxruntime is for CUDA {version}, the stubs are for {_VERSION}: use"
                    " onnxruntime-gpu 1.27 or newer"
                )
            found.setdefault(owner, []).append(name)
        for beginning, owner in _UNVERSIONED.items():
            if symbol.startswith(beginning):
                found[owner].append(symbol)
    return found


def _compile(compiler: str, place: Path, library: str, symbols: list[str]) -> None:
    written = next((f for start, f in _WRITTEN.items() if library.startswith(start)), None)
    text = "" if written is None else _source(written).read_text(encoding="utf-8")
    defined = set(_DEFINED.findall(text))
    rest = "".join(
        f"long {name}(void) {{ return 0; }}\n" for name in symbols if name not in defined
    )
    versioned = library not in _UNVERSIONED.values()
    scripts = {"c": text + rest, "map": f"{library if versioned else ''} {{ global: *; }};\n"}
    for suffix, content in scripts.items():
        (place / f"{library}.{suffix}").write_text(content, encoding="utf-8")
    linked = [f"-Wl,-soname,{library}", f"-Wl,--version-script={place / library}.map"]
    command = [compiler, "-w", "-shared", "-fPIC", "-O1", str(place / f"{library}.c"), *linked]
    built = subprocess.run(
        [*command, "-o", str(place / library), "-lpthread"], capture_output=True, text=True
    )
    if built.returncode:
        why = (built.stderr.strip().splitlines() or ["no message"])[0]
        raise StubsUnavailableError(f"{compiler} does not build {library}: {why}")


def _source(name: str) -> Path:
    return Path(__file__).parent / name
