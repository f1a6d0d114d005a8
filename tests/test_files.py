"""Files are written whole or not at all, and no path leaves its directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loradeploy.errors import BundleError, UsageError
from loradeploy.files import (
    atomic_directory,
    atomic_file,
    inside,
    read_json,
    write_json,
)

MARKER = "loradeploy.json"


def write_bundle(place: Path, text: str) -> None:
    with atomic_directory(place, marker=MARKER) as temporary:
        (temporary / MARKER).write_text(text)


def test_a_directory_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write_bundle(tmp_path / "b", text)
    assert (tmp_path / "b" / MARKER).read_text() == "new"
    assert os.listdir(tmp_path) == ["b"]


def test_a_failure_keeps_the_old_directory_and_leaves_nothing_else(
    tmp_path: Path,
) -> None:
    write_bundle(tmp_path / "b", "old")
    with (
        pytest.raises(OSError, match="disk"),
        atomic_directory(tmp_path / "b", marker=MARKER) as temporary,
    ):
        (temporary / MARKER).write_text("half")
        raise OSError("no space left on the disk")
    assert (tmp_path / "b" / MARKER).read_text() == "old"
    assert os.listdir(tmp_path) == ["b"]


def test_a_kill_keeps_the_old_directory_and_the_next_writer_tidies_up(
    tmp_path: Path,
) -> None:
    write_bundle(tmp_path / "b", "old")
    program = (
        "import sys, time\n"
        "from loradeploy.files import atomic_directory\n"
        "with atomic_directory(sys.argv[1], marker='loradeploy.json') as temporary:\n"
        "    (temporary / 'loradeploy.json').write_text('half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "b")],
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert (tmp_path / "b" / MARKER).read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2

    write_bundle(tmp_path / "b", "new")
    assert os.listdir(tmp_path) == ["b"]


def test_somebodys_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not empty and holds no loradeploy.json"):
        write_bundle(tmp_path / "home", "new")
    with pytest.raises(UsageError, match="is a file"):
        write_bundle(tmp_path / "home" / "thesis.txt", "new")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def test_a_file_is_replaced_whole_or_kept(tmp_path: Path) -> None:
    write_json(tmp_path / "f.json", {"a": 1})
    with (
        pytest.raises(ZeroDivisionError),
        atomic_file(tmp_path / "f.json") as temporary,
    ):
        temporary.write_text("half")
        _ = 1 / 0
    assert read_json(tmp_path / "f.json", error=BundleError) == {"a": 1}
    assert os.listdir(tmp_path) == ["f.json"]


@pytest.mark.parametrize("escape", ["/etc/passwd", "../secret", "a/../../secret", "link/secret"])
def test_a_path_that_leads_out_is_refused(escape: str, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(BundleError, match="leads out"):
        inside(tmp_path / "root", escape)
    assert inside(tmp_path / "root", "a/b").is_relative_to(tmp_path)


def test_json_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "large.json").write_text(" " * 2000 + "{}")
    with pytest.raises(BundleError, match="not readable as JSON"):
        read_json(tmp_path / "deep.json", error=BundleError)
    with pytest.raises(BundleError, match="2,002 bytes"):
        read_json(tmp_path / "large.json", error=BundleError, limit=1000)


def test_two_writers_of_one_place_both_leave_a_whole_directory(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from loradeploy.files import atomic_directory\n"
        "for n in range(40):\n"
        "    with atomic_directory(sys.argv[1], marker='loradeploy.json') as temporary:\n"
        "        (temporary / 'loradeploy.json').write_text('whole')\n"
    )
    write_bundle(tmp_path / "b", "whole")
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "b")]) for _ in range(2)
    ]
    while any(writer.poll() is None for writer in writers):
        assert (tmp_path / "b" / MARKER).read_text() == "whole"
        time.sleep(0.001)
    assert [writer.returncode for writer in writers] == [0, 0]
