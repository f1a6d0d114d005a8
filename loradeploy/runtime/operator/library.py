"""Check the operators' library, and register it with a session's options.

The library is native code: loading it runs it. A session loads it only from the path that its
caller gives, never from a bundle.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Final

import onnxruntime

from loradeploy.adapter.files.digest import bytes_digest
from loradeploy.errors import OperatorError, first_line
from loradeploy.files import MAX_GRAPH_BYTES, check_file, read_bytes
from loradeploy.paths import resolved

_DIRECTORY: Final = Path(__file__).parent
SOURCES: Final = tuple(sorted(_DIRECTORY.glob("*.cc")))
HEADERS: Final = tuple(sorted(_DIRECTORY.glob("*.h")))
# Functions of the library: the digest of its sources, an instruction set that the processor lacks,
# and the operators that it has.
_IDENTITY: Final = "loradeploy_operator"
_LACKS: Final = "loradeploy_operator_lacks"
_OPERATORS: Final = "loradeploy_operators"
_INSTRUCTIONS: Final = "loradeploy_operator_instructions"
# Session option of loradeploy: the library was registered.
_REGISTERED: Final = "loradeploy.operator"
_LARGEST: Final = 1 << 20  # bytes of a source file


@cache
def source_digest() -> str:
    """The digest of the sources, by which a library is recognized."""
    files = (*SOURCES, *HEADERS)
    contents = (read_bytes(f, error=OperatorError, limit=_LARGEST) for f in files)
    return bytes_digest(b"\0".join(contents))


def is_library(path: Path) -> bool:
    """Whether the file may be a library that `build_operator` wrote; it is not loaded."""
    content = read_bytes(path, error=OperatorError, limit=MAX_GRAPH_BYTES)
    return f"{_IDENTITY}\0".encode() in content


def check_library(path: Path) -> frozenset[str]:
    """Load the library, check that this version of loradeploy can use it, and return its operators.

    It has those that its processor has a fast kernel for.

    Raises:
        OperatorError: there is no such file, it is not the operators' library, or it was built
            from another version's source or for another processor.
    """
    if not path.exists():
        raise OperatorError(f"{path} does not exist: build it with `loradeploy operator {path}`")
    check_file(path, error=OperatorError, limit=MAX_GRAPH_BYTES)
    if not is_library(path):
        raise OperatorError(f"{path} is not the library that `loradeploy operator` builds")
    try:
        library = ctypes.CDLL(os.fspath(resolved(path)))
        functions = [getattr(library, name) for name in (_IDENTITY, _LACKS, _OPERATORS)]
    except (OSError, AttributeError) as problem:
        raise OperatorError(
            f"{path} cannot be loaded ({first_line(problem)}): build it again here"
        ) from None
    for function in functions:
        function.restype = ctypes.c_char_p
    identity, lacks, operators = functions
    if identity() != source_digest().encode():
        raise OperatorError(
            f"{path} was built by another version of loradeploy: build it again with"
            f" `loradeploy operator {path}`"
        )
    if (missing := lacks()) is not None:
        raise OperatorError(
            f"{path} was built for a processor with {missing.decode()}, which this one lacks: build"
            " it again here"
        )
    return frozenset(operators().decode().split())


def instructions_of(path: Path) -> str:
    """The vector instructions that a library was built with, such as "AVX2".

    Raises:
        OperatorError: as `check_library`.
    """
    check_library(path)
    function = getattr(ctypes.CDLL(os.fspath(resolved(path))), _INSTRUCTIONS)
    function.restype = ctypes.c_char_p
    return str(function().decode())


def register(path: Path, options: onnxruntime.SessionOptions) -> frozenset[str]:
    """Make sessions that are opened with `options` run the library's operators; return these.

    Raises:
        OperatorError: as `check_library`, or onnxruntime refuses the library.
    """
    operators = check_library(path)
    if _is_registered(options):
        return operators
    try:
        options.register_custom_ops_library(os.fspath(resolved(path)))
    except Exception as problem:  # onnxruntime's exceptions have no other common base
        raise OperatorError(f"onnxruntime does not load {path}: {first_line(problem)}") from None
    options.add_session_config_entry(_REGISTERED, "1")
    return operators


def _is_registered(options: onnxruntime.SessionOptions) -> bool:
    """Whether `options` of an earlier session have the operator; onnxruntime refuses it twice."""
    try:
        return bool(options.get_session_config_entry(_REGISTERED))
    except RuntimeError:  # raised if there is no such entry
        return False


def check_runs(
    called: Collection[str], kernels: Collection[str], ran: Collection[str] | None
) -> None:
    """Raise OperatorError unless the kernels of the library run the calls of the graph.

    `called`: the operators that the graph calls. `kernels`: those that the library has. `ran`:
    those that the opened graph runs; None if onnxruntime does not report it.
    """
    expected = [name for name in called if name in kernels]
    if not expected:
        raise OperatorError(
            f"the library has no kernel for {', '.join(called)} on this processor: open the bundle"
            " without `operator`"
        )
    inlined = [name for name in expected if ran is not None and name not in ran]
    if inlined:
        raise OperatorError(
            f"onnxruntime {onnxruntime.__version__} does not use the operators' library for"
            f" {', '.join(inlined)} of this graph: update onnxruntime, or open the bundle without"
            " `operator`"
        )
