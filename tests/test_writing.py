"""Files and directories are written completely or not at all, never over other files of a user."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from loradeploy import writing
from loradeploy.errors import BundleError, OutputError, UsageError
from loradeploy.files import read_json, write_json
from loradeploy.writing import (
    atomic_directory,
    atomic_file,
    check_keeps_inputs,
    check_replaceable,
    check_replaceable_file,
    just_the_marker,
)

MARKER = "loradeploy.json"


def write_bundle(place: Path, text: str) -> None:
    with atomic_directory(place, marker=MARKER) as temporary:
        (temporary / MARKER).write_text(text)


def test_a_directory_replaces_the_old_one(tmp_path: Path) -> None:
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


def test_directories_with_other_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not empty and has no loradeploy.json"):
        write_bundle(tmp_path / "home", "new")
    with pytest.raises(UsageError, match="is a file"):
        write_bundle(tmp_path / "home" / "thesis.txt", "new")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def own_text(file: Path) -> bool:
    return file.read_text().startswith("ours")


@pytest.mark.parametrize("content", [None, "", "ours: an earlier one"])
def test_a_file_of_ours_is_replaced(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "f").write_text(content)
    check_replaceable_file(tmp_path / "f", kind="one of ours", own=own_text)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
@pytest.mark.parametrize(
    ("put", "message"),
    [
        (lambda f: f.write_text("thesis"), "exists and is not one of ours: move it"),
        (Path.mkdir, "is a directory"),
        (lambda f: f.symlink_to(f.with_name("nowhere")), "is a link"),
        (lambda f: f.symlink_to(f), "is a link"),
        (lambda f: f.symlink_to("/dev/null"), "is a link"),
        (lambda f: os.mkfifo(f), "is not a regular file"),
    ],
)
def test_a_file_that_is_not_ours_is_never_replaced(
    put: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    put(tmp_path / "f")
    with pytest.raises(UsageError, match=message):
        check_replaceable_file(tmp_path / "f", kind="one of ours", own=own_text)


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "a\nb", " x", "-x"])
def test_a_name_can_be_as_long_as_the_file_system_allows(name: str, tmp_path: Path) -> None:
    (tmp_path / name[:-1]).write_text("of another target, with the same beginning")
    for text in ("old", "new"):
        write_bundle(tmp_path / name, text)
        assert (tmp_path / name / MARKER).read_text() == text
    assert sorted(os.listdir(tmp_path)) == sorted([name[:-1], name])


def test_a_file_in_a_directory_that_takes_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(writing, "_create_file", refuse)
    with pytest.raises(OutputError, match="f cannot be written: Permission denied$"):
        write_json(tmp_path / "f", {})


def test_a_file_is_replaced_completely_or_kept(tmp_path: Path) -> None:
    write_json(tmp_path / "f.json", {"a": 1})
    with (
        pytest.raises(ZeroDivisionError),
        atomic_file(tmp_path / "f.json") as temporary,
    ):
        temporary.write_text("half")
        _ = 1 / 0
    assert read_json(tmp_path / "f.json", error=BundleError) == {"a": 1}
    assert os.listdir(tmp_path) == ["f.json"]


def test_two_concurrent_writers_of_one_directory_leave_a_complete_one(tmp_path: Path) -> None:
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


def own(directory: Path) -> Collection[str]:
    return {"weights", "adapters/a/config"}


@pytest.mark.parametrize(
    "precious", ["notes.txt", "adapters/mine/w", "adapters/a/notes", "checkpoint-10/optimizer.pt"]
)
def test_a_file_that_no_writer_of_the_kind_wrote_keeps_its_directory(
    precious: str, tmp_path: Path
) -> None:
    target = tmp_path / "b"
    for name in (MARKER, "weights", "adapters/a/config", precious):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("old")
    with (
        pytest.raises(UsageError, match=f"also has {precious.split('/')[0]}.*would be lost"),
        atomic_directory(target, marker=MARKER, own_files=own),
    ):
        pass
    assert (target / precious).read_text() == "old"
    (target / precious).unlink()
    if not any((target / precious).parent.iterdir()):
        (target / precious).parent.rmdir()
    with atomic_directory(target, marker=MARKER, own_files=own) as temporary:
        (temporary / MARKER).write_text("new")
    assert os.listdir(target) == [MARKER]


def test_a_file_that_appears_while_the_directory_is_written_is_kept_too(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "old")
    with (
        pytest.raises(UsageError, match=r"also has notes\.txt"),
        atomic_directory(tmp_path / "b", marker=MARKER) as temporary,
    ):
        (temporary / MARKER).write_text("new")
        (tmp_path / "b" / "notes.txt").write_text("precious")
    assert (tmp_path / "b" / MARKER).read_text() == "old"
    assert os.listdir(tmp_path) == ["b"]


def test_a_link_is_refused_and_its_target_is_kept(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "old")
    (tmp_path / "current").symlink_to(tmp_path / "b")
    with pytest.raises(UsageError, match="is a link"):
        write_bundle(tmp_path / "current", "new")
    assert (tmp_path / "b" / MARKER).read_text() == "old"


def test_a_home_directory_and_a_root_are_refused_regardless_of_their_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(tmp_path / "home", "old")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for place in (tmp_path / "home", Path("/")):
        with pytest.raises(UsageError, match="a home directory or a mount point"):
            check_replaceable(place, marker=MARKER, own_files=just_the_marker)


@pytest.mark.parametrize("given", ["b", "b/", "b/adapters/a", "link", "b/../b"])
def test_an_output_that_is_or_contains_an_input_is_refused(given: str, tmp_path: Path) -> None:
    (tmp_path / "b/adapters/a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "b")
    with pytest.raises(UsageError, match="would be replaced by the output"):
        check_keeps_inputs(tmp_path / "b", [tmp_path / given])
    check_keeps_inputs(tmp_path / "b/onnx", [tmp_path / "b", "an/id-of-the-hub"])


def test_an_empty_output_is_not_the_current_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the output is an empty path"):
        check_keeps_inputs("", [])


def test_the_temporary_file_of_a_killed_writer_is_removed_by_the_next_writer(
    tmp_path: Path,
) -> None:
    program = (
        "import os, signal, sys\n"
        "from loradeploy.writing import atomic_file\n"
        "with atomic_file(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "f")], check=False)
    assert [name.endswith(".partial") for name in os.listdir(tmp_path)] == [True]
    with atomic_file(tmp_path / "f") as temporary:
        temporary.write_text("whole")
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_signal_before_the_first_byte_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    created = []

    def ended(path: Path) -> int:
        created.append(path.exists())
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_lock", ended)
    opened = {
        "file": atomic_file(tmp_path / "b"),
        "directory": atomic_directory(tmp_path / "b", marker=MARKER),
    }
    with pytest.raises(KeyboardInterrupt), opened[what]:
        pass
    assert created == [True]
    assert not os.listdir(tmp_path)


def test_temporary_files_of_other_targets_and_of_running_writers_are_kept(tmp_path: Path) -> None:
    (tmp_path / ".b.c.0123456789abcdef.partial").write_text("of the target b.c")
    with atomic_file(tmp_path / "b") as first:
        first.write_text("first")
        with atomic_file(tmp_path / "b") as second:
            second.write_text("second")
        assert first.read_text() == "first"
    assert (tmp_path / "b").read_text() == "first", "the last one that ended"
    assert sorted(os.listdir(tmp_path)) == [".b.c.0123456789abcdef.partial", "b"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the umask is read from /proc")
def test_a_new_file_has_the_rights_that_the_umask_leaves_and_the_umask_is_not_touched(
    tmp_path: Path,
) -> None:
    before = os.umask(0o027)
    seen: set[int] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.add(int(Path("/proc/self/status").read_text().split("Umask:")[1].split()[0], 8))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        for number in range(50):
            write_json(tmp_path / f"{number}.json", {})
    finally:
        stop.set()
        watching.join()
        os.umask(before)
    assert seen == {0o027}
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o640}
