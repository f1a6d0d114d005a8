"""Errors of the disk become one line that names the file; existing files are never lost."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loradeploy.disk import explained, scratch_directory
from loradeploy.errors import LoraDeployError, OutputError
from loradeploy.parity.report.writers import write_report
from loradeploy.writing import atomic_directory, atomic_file
from tests.cli.calling import one_line
from tests.conftest import ROOT, MakeAdapter
from tests.parity.reports import PASSED

NUMBERS = ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("named", [True, False])
def test_a_disk_error_names_the_file_that_could_not_be_written_and_what_to_do(
    name: str, named: bool, tmp_path: Path
) -> None:
    number = getattr(errno, name)
    with pytest.raises(OutputError) as error, atomic_file(tmp_path / "f") as temporary:
        raise OSError(number, os.strerror(number), *([str(temporary)] if named else []))
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'f'} cannot be written: {os.strerror(number)}: ")
    assert (error.value.errno, error.value.filename) == (number, str(tmp_path / "f"))
    assert isinstance(error.value, LoraDeployError) and isinstance(error.value, OSError)
    assert str(pickle.loads(pickle.dumps(error.value))) == message
    assert os.listdir(tmp_path) == []


def test_an_error_of_a_file_within_an_output_directory_names_the_directory(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError) as error,
        atomic_directory(tmp_path / "d", marker="m") as place,
        atomic_file(place / "inner"),
    ):
        raise OSError(errno.ENOSPC, "full")
    assert str(error.value).startswith(f"{tmp_path / 'd'} cannot be written: full")


@pytest.mark.parametrize(
    "problem",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/nowhere/input"),
        OSError(errno.EIO, "Input/output error", "/nowhere/input"),
        PermissionError(errno.EACCES, "Permission denied"),
        ZeroDivisionError("a slip"),
    ],
)
def test_an_error_that_is_not_of_the_output_disk_is_not_changed(
    problem: Exception, tmp_path: Path
) -> None:
    with pytest.raises(type(problem)) as error, atomic_file(tmp_path / "f"):
        raise problem
    assert error.value is problem


def test_the_disk_is_probed_where_the_error_of_a_library_does_not_say_why_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch reports a line of C++, numpy two numbers, and tokenizers an error without errno."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("loradeploy.disk._probe", lambda directory: full)
    for problem in (RuntimeError("unexpected pos 64 vs 0"), OSError("4 requested and 0 written")):
        with (
            pytest.raises(OutputError, match="f cannot be written: No space left"),
            atomic_file(tmp_path / "f"),
        ):
            raise problem


@pytest.mark.parametrize("place", ["file/f", "file/d/f"])
def test_a_file_in_the_way_of_a_directory_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match=f"{place} cannot be written: "),
        atomic_file(tmp_path / place),
    ):
        pass


def test_an_error_in_a_scratch_directory_names_the_systems_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (
        pytest.raises(OutputError, match=f"^{tmp_path} cannot be written: No space"),
        scratch_directory() as place,
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place / "logits.npy"))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_output_stream_ends_the_command_with_status_2(stream: str, tmp_path: Path) -> None:
    arguments = ["doctor", "--help"] if stream == "stdout" else ["inspect", str(tmp_path)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "loradeploy", *arguments],
            check=False,
            encoding="utf-8",
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full},
        )
    assert done.returncode == 2
    if stream == "stdout":
        assert "the standard output cannot be written: No space left" in one_line(done.stderr)


def unshared() -> list[str]:
    """A command prefix that gives a process its own mount namespace; skips where not permitted."""
    mount = "mount -t tmpfs -o size=1m tmpfs /mnt"
    for options in ([], ["--user", "--map-root-user"]):
        line = ["unshare", *options, "--mount"]
        if shutil.which("unshare"):
            done = subprocess.run([*line, "sh", "-c", mount], capture_output=True, check=False)
            if done.returncode == 0:
                return line
    pytest.skip("no process here may mount a disk of its own")


@pytest.fixture(scope="module")
def on_a_full_disk(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A function that runs command lines, in one process, on a disk that fills up."""
    line = unshared()

    def ask(requests: list[dict[str, Any]], disk: Path) -> Any:
        done = subprocess.run(
            [*line, sys.executable, "-m", "tests.full_disk", str(disk), json.dumps(requests)],
            capture_output=True,
            encoding="utf-8",
            check=False,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


def test_on_a_full_disk_every_command_reports_it_in_one_line_and_keeps_existing_files(
    on_a_full_disk: Callable[..., Any],
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    """Adapters converted, a bundle merged: with half or nearly all of the needed space free."""
    adapter, disk = str(make_adapter(tiny_llama)), tmp_path / "disk"
    disk.mkdir()
    bundle = str(tiny_llama_bundle)
    lines = {
        "a.onnx_adapter": ["convert", adapter, "--bundle", bundle],
        "reduced": ["convert", adapter, "--rank", "1"],
        "merged": ["export", "--model", bundle, "--adapter", adapter, "--merge"],
    }
    requests = [
        {
            "line": [*line, "--output", str(disk / name)],
            "shares": [0.5, 0.9],
            "before": True,
        }
        for name, line in lines.items()
    ]
    for name, results in zip(lines, on_a_full_disk(requests, disk), strict=True):
        for result in results:
            message = one_line(result["stderr"])
            assert result["status"] == 2, message
            assert f"{disk / name} cannot be written: No space left on device" in message
            assert result["kept"], f"{name} was lost"
            assert not [left for left in result["left"] if left.startswith(".")]


def test_training_on_a_full_disk_keeps_the_last_checkpoint_and_names_it(
    on_a_full_disk: Callable[..., Any], tiny_llama: Path, tmp_path: Path
) -> None:
    disk, data = tmp_path / "disk", tmp_path / "data.jsonl"
    disk.mkdir()
    data.write_text("".join(f'{{"prompt": "a{n}", "completion": "b"}}\n' for n in range(8)))
    flags = ("--max-steps", "3", "--batch-size", "2", "--rank", "2", "--save-steps", "1")
    given = ("--model", str(tiny_llama), "--data", str(data), "--output", str(disk / "a"))
    request = {
        "line": ["train", *given, *flags],
        "shares": [0.3, 1.8],
        "before": False,
    }
    (results,) = on_a_full_disk([request], disk)
    kept = set()
    for result in results:
        message = one_line(result["stderr"])
        assert result["status"] == 2 and f"{disk / 'a'}" in message, message
        assert " cannot be written: No space left on device: free some space there" in message
        assert "a" not in result["left"]
        kept.add("is intact: continue from it with --resume" in message)
        assert ("a-checkpoints" in result["left"]) == ("is intact" in message)
    assert kept == {True, False}, "both before the first checkpoint and after it"


@pytest.mark.parametrize("ending", [".json", ".xml", ".md", ".html"])
def test_a_report_that_cannot_be_written_is_named_and_the_old_one_is_kept(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"report{ending}"
    file.write_text("old")

    def fail(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(LoraDeployError, match=f"^{file} cannot be written: No space left"):
            write_report(PASSED, file)
    assert (os.listdir(tmp_path), file.read_text()) == ([file.name], "old")


def test_an_error_at_a_path_of_the_same_name_elsewhere_is_not_taken_for_the_outputs(
    tmp_path: Path,
) -> None:
    with (
        pytest.raises(OSError, match="elsewhere") as error,
        explained(tmp_path / "f", tmp_path / ".f.partial"),
    ):
        raise OSError(errno.ENOSPC, "full", "/elsewhere/.f.partial")
    assert not isinstance(error.value, OutputError)
