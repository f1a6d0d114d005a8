"""Untrusted files run no code, are opened by one function, and never block (FIFOs, devices)."""

from __future__ import annotations

import ast
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from loradeploy.adapter import load_adapter
from loradeploy.bundle.adapter_inputs.native import read_onnx_adapter
from loradeploy.bundle.manifest import read_manifest
from loradeploy.bundle.names import MANIFEST_NAME
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.errors import LoraDeployError, ModelError
from loradeploy.files import check_directory, check_file, copy_file, open_file, read_json, read_text
from tests.conftest import ROOT, MakeAdapter

# -- the code --------------------------------------------------------------------------------------

SOURCES = sorted(p for part in ("loradeploy", "tools") for p in (ROOT / part).rglob("*.py"))
# Functions that read trusted files: of the system, of the package, or just written by it.
OWN_READERS = {
    "loradeploy/adapter/modules/renamings.py",
    "loradeploy/files.py",
    "loradeploy/parity/backends/genai.py",
    "loradeploy/parity/report/html.py",
    "loradeploy/runtime/decoding/caches/memory.py",
    "loradeploy/runtime/devices/cgroups.py",
    "loradeploy/runtime/devices/facts.py",
    "loradeploy/runtime/devices/environment.py",
    "loradeploy/runtime/memory.py",
    "loradeploy/runtime/reading/huge_pages.py",
    "loradeploy/writing.py",
}


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def calls(file: Path) -> Iterator[tuple[str, str, dict[str, ast.expr], int]]:
    """Yield every call in `file`: owner, name, arguments (by name or position) and line number."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Call):
            options = {word.arg: word.value for word in node.keywords if word.arg}
            options |= {str(number): value for number, value in enumerate(node.args)}
            if isinstance(node.func, ast.Attribute):
                yield ast.unparse(node.func.value), node.func.attr, options, node.lineno
            elif isinstance(node.func, ast.Name):
                yield "", node.func.id, options, node.lineno


def says(options: dict[str, ast.expr], name: str, value: bool) -> bool:
    found = options.get(name)
    return isinstance(found, ast.Constant) and found.value is value


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def unpickles(file: Path) -> bool:
    """Whether `file` imports a pickle reader; the error class, which torch raises too, is none."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            if PICKLES & {alias.name.partition(".")[0] for alias in node.names}:
                return True
        elif (
            isinstance(node, ast.ImportFrom)
            and node.module in PICKLES
            and {alias.name for alias in node.names} != {"UnpicklingError"}
        ):
            return True
    return False


def test_no_pickle_is_read_and_no_code_of_a_model_is_run_unasked() -> None:
    for file in SOURCES:
        assert not unpickles(file), file
        for owner, name, options, line in calls(file):
            where = f"{file}:{line}"
            if owner == "torch" and name == "load":
                assert says(options, "weights_only", True), where
            if owner in ("np", "numpy") and name == "load":
                # Neither reads pickles: numpy's default, or the explicit False.
                assert "allow_pickle" not in options or says(options, "allow_pickle", False), where
            at_hand = name == "from_config" and "tools" in file.relative_to(ROOT).parts
            if owner and name in ("from_pretrained", "from_config", "load_dataset") and not at_hand:
                # These run no code of a model, and do not have the argument.
                data = owner.endswith(("PeftModel", "GenerationConfig"))
                assert data or "trust_remote_code" in options, where
            assert owner or name not in ("pipeline", "eval", "exec"), where


def test_files_of_others_are_opened_in_one_place() -> None:
    found = [
        f"{file}:{line}: {owner}.{name}"
        for file in SOURCES
        if (at := file.relative_to(ROOT)).parts[0] == "loradeploy" and str(at) not in OWN_READERS
        for owner, name, options, line in calls(file)
        if (name == "open" and not owner and ast.unparse(options["1"]) not in ("'wb'", "'rb+'"))
        or (owner and name in ("read_text", "read_bytes"))
    ]
    assert not found


def test_a_path_of_others_is_resolved_in_one_place() -> None:
    """Path.resolve and Path.expanduser raise RuntimeError where a path leads nowhere."""
    found = [
        f"{file}:{line}: {owner}.{name}"
        for file in SOURCES
        if file.relative_to(ROOT).parts[0] == "loradeploy" and file != ROOT / "loradeploy/files.py"
        for owner, name, options, line in calls(file)
        if owner and (name in ("expanduser", "home") or (name == "resolve" and not options))
        if owner != "os.path"
    ]
    assert not found


