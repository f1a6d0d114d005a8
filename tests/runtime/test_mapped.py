"""A session on mapped weights has the numbers of the bundle, or refuses to run."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from loradeploy.errors import BundleError
from loradeploy.runtime.reading import mapped
from loradeploy.runtime.reading.mapped import MappedFile, MappedSession, mapped_file
from loradeploy.runtime.reading.weights import MAPPED
from loradeploy.runtime.session import AdapterSession
from tests.runtime.feeds import logits, random_ids

IDS = random_ids(2, 6)
DATA = "model.onnx.data"
_CHANGED = r"model\.onnx\.data has changed \({}.*\), and this session maps it: open the session ag"
_OPENED = r"model\.onnx\.data was opened for writing, and this session maps it: open the session ag"


@pytest.fixture
def bundle(certified: Path) -> Path:
    """A bundle with the adapter `one` that a test may modify, older than any clock."""
    os.utime(certified / DATA, (1e9, 1e9))
    return certified


@pytest.fixture
def leased(bundle: Path) -> None:
    """Skip the test where the system grants no lease."""
    if mapped_file(bundle / DATA, unleased=False) is None:
        pytest.skip("there are no leases on this system, or on this file system")


@pytest.fixture
def unleased(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without leases, on which every file is old."""
    monkeypatch.setattr(mapped, "_lease", lambda _: False)
    monkeypatch.setattr(mapped, "_SETTLED", 0)


def always_mapped(bundle: Path) -> AdapterSession:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(MAPPED, "1")
    return AdapterSession(bundle, session_options=options)


def is_mapped(session: AdapterSession) -> bool:
    return isinstance(session._session, MappedSession)


def overwrite(file: Path) -> None:
    """Change every byte in place."""
    content = np.frombuffer(file.read_bytes(), np.uint8) ^ 1
    with open(file, "r+b") as opened:
        opened.write(content.tobytes())


def overwrite_and_restore_times(file: Path) -> None:
    before = file.stat()
    overwrite(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def overwrite_through_a_mapping(file: Path) -> None:
    with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 0) as view:
        view[:] = (np.frombuffer(view[:], np.uint8) ^ 1).tobytes()


def shorten(file: Path) -> None:
    os.truncate(file, 0)


def lengthen(file: Path) -> None:
    with open(file, "ab") as opened:
        opened.write(b"0")


WRITERS = {
    overwrite: "modification time, change time",
    overwrite_and_restore_times: "change time",
    overwrite_through_a_mapping: "modification time, change time",
    shorten: "size, ",
    lengthen: "size, ",
}


def test_mapped_weights_give_the_numbers_of_weights_in_memory(bundle: Path, leased: None) -> None:
    session, plain = AdapterSession(bundle, map_weights=True), AdapterSession(bundle)
    assert (is_mapped(session), is_mapped(plain)) == (True, False)
    for adapter in (None, "one"):
        assert np.array_equal(logits(session, IDS, adapter), logits(plain, IDS, adapter))
    assert not np.array_equal(logits(session, IDS, "one"), logits(session, IDS, None))


