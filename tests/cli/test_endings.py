"""How a command ends: its exit status and its one-line message."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loradeploy.adapter import load_adapter
from loradeploy.errors import LoraDeployError
from tests.cli.calling import Run, one_line
from tests.conftest import MakeAdapter

CALL = "from loradeploy.cli.main import main; main()"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A directory that `inspect` reads as an adapter."""
    (tmp_path / "adapter_config.json").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "No such command 'fly': see loradeploy --help"),
        (["run", "--json-schema"], "Did you mean '--json'? See loradeploy run --help"),
        (["run", "--fly"], "No such option '--fly': see loradeploy run --help"),
        (["run", "b", "--adapter"], "requires an argument: see loradeploy run --help"),
        (["export"], "Missing option '--model': see loradeploy export --help"),
        (["export", "--task", "guess"], "'guess' is not one of 'causal-lm'"),
        (["bench", "b", "--rounds", "many"], "'many' is not a valid integer"),
    ],
)
def test_a_usage_error_is_one_line_that_refers_to_help(
    arguments: list[str], message: str, run: Run
) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert message in one_line(err)
    assert "--help" in err


def test_no_verb_at_all_shows_the_help(run: Run) -> None:
    status, out, err = run()
    assert (status, out) == (2, "")
    assert "Commands:" in err


def test_the_version_is_printed(run: Run) -> None:
    status, out, _ = run("--version")
    assert status == 0
    assert out.startswith("loradeploy, version ")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_the_traceback_at_any_position_in_the_command(
    place: int, tmp_path: Path, run: Run
) -> None:
    arguments = ["inspect", str(tmp_path)]
    arguments.insert(place, "--debug")
    status, out, err = run(*arguments)
    assert (status, out) == (2, ""), "the status is that without --debug"
    assert err.startswith("Traceback (most recent call last):")
    assert one_line(err.splitlines()[-1])


def test_after_two_dashes_debug_is_an_argument(run: Run) -> None:
    status, _, err = run("run", "--", "nowhere", "--debug")
    assert status == 2
    assert "nowhere" in one_line(err)


def test_an_error_of_several_lines_is_printed_as_one(
    adapter: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: object) -> None:
        raise LoraDeployError("first\n  second\n")

    monkeypatch.setattr("loradeploy.adapter.load_adapter", fail)
    assert run("inspect", adapter) == (2, "", "Error: first second\n")


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (MemoryError(), "out of memory: use a smaller batch, precision or model"),
        (
            ImportError("lib.so: failed to map segment"),
            "lib.so: failed to map segment: memory is used up, or the file system is noexec",
        ),
    ],
)
def test_a_failure_of_the_machine_is_not_reported_as_a_defect(
    problem: Exception, message: str, adapter: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: object) -> None:
        raise problem

    monkeypatch.setattr("loradeploy.adapter.load_adapter", fail)
    assert run("inspect", adapter) == (2, "", f"Error: {message}\n")


def test_an_internal_error_is_reported_as_such(
    adapter: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: object) -> None:
        raise ZeroDivisionError("a slip\nof ours")

    monkeypatch.setattr("loradeploy.adapter.load_adapter", fail)
    status, out, err = run("inspect", adapter)
    assert (status, out) == (70, "")
    line = one_line(err)
    assert "a defect of loradeploy, ZeroDivisionError: a slip" in line
    assert "--debug" in line


def test_a_truncated_file_is_not_an_interruption(
    adapter: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: object) -> None:
        raise EOFError("EOF read where object expected")

    monkeypatch.setattr("loradeploy.adapter.load_adapter", fail)
    status, _, err = run("inspect", adapter)
    assert status == 70
    assert "a defect of loradeploy, EOFError: EOF read" in one_line(err.lstrip("\n"))


def test_an_interruption_is_reported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def read(self, size: int | None = -1) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Terminal())
    status, out, err = run("run", "nowhere", "--input", "-")
    assert (status, out, err.strip()) == (130, "", "interrupted")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM to handle")
@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize("moment", ["quiet_process", "_explain"])
def test_a_signal_before_or_after_the_command_runs_is_reported_too(
    moment: str,
    number: str,
    status: int,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        f"loradeploy.cli.main.{moment}", lambda *_: signal.raise_signal(signal.Signals[number])
    )
    assert run("inspect", tmp_path) == (status, "", "interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM to handle")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
