"""onnxruntime-genai as a backend, in a separate Python interpreter.

Its onnxruntime and the one that loradeploy uses overwrite each other's files in one environment, so
a worker program (genai_worker.py) is started with the interpreter that has onnxruntime-genai. It
receives tokens as lines of JSON and returns logits in a file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.tasks import CAUSAL_LM
from loradeploy.bundle.names import GENAI_CONFIG_NAME
from loradeploy.errors import UsageError
from loradeploy.parity.backends.ort import native_file
from loradeploy.parity.context import CheckContext

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PACKAGE: Final = "onnxruntime_genai"
_WORKER: Final = Path(__file__).with_name("genai_worker.py")
# Timeouts in seconds: to open a bundle of gigabytes, and to run a prompt.
_OPEN_TIMEOUT: Final = 300.0
_RUN_TIMEOUT: Final = 120.0


class GenaiError(Exception):
    """The worker failed, exited or did not answer; the message is one line."""


class GenaiModel:
    """onnxruntime-genai with one adapter or none, as a backend that takes one row at a time."""

    def __init__(self, worker: Worker, adapter: str | None, room: int) -> None:
        self._worker = worker
        self._adapter = adapter
        self._room = room

    def forward(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        cache: Any,
        adapters: Sequence[str | None],
    ) -> tuple[NDArray[Any], Any]:
        """See `phases.models.Model`; the worker has the cache of the sequence begun last."""
        values = self._worker.ask(
            tokens=ids[0].tolist(), first=cache is None, adapter=self._adapter, room=self._room
        )
        return values[np.newaxis], self._worker


def find_interpreter(python: str | os.PathLike[str] | None) -> Path | None:
    """Return the absolute path of the interpreter `python`; None if `python` is None.

    Raises:
        UsageError: there is no such program.
    """
    if python is None:
        return None
    found = shutil.which(python)
    if found is None:
        raise UsageError(
            f"{os.fspath(python)} is not a program: give the Python of an environment"
            " with onnxruntime-genai"
        )
    return Path(found).absolute()  # not resolved: a link's target is outside of its environment


def lacks(context: CheckContext) -> str | None:
    """Return why onnxruntime-genai cannot run the bundle; None if it may be able to."""
    if context.manifest.task != CAUSAL_LM:
        return "it only runs decoders"
    if not (context.bundle / GENAI_CONFIG_NAME).is_file():
        return f"the bundle has no {GENAI_CONFIG_NAME}"
    if context.genai_python is None and importlib.util.find_spec(_PACKAGE) is None:
        return "onnxruntime-genai is not installed: give the Python that has it"
    return None


def genai(context: CheckContext) -> Iterator[tuple[str | None, GenaiModel]]:
    """Yield the base and each adapter, as an .onnx_adapter file, in one worker.

    Raises:
        GenaiError: the worker does not start.
    """
    from loradeploy.bundle.adapter_inputs.base import BundleBase

    base = BundleBase(context.bundle, context.manifest)
    cases = context.cases
    room = max(map(len, cases.prompts)) + cases.generated
    names = [tested.name for tested in context.adapters]
    files = {}
    if not context.merged:
        files = {s.name: native_file(context, s, base) for s in context.adapters}
    with _started(context, files) as worker:
        for name in names if context.merged else (None, *names):
            yield name, GenaiModel(worker, None if context.merged else name, room)


class Worker:
    """The running worker program. `stderr`: the file that its error messages go to."""

    def __init__(self, process: subprocess.Popen[str], logits: Path, stderr: Path) -> None:
        self._process = process
        self._logits = logits
        self._stderr = stderr

    def ask(self, **request: object) -> NDArray[Any]:
        """Return the logits of the tokens in `request`, [tokens, vocabulary]; see genai_worker.py.

        Raises:
            GenaiError: onnxruntime-genai failed, or the worker exited or did not answer in time.
        """
        assert self._process.stdin is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except OSError:
            raise GenaiError(self._exit_message()) from None
        self.answer(_RUN_TIMEOUT)
        values: NDArray[Any] = np.load(self._logits, allow_pickle=False)
        return values

    def answer(self, timeout: float) -> None:
        """Wait for the worker's next line.

        Raises:
            GenaiError: as `ask`.
        """
        assert self._process.stdout is not None
        timer = Timer(timeout, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if not line:
            raise GenaiError(f"no answer in {timeout:.0f} s" if late else self._exit_message())
        if "error" in (reply := json.loads(line)):
            raise GenaiError(reply["error"])

    def _exit_message(self) -> str:
        self._process.wait()
        lines = self._stderr.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        return f"the worker ended with status {self._process.returncode}: {last}"


@contextmanager
def _started(context: CheckContext, adapters: dict[str, Path]) -> Iterator[Worker]:
    logits, stderr = context.scratch / "genai.npy", context.scratch / "genai.stderr"
    python = context.genai_python or Path(sys.executable)
    named = [f"{name}={file}" for name, file in adapters.items()]
    # Without this, the worker could import loradeploy's modules from its own directory.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with stderr.open("w", encoding="utf-8") as messages:
        process = subprocess.Popen(
            [python, _WORKER, context.bundle, logits, *named],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=environment,
            text=True,
            encoding="utf-8",
        )
    try:
        worker = Worker(process, logits, stderr)
        worker.answer(_OPEN_TIMEOUT)
        yield worker
    finally:
        process.kill()
        process.communicate()
