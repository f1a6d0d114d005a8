"""The fp32 weights of a large checkpoint are in a temporary file while it is exported."""

from __future__ import annotations

import logging
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loradeploy.export.api import export
from loradeploy.export.trace import load_model
from loradeploy.export.trace.loading import checkpoint, file_memory
from loradeploy.export.trace.loading.file_memory import Scratch, takes_file, weights_in_file

TASK = "causal-lm"


@pytest.fixture
def halved(tiny_llama: Path, tmp_path: Path) -> Path:
    """A checkpoint in bfloat16."""
    place = shutil.copytree(tiny_llama, tmp_path / "halved")
    tensors = load_file(place / "model.safetensors")
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(halved, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every checkpoint and every weight is large."""
    monkeypatch.setattr(file_memory, "_LARGE_MODEL", 1)
    monkeypatch.setattr(file_memory, "_LARGE_TENSOR", 1)


def files_of(bundle: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in bundle.rglob("*") if f.is_file()}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
@pytest.mark.usefixtures("all_large")
def test_the_bundle_is_that_of_weights_in_memory(
    precision: str, halved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []
    in_file = file_memory.weights_in_file

    def recorded(place: Path) -> Any:
        moved.append(place)
        return in_file(place)

    monkeypatch.setattr(checkpoint, "weights_in_file", recorded)
    export(halved, tmp_path / "in_file", precision=precision)
    assert moved == [tmp_path]
    monkeypatch.setattr(file_memory, "_LARGE_MODEL", 1 << 40)
    export(halved, tmp_path / "in_memory", precision=precision)
    assert moved == [tmp_path]
    assert files_of(tmp_path / "in_file") == files_of(tmp_path / "in_memory")


@pytest.mark.usefixtures("all_large")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_the_weights_are_mapped_from_a_file_without_a_name(halved: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    model, _ = load_model(halved, TASK, scratch=Scratch(scratch, "fp32"))
    assert not list(scratch.iterdir())
    assert all("(deleted)" in mapping_of(weight) for weight in model.parameters())
    expected, _ = load_model(halved, TASK)
    for name, weight in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), weight)


def mapping_of(tensor: torch.Tensor) -> str:
    """The line of /proc/self/maps with the memory of `tensor`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line
    return ""


@pytest.mark.usefixtures("all_large")
def test_a_disk_without_room_for_the_file_and_the_output_is_not_filled(
    halved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000))
    monkeypatch.setattr(checkpoint, "weights_in_file", never("opens a temporary file"))
    with caplog.at_level(logging.WARNING):
        load_model(halved, TASK, scratch=Scratch(tmp_path, "fp32"))
    assert "less than" in caplog.text and str(tmp_path) in caplog.text


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize("precision, room", [("fp32", 2.0), ("fp16", 1.5), ("int4", 1.5)])
def test_the_disk_needs_room_for_the_file_and_an_output_of_the_precision(
    precision: str, room: float, halved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4 * sum(tensor.numel() for tensor in load_file(halved / "model.safetensors").values())
    free = {"free": int(size * room)}
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(**free))
    assert takes_file(halved, Scratch(tmp_path, precision))
    free["free"] -= 1
    assert not takes_file(halved, Scratch(tmp_path, precision))


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_weights_are_in_memory_from_where_the_disk_is_full(tmp_path: Path, caplog: Any) -> None:
    import resource

    from transformers import core_model_loading

    weight = torch.randn(1000, 1000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (weight.nbytes * 3 // 2, limits[1]))
    try:
        with weights_in_file(tmp_path), caplog.at_level(logging.WARNING):
            first, second, third = (core_model_loading._materialize_copy(weight) for _ in range(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert first.data_ptr() != weight.data_ptr() and torch.equal(first, weight)
    assert second.data_ptr() == third.data_ptr() == weight.data_ptr()
    assert caplog.text.count("File too large") == 1
    assert not list(tmp_path.iterdir())


def never(what: str) -> Callable[..., Any]:
    def called(*_: object, **__: object) -> Any:
        raise AssertionError(what)

    return called
