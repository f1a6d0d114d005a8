"""Build the operators' library with the system's C++ compiler."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Final

from loradeploy.errors import MissingDependencyError, OperatorError, shortened
from loradeploy.files import atomic_file, check_replaceable_file
from loradeploy.paths import takes_paths
from loradeploy.printable import logger_of, printable
from loradeploy.runtime.operator.library import SOURCES, check_library, is_library, source_digest

logger = logger_of(__name__)
_COMPILERS: Final = ("g++", "clang++", "c++")
_SYSTEM: Final = platform.system()
_SECONDS: Final = 900
_LINKER_FAILED: Final = re.compile(r"error: (ld returned|linker command failed)")
# The sources have explicit vectors. If the compiler vectorized the rest, it could fuse or separate
# multiplications and additions in one case and not in another, and results would depend on the
# number of rows. The last flag is for the same: where g++ tunes for AMD's Zen, it fuses the sums of
# some loops only. clang ignores it.
FLAGS: Final = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-tree-vectorize", "-fno-tree-slp-vectorize"),
    "--param=avoid-fma-max-bits=0",
)


@takes_paths("output")
def build_operator(output: str | os.PathLike[str]) -> Path:
    """Compile the operators' library for this machine's processor, and return its path.

    The compiler is $CXX, or the first of g++, clang++ and c++ that is installed; $CXXFLAGS are
    added to its flags. No headers of onnxruntime are needed. An earlier library at `output` is
    replaced when the new one is complete.

    Raises:
        MissingDependencyError: there is no compiler.
        OperatorError: the sources cannot be compiled, the library cannot be used here, or this is
            Windows.
        UsageError: `output` is another file. OutputError: it cannot be written.
    """
    path = Path(output)
    check_replaceable_file(path, kind="a library of the operator", own=is_library)
    if _SYSTEM == "Windows":
        raise OperatorError(
            "the operators' library is built on Linux and macOS: on Windows, open the bundle"
            " without `operator`, and onnxruntime's operators compute the same"
        )
    compiler = _compiler()
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    own = shlex.split(os.environ.get("CXXFLAGS", ""))
    with atomic_file(path) as temporary:
        command = [
            *(*compiler, *FLAGS, native, f'-DLORADEPLOY_SOURCE="{source_digest()}"', *own),
            *(*map(os.fspath, SOURCES), "-o", os.fspath(temporary)),
        ]
        logger.info("compiling with %s, which takes about a minute", compiler[0])
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as problem:
            raise OperatorError(f"{compiler[0]} does not run: {problem}") from None
        if done.returncode:
            raise OperatorError(
                f"{compiler[0]} cannot compile the operator: {_error_in(done.stderr)}"
            )
        check_library(temporary)
    return path


def _compiler() -> list[str]:
    """The command of the C++ compiler."""
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]) is not None:
            return command
    if given:
        raise MissingDependencyError(f"the compiler {given[0]}, named in $CXX, is not installed")
    raise MissingDependencyError(
        f"no C++ compiler is installed: install one of {', '.join(_COMPILERS)}, or name one in $CXX"
    )


def _error_in(output: str) -> str:
    """The first error in the compiler's output, or its last line.

    The compiler reports that its linker failed; the line before is the linker's, with the reason.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    lines = [line for line in lines if not _LINKER_FAILED.search(line)] or lines
    found = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
    return shortened(printable(found), 200)
