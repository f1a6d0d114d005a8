"""The command line: one module per command, imported when the command is called.

Exit status:

      0  done
      1  the check failed (`parity`, `doctor`)
      2  wrong usage, bad input, or a failure of the machine such as a full disk, in one line
     70  a defect of loradeploy; --debug shows the traceback
    130  interrupted (143 where the signal was SIGTERM, 129 where it was SIGHUP)
    141  the reader of the output closed the pipe
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import importlib
import io
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, Final

import click

from loradeploy import __version__
from loradeploy.cli.flags import with_flags
from loradeploy.errors import (
    MESSAGE,
    LoraDeployError,
    MissingDependencyError,
    TrainingInterruptedError,
    first_line,
    shortened,
)
from loradeploy.lora.quiet import quiet_process
from loradeploy.printable import printable
from loradeploy.signals import ending_signals, handling_endings

# One line per command: `--help` shows them without importing the modules.
VERBS: Final = {
    "train": "Train an adapter.",
    "export": "Export a model to a bundle, with side inputs or an adapter merged.",
    "run": "Run prompts or texts through a bundle.",
    "parity": "Prove that a bundle computes what PyTorch computes.",
    "convert": "Convert an adapter: .onnx_adapter and back, other libraries, a lower rank.",
    "inspect": "Describe an adapter, a bundle or an ONNX file.",
    "serve": "Serve a bundle over HTTP with an OpenAI-compatible API.",
    "bench": "Time a bundle: base, adapters, swap, mixed batch.",
    "operator": "Build the library of kernels for bundles that were exported with --operator.",
    "doctor": "Check versions, execution providers and known problems.",
}

DONE, REFUSED, DEFECT, INTERRUPTED, UNREAD = 0, 2, 70, 130, 141

# Modules outside the runtime, and the extra that installs each.
_EXTRAS: Final = {
    "torch": "all",
    "transformers": "all",
    "accelerate": "train",
    "matplotlib": "train",
    "yaml": "train",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "fastapi": "serve",
    "prometheus_client": "serve",
    "pydantic": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
}


_UNMAPPED: Final = re.compile("failed to map segment|cannot allocate memory", re.IGNORECASE)


class _UnreadError(Exception):
    """The reader of the output closed the pipe. click would exit with 1, as a failed check."""


class _Verbs(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _UnreadError from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"loradeploy.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: loradeploy run bundle 'What is the capital of France?' --chat",
)
@click.version_option(__version__, prog_name="loradeploy")
@click.option(
    "--debug",
    is_flag=True,
    help="Show tracebacks of errors and log lines of libraries. Also accepted after the command.",
)
def commands(debug: bool) -> None:
    """Train LoRA adapters, deploy them on ONNX Runtime, and verify the results."""


class _Terminated(BaseException):
    """SIGTERM or SIGHUP was received. No library handles it as an error, and writers clean up."""


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Inside the context, SIGINT, SIGTERM and SIGHUP raise exceptions.

    Yields the exit statuses of the signals received so far: a library that is being imported may
    raise another exception instead, such as an ImportError.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(128 + number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        for other in ending_signals():
            if other != signal.SIGINT:
                signal.signal(other, signal.SIG_IGN)  # during the clean-up
        raise _Terminated

    with handling_endings(interrupt):
        yield received


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with one of the statuses listed above."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _open_streams()
    _encode_streams()
    # Accepted before and after the command; arguments after -- are text.
    end = given.index("--") if "--" in given else len(given)
    options = [argument for argument in given[:end] if argument != "--debug"]
    # Frozen objects are not searched for cycles at exit, which takes a second after an export.
    atexit.register(gc.freeze)
    with _interruptible() as received:
        try:
            status = _run([*options, *given[end:]], received, debug=len(options) < end)
        except KeyboardInterrupt:
            status = _say("interrupted", INTERRUPTED)
        except _Terminated:
            status = _say("interrupted", received[-1])
    sys.exit(status)


def _open_streams() -> None:
    """Replace standard streams that the caller closed by the null device.

    Python has None for them. Without the descriptors, a file that is opened later would get the
    number of a standard stream, and what libraries print would be written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        null = os.open(os.devnull, os.O_RDWR)
        try:
            os.fstat(number)
        except OSError:
            os.dup2(null, number)
        setattr(sys, name, os.fdopen(null, "r" if number == 0 else "w", encoding="utf-8"))