# -- special files ---------------------------------------------------------------------------------


def fifo(place: Path) -> None:
    os.mkfifo(place)


def link_to_a_device(place: Path) -> None:
    place.symlink_to("/dev/zero")


def link_to_a_fifo(place: Path) -> None:
    os.mkfifo(f"{place}.fifo")
    place.symlink_to(f"{place}.fifo")


def unix_socket(place: Path) -> None:
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as made:
        made.bind(f"{short}/s")  # the path of a socket has at most about 100 characters
        shutil.move(f"{short}/s", place)


SPECIAL = {
    "a FIFO": fifo,
    "a device": link_to_a_device,
    "a FIFO behind a link": link_to_a_fifo,
    "a socket": unix_socket,
}
pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")


@pytest.fixture(params=SPECIAL)
def special(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    """A function that replaces a file by a special file and returns the expected error message."""

    def put(place: Path) -> str:
        place.unlink(missing_ok=True)
        SPECIAL[request.param](place)
        kind = request.param.removesuffix(" behind a link")
        return f"{place.name}.* is {kind}: only regular files are read"

    return put


@pytest.mark.parametrize("read", [check_file, open_file, read_text, read_json])
def test_only_regular_files_are_opened(
    read: Callable[..., Any], special: Callable[[Path], str], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=special(tmp_path / "f")):
        read(tmp_path / "f", error=ModelError)
    with pytest.raises(ModelError, match="only regular files"):
        copy_file(tmp_path / "f", tmp_path / "copy", error=ModelError)
    with pytest.raises(ModelError, match="only regular files"):
        check_directory(tmp_path, error=ModelError)


def test_a_size_is_known_before_a_byte_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "f", "wb") as file:
        file.truncate(1 << 40)  # a sparse file: it takes no space
    with pytest.raises(ModelError, match="1,099,511,627,776 bytes, more than the"):
        read_text(tmp_path / "f", error=ModelError)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_special_file_in_an_adapter_is_refused_without_blocking(
    name: str,
    special: Callable[[Path], str],
    tiny_llama: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    place = Path(shutil.copytree(make_adapter(tiny_llama), tmp_path / "adapter"))
    with pytest.raises(LoraDeployError, match=special(place / name)):
        load_adapter(place)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (MANIFEST_NAME, read_manifest),
        *(
            (name, Tokenizer)
            for name in (
                *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
                *("generation_config.json", "special_tokens_map.json", "config.json"),
            )
        ),
        ("model.onnx.data", lambda place: check_directory(place, error=LoraDeployError)),
    ],
)
def test_a_special_file_in_a_bundle_is_refused_without_blocking(
    name: str,
    read: Callable[[Path], object],
    special: Callable[[Path], str],
    tiny_llama_bundle: Path,
    tmp_path: Path,
) -> None:
    place = Path(shutil.copytree(tiny_llama_bundle, tmp_path / "bundle", symlinks=True))
    with pytest.raises(LoraDeployError, match=special(place / name)):
        read(place)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "other"])
def test_a_special_file_in_a_model_is_refused_without_blocking(
    name: str, special: Callable[[Path], str], tiny_llama: Path, tmp_path: Path
) -> None:
    from loradeploy.lora.base.checkpoint import find_checkpoint

    place = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    message = special(place / name)
    with pytest.raises(ModelError, match=message):
        find_checkpoint(place)


def test_special_files_as_weights_or_data_are_refused_without_blocking(
    special: Callable[[Path], str], tmp_path: Path
) -> None:
    from loradeploy.export.graph.file import load_graph
    from loradeploy.parity.compare.feeds import read_feeds
    from loradeploy.runtime.prompts import read_requests
    from loradeploy.train.config_file import read_yaml
    from loradeploy.train.data.sources import Source, rows

    readers: dict[str, Callable[[Path], object]] = {
        "a.onnx_adapter": read_onnx_adapter,
        "f.npz": read_feeds,
        "p.txt": read_requests,
        "c.yaml": read_yaml,
        "d.jsonl": lambda file: list(rows(Source(file))),
        "d.csv": lambda file: list(rows(Source(file))),
        "d.parquet": lambda file: list(rows(Source(file))),
        "m.onnx": load_graph,
    }
    for name, read in readers.items():
        with pytest.raises(LoraDeployError, match=special(tmp_path / name)):
            read(tmp_path / name)