@pytest.mark.parametrize("problem", [ImportError, RuntimeError, LoraDeployError, EOFError])
def test_a_signal_that_a_library_turns_into_another_error_is_an_interruption(
    problem: type[Exception],
    number: signal.Signals,
    status: int,
    adapter: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(path: object) -> None:
        try:
            os.kill(os.getpid(), number)
            pytest.fail("the signal raised nothing")
        except BaseException:
            raise problem("initialization failed") from None

    monkeypatch.setattr("loradeploy.adapter.load_adapter", load)
    told, out, err = run("inspect", adapter)
    assert (told, out, err.strip()) == (status, "", "interrupted")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM to handle")
def test_sigterm_ends_a_command_without_leaving_partial_files(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    arguments = ["convert", str(make_adapter(tiny_llama)), "--rank", "1", "--output"]
    program = (
        "import time, loradeploy.adapter\n"
        "from loradeploy.cli.main import main\n"
        "def write(adapter, place):\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "loradeploy.adapter.save_adapter = write\n"
        f"main({[*arguments, str(tmp_path / 'b')]!r})\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        writer.terminate()
        _, err = writer.communicate()
    assert (writer.returncode, err) == (143, "interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break otherwise there")
def test_a_closed_pipe_ends_the_command_silently_with_an_error_status(tiny_llama: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", CALL, "inspect", str(tiny_llama / "model.safetensors")],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_pipes_are_utf8_in_every_locale(encoding: str, tiny_llama_bundle: Path) -> None:
    given = ["run", str(tiny_llama_bundle), "--input", "-", "--max-new-tokens", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", CALL, *given],
        input='{"prompt": "Größe 日本"}'.encode(),
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout.decode())["prompt"] == "Größe 日本"


def test_what_no_encoding_has_is_written_to_the_error_stream_in_escapes() -> None:
    code = (
        "import sys; from loradeploy.cli.main import _encode_streams; _encode_streams();"
        " sys.stderr.write(chr(0xDCFF) + 'ö')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"\\udcff" + "ö".encode())


@pytest.mark.skipif(sys.platform == "win32", reason="its processes inherit no descriptors")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["inspect", "{adapter}"], 0),
        (["inspect", "nowhere"], 2),
        (["run", "nowhere", "--input", "-"], 2),
        (["convert", "{adapter}", "--rank", "1", "--output", "{output}"], 0),
    ],
)
@pytest.mark.parametrize("closed", ["0", "1", "2", "012"])
def test_closed_streams_change_no_status_and_reach_no_file(
    closed: str,
    arguments: list[str],
    status: int,
    tiny_llama: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    places = {"adapter": make_adapter(tiny_llama), "output": tmp_path / "out"}
    given = [argument.format(**places) for argument in arguments]
    closing = " ".join(f"{number}>&-" for number in closed)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closing}', "sh", sys.executable, "-c", CALL, *given],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == status
    assert bool(done.stderr) == (status == 2 and "2" not in closed)
    if "{output}" in arguments:
        load_adapter(tmp_path / "out")


@pytest.mark.skipif(sys.platform == "win32", reason="a current directory cannot be removed there")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["doctor"], 0),
        (["inspect", "{adapter}"], 0),
        (["inspect", "nowhere"], 2),
        (["convert", "{adapter}", "--rank", "1", "--output", "out"], 2),
    ],
)
def test_a_removed_current_directory_matters_to_relative_paths_alone(
    arguments: list[str],
    status: int,
    tiny_llama: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    told, _, err = run(*(word.format(adapter=make_adapter(tiny_llama)) for word in arguments))
    monkeypatch.undo()
    assert told == status
    if status:
        message = "does not exist" if "inspect" in arguments else "the current directory was rem"
        assert message in one_line(err)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit on files there")
def test_a_full_disk_leaves_no_partial_files(
    tiny_llama: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    output = tmp_path / "a.onnx_adapter"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    place = str(make_adapter(tiny_llama))
    arguments = ["convert", place, "--bundle", str(tiny_llama_bundle), "--output", str(output)]
    # -B: compiled modules would be truncated too.
    done = subprocess.run(
        [sys.executable, "-B", "-c", limit + CALL, *arguments],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{output} cannot be written: File too large" in one_line(done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["parity", "{bundle}", "--model", "{model}", "--report", "{output}/r.json"],
        ["export", "--model", "{model}", "--output", "{output}/bundle"],
        ["train", "--model", "{model}", "--data", "{output}", "--output", "{output}/a"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    arguments: list[str],
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(*given: object, **options: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", work)
    output = tmp_path / "file"
    output.write_text('{"text": "a"}')
    places = {"bundle": tiny_llama_bundle, "model": tiny_llama, "output": output}
    status, _, err = run(*(argument.format(**places) for argument in arguments))
    assert status == 2
    assert f"cannot be written: {output} is not a writable directory" in one_line(err)


def test_a_file_in_place_of_a_directory_is_named(
    tiny_llama: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "a.onnx_adapter"
    status, _, err = run(
        "convert", make_adapter(tiny_llama), "--bundle", tiny_llama_bundle, "--output", output
    )
    assert status == 2
    assert str(tmp_path / "file") in one_line(err)