def _encode_streams() -> None:
    """Make files and pipes UTF-8 whatever the locale; a terminal shows what it cannot as escapes.

    Windows and old locales have other encodings, in which texts are misread or cannot be printed.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper) or stream.encoding.lower() == "utf-8":
            continue
        if not stream.isatty():
            stream.reconfigure(encoding="utf-8", errors=stream.errors)  # else they become strict
        elif stream is not sys.stdin:
            stream.reconfigure(errors="backslashreplace")


def _run(given: list[str], received: list[int], *, debug: bool) -> int:
    if debug:
        logging.getLogger("loradeploy").setLevel(logging.DEBUG)
    else:
        quiet_process()
    try:
        result: Any = commands.main(given, prog_name="loradeploy", standalone_mode=False)
        return result if isinstance(result, int) else DONE
    except click.exceptions.NoArgsIsHelpError as problem:
        problem.show()
        return REFUSED
    except click.ClickException as problem:
        return _say(f"Error: {_with_help(problem, given)}", REFUSED)
    except click.Abort as problem:
        if received:
            return _say("interrupted", received[0])
        # click converts every EOFError to Abort, as if a prompt was aborted; there are no prompts.
        if isinstance(problem.__cause__, EOFError):
            return _report(problem.__cause__, given, debug=debug)
        return _say("interrupted", INTERRUPTED)
    except _UnreadError:
        # Prevents an error when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except Exception as problem:
        if received and not isinstance(problem, TrainingInterruptedError):
            return _say("interrupted", received[0])
        return _report(problem, given, debug=debug)


def _with_help(problem: click.ClickException, given: Sequence[str]) -> str:
    """The message of wrong usage, and where to read about the options."""
    message = problem.format_message().rstrip(".")
    if not isinstance(problem, click.UsageError):
        return message
    verb = _verb(given)  # click has no context for an option without its value
    command = "loradeploy" if verb is None else f"loradeploy {verb}"
    if problem.ctx is not None:
        command = problem.ctx.command_path
    return f"{message}{' See' if message.endswith(('?', '?)')) else ': see'} {command} --help"


def _verb(given: Sequence[str]) -> str | None:
    """The command in the arguments `given`."""
    return next((word for word in given if word in VERBS), None)


def _report(problem: Exception, given: list[str], *, debug: bool) -> int:
    if debug:
        text = "".join(traceback.format_exception(problem))
        click.echo(printable(text, lines=True), err=True, nl=False)
    return _explain(problem, _verb(given))


def _explain(problem: Exception, verb: str | None) -> int:
    if isinstance(problem, ModuleNotFoundError):
        name = (problem.name or "").partition(".")[0]
        if name in _EXTRAS:
            problem = MissingDependencyError(
                f"{name} is not installed: pip install 'loradeploy[{_EXTRAS[name]}]'"
            )
    if isinstance(problem, LoraDeployError):
        line = with_flags(str(problem), verb, VERBS)
        if isinstance(problem, TrainingInterruptedError):
            return _say(f"interrupted: {line}", problem.status)
        return _say(f"Error: {line}", REFUSED)
    if isinstance(problem, OSError) and problem.errno is not None:
        # Such as a full disk or missing permissions, which need no traceback.
        subject = f"{problem.filename}: " if problem.filename is not None else ""
        if not subject and _directory_is_removed():
            return _say("Error: the current directory was removed: change to another", REFUSED)
        if not subject and problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            subject = "the standard output cannot be written: "  # writers of files name them
        return _say(f"Error: {subject}{problem.strerror}", REFUSED)
    if isinstance(problem, MemoryError):
        return _say("Error: out of memory: use a smaller batch, precision or model", REFUSED)
    if isinstance(problem, ImportError) and _UNMAPPED.search(str(problem)):
        # glibc has the same message for both causes.
        causes = "memory is used up, or the file system is noexec"
        return _say(f"Error: {first_line(problem)}: {causes}", REFUSED)
    kind = type(problem).__name__
    message = f"{kind}: {first_line(problem)}"
    return _say(f"Error: a defect of loradeploy, {message} (--debug shows the traceback)", DEFECT)


def _directory_is_removed() -> bool:
    """Whether the current directory no longer exists, which no relative path can be found in."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _say(line: str, status: int) -> int:
    with contextlib.suppress(OSError):  # the status is enough
        # The message of wrong usage has the value as it was given, of any length.
        click.echo(printable(shortened(" ".join(line.split()), MESSAGE)), err=True)
    return status
