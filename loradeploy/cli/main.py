"""The command line: one verb, one module, imported when the verb is called."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

import click

from loradeploy import __version__
from loradeploy.errors import LoraDeployError, MissingDependencyError

# One line a verb: `--help` shows them without importing any of the modules.
VERBS: Final = {
    "train": "Train an adapter.",
    "export": "Export a model to a bundle, with side inputs or an adapter merged.",
    "run": "Run prompts or texts through a bundle.",
    "parity": "Prove that a bundle computes what PyTorch computes.",
    "convert": "Convert an adapter to .onnx_adapter, or back.",
    "inspect": "Tell what an adapter, a bundle or an ONNX file is.",
    "bench": "Time a bundle: base, adapters, swap, mixed batch.",
    "doctor": "Check versions, execution providers and known traps.",
}

DONE, FAILED, REFUSED, DEFECT, INTERRUPTED = 0, 1, 2, 70, 130

# Modules outside the runtime, and the extra that brings each.
_EXTRAS: Final = {
    "torch": "all",
    "transformers": "all",
    "accelerate": "train",
    "matplotlib": "train",
    "yaml": "train",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
}


class _Verbs(click.Group):
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
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def commands(debug: bool) -> None:
    """Train LoRA adapters, deploy them on ONNX Runtime, prove that nothing changed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a check failed, 2 wrong usage or bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    # Accepted before and after the verb.
    given = [argument for argument in given if argument != "--debug"]
    sys.exit(_run(given, debug=debug))


def _run(given: list[str], *, debug: bool) -> int:
    try:
        result: Any = commands.main(given, prog_name="loradeploy", standalone_mode=False)
        return result if isinstance(result, int) else DONE
    except click.ClickException as problem:
        problem.show()
        return REFUSED
    except (click.Abort, KeyboardInterrupt):
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Nobody reads any more; keep Python from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as problem:
        if debug:
            raise
        if isinstance(problem, ModuleNotFoundError) and problem.name in _EXTRAS:
            extra = _EXTRAS[problem.name]
            problem = MissingDependencyError(
                f"{problem.name} is not installed: pip install 'loradeploy[{extra}]'"
            )
        if isinstance(problem, LoraDeployError):
            return _say(f"Error: {problem}", REFUSED)
        kind = type(problem).__name__
        first = (str(problem).strip() or kind).splitlines()[0]
        return _say(
            f"Error: a defect of loradeploy, {kind}: {first} (--debug shows the traceback)", DEFECT
        )


def _say(line: str, status: int) -> int:
    click.echo(" ".join(line.split("\n")), err=True)
    return status