def test_without_the_check_a_writer_changes_the_numbers(
    bundle: Path, unleased: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = always_mapped(bundle)
    expected = logits(session, IDS, None)
    overwrite(bundle / DATA)
    monkeypatch.setattr(MappedFile, "check", lambda _: None)
    assert not np.array_equal(logits(session, IDS, None), expected)


@pytest.mark.parametrize(("write", "what"), WRITERS.items())
def test_a_session_without_a_lease_refuses_to_run_after_a_change(
    bundle: Path, unleased: None, write: Callable[[Path], None], what: str
) -> None:
    session = always_mapped(bundle)
    logits(session, IDS, None)
    write(bundle / DATA)
    for _ in range(2):
        with pytest.raises(BundleError, match=_CHANGED.format(what)):
            logits(session, IDS, None)


def test_results_of_a_run_during_which_the_file_changes_are_not_returned(
    bundle: Path, unleased: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = always_mapped(bundle)
    run = onnxruntime.InferenceSession.run_with_iobinding

    def run_beside_a_writer(self: Any, *arguments: Any) -> None:
        overwrite(bundle / DATA)
        run(self, *arguments)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", run_beside_a_writer)
    with pytest.raises(BundleError, match=_CHANGED.format("modification time")):
        logits(session, IDS, None)


def test_a_file_that_changed_within_the_last_tick_of_a_clock_is_waited_for(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second write within that tick would have the same time."""
    monkeypatch.setattr(mapped, "_lease", lambda _: False)
    overwrite(bundle / DATA)
    mapped_file(bundle / DATA, unleased=True)
    assert time.time_ns() - (bundle / DATA).stat().st_mtime_ns >= mapped._SETTLED
    overwrite(bundle / DATA)
    monkeypatch.setattr(time, "sleep", lambda _: overwrite(bundle / DATA))
    with pytest.raises(BundleError, match=r"model\.onnx\.data is being written to: try again"):
        mapped_file(bundle / DATA, unleased=True)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR | os.O_TRUNC], ids=["write", "truncate"])
def test_with_a_lease_a_writer_waits_and_runs_are_refused(
    bundle: Path, leased: None, flags: int
) -> None:
    session = AdapterSession(bundle, map_weights=True)
    before = (bundle / DATA).read_bytes()
    logits(session, IDS, None)
    with pytest.raises(BlockingIOError):
        os.open(bundle / DATA, flags | os.O_NONBLOCK)
    assert (bundle / DATA).read_bytes() == before
    with pytest.raises(BundleError, match=_OPENED):
        logits(session, IDS, None)
    session.close()
    os.close(os.open(bundle / DATA, flags | os.O_NONBLOCK))


def test_a_writer_that_waits_continues_when_the_session_is_closed(
    bundle: Path, leased: None
) -> None:
    session = AdapterSession(bundle, map_weights=True)
    shortens = f"import os; print('now', flush=True); os.truncate({os.fspath(bundle / DATA)!r}, 0)"
    with subprocess.Popen([sys.executable, "-c", shortens], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(0.5)
        assert (bundle / DATA).stat().st_size > 0
        session.close()
        assert writer.wait() == 0
    assert (bundle / DATA).stat().st_size == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # other tests left threads
@pytest.mark.parametrize("closed_in", ["this process", "a forked one"])
def test_a_forked_process_has_no_say_in_the_lease(
    bundle: Path, leased: None, closed_in: str
) -> None:
    file: MappedFile | None = mapped_file(bundle / DATA, unleased=False)
    assert file is not None
    ends, asks = os.pipe()
    child = os.fork()
    if child == 0:
        del file
        if closed_in == "this process":
            os.close(asks)
            os.read(ends, 1)  # until the other process has closed the pipe
        os._exit(0)
    try:
        if closed_in == "this process":
            del file
            os.close(os.open(bundle / DATA, os.O_WRONLY | os.O_NONBLOCK))
    finally:
        os.close(asks)
        os.waitpid(child, 0)
        os.close(ends)
    if closed_in == "a forked one":
        file.check()
        with pytest.raises(BlockingIOError):
            os.open(bundle / DATA, os.O_WRONLY | os.O_NONBLOCK)


def test_a_file_that_is_open_for_writing_is_read_into_memory(bundle: Path, leased: None) -> None:
    with open(bundle / DATA, "r+b") as writer:
        session = AdapterSession(bundle, map_weights=True)
        assert not is_mapped(session)
        expected = logits(session, IDS, "one")
        writer.write(b"\1" * (bundle / DATA).stat().st_size)
    assert np.array_equal(logits(session, IDS, "one"), expected)


def test_a_file_that_is_mapped_for_writing_is_read_into_memory(bundle: Path, leased: None) -> None:
    with open(bundle / DATA, "r+b") as opened:
        view = mmap.mmap(opened.fileno(), 0)
    with view:
        assert not is_mapped(AdapterSession(bundle, map_weights=True))
    assert is_mapped(AdapterSession(bundle, map_weights=True))


def test_files_of_other_file_systems_are_read_into_memory(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a network, which other machines write to."""
    monkeypatch.setattr(mapped, "_LOCAL", {})
    assert not is_mapped(AdapterSession(bundle, map_weights=True))


def test_a_session_with_a_lease_runs_after_its_bundle_was_replaced_by_renaming(
    bundle: Path, leased: None, tmp_path: Path
) -> None:
    session = AdapterSession(bundle, map_weights=True)
    expected = logits(session, IDS, None)
    new = shutil.copytree(bundle, tmp_path / "new")
    overwrite(new / DATA)
    os.replace(new / DATA, bundle / DATA)
    shutil.rmtree(bundle)
    assert np.array_equal(logits(session, IDS, None), expected)
