"""`loradeploy parity`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from loradeploy.cli.console import (
    GivenPath,
    given_options,
    json_option,
    print_json,
    progress,
    trust_option,
)
from loradeploy.errors import UsageError
from loradeploy.parity.inputs.prompts import CASES, EXAMPLES, GENERATED
from loradeploy.parity.names import ALL_PHASES, BACKEND_NAMES, LEVELS
from loradeploy.runtime.devices.table import KNOWN

if TYPE_CHECKING:
    from loradeploy.parity.report.results import ParityReport

# Options of both kinds of comparison, and of --against only. All others need a bundle and PyTorch.
_BOTH: Final = {"report", "seed", "baseline", "providers"}
_COMPARED: Final = {"inputs", "cases", "tolerances"}
_WIDTH: Final = 160  # columns of the table without a terminal
DASHED_PHASES: Final = tuple(phase.replace(" ", "-") for phase in ALL_PHASES)


@click.command(
    name="parity",
    short_help="Prove that a bundle computes what PyTorch computes.",
    epilog="Example: loradeploy parity bundle --model ./smollm2 --report parity.json",
)
@click.argument("bundle", type=GivenPath(), metavar="BUNDLE|CANDIDATE")
@click.option(
    "--against",
    "reference",
    metavar="REFERENCE",
    help="Compare CANDIDATE with this model instead of PyTorch's. Each of the two is an ONNX file,"
    " a bundle, or a Python function given as module:function.",
)
@click.option(
    "--inputs",
    metavar="FILE.npz|DIR",
    help="With --against: read the inputs from these files, one case a file, arrays by name."
    " [default: inputs are randomly generated]",
)
@click.option(
    "--cases",
    type=int,
    default=CASES,
    show_default=True,
    help="With --against: how many cases of random inputs to generate.",
)
@click.option(
    "--tolerances",
    metavar="PRECISION|METRIC=LIMIT,…",
    help="With --against: judge by the limits of this precision, or by limits such as max_abs=0.1."
    " [default: the limits of CANDIDATE's precision]",
)
@click.option(
    "--model",
    type=GivenPath(),
    metavar="ID|PATH",
    help="The PyTorch model that the bundle was made from: a Hugging Face id or a directory."
    " [default: the one that the bundle names, if it is in this directory or beside the bundle]",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]DIR",
    help="Check this PEFT adapter too; for a merged bundle, the adapter that was merged. Repeat for"
    " more.",
)
@click.option(
    "--report",
    multiple=True,
    metavar="FILE",
    help="Write a report to this file: .json, .xml (JUnit), .md or .html. Repeat for more.",
)
@click.option(
    "--sign",
    metavar="KEY.pem",
    help="Sign the certificate with this ed25519 key if the check passes.",
)
@click.option(
    "--backends",
    metavar="NAME,…",
    help=f"Run only these backends, separated by commas: {', '.join(BACKEND_NAMES)}.",
)
@click.option(
    "--phases",
    metavar="NAME,…",
    help=f"Run only these phases, separated by commas: {', '.join(DASHED_PHASES)}.",
)
@click.option(
    "--prompts",
    metavar="FILE",
    help="Read the prompts from this file: one per line, or JSONL with prompt, messages or text"
    " (and text_pair). [default: built-in prompts]",
)
@click.option(
    "--tokens",
    type=int,
    help=f"How many tokens a decoder generates after each prompt. [default: {GENERATED}]",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of random tokens and randomly generated inputs.",
)
@click.option(
    "--other",
    "others",
    multiple=True,
    metavar="[NAME=]MODEL[@ADAPTER]",
    help="Also compare this with PyTorch: an ONNX file or module:function that computes the same as"
    " the base, alone or with ADAPTER. Repeat for more.",
)
@click.option(
    "--baseline",
    metavar="FILE",
    help="Fail if any metric got worse since this earlier report (.json).",
)
@click.option(
    "--fuzz",
    type=int,
    default=0,
    show_default=True,
    metavar="ROWS",
    help="Add this many rows of random tokens to the prompts.",
)
@click.option(
    "--provider",
    "providers",
    multiple=True,
    metavar="NAME[:NUMBER]",
    help="Run the graphs on this execution provider of ONNX Runtime:"
    f" {', '.join(row.name for row in KNOWN)}. Repeat to run on each. [default: cpu]",
)
@click.option(
    "--optimization",
    multiple=True,
    metavar="LEVEL",
    help="Run the graphs at this level of ONNX Runtime's graph optimization:"
    f" {', '.join(LEVELS)}. Repeat to run at each. [default: all]",
)
@click.option(
    "--capture-graphs",
    is_flag=True,
    help="Also check captured runs (CUDA graphs), on the providers that support them. The"
    " certificate then covers sessions with and without capture.",
)
@click.option(
    "--operator",
    type=GivenPath(),
    metavar="FILE",
    help="Also check the bundle with this library, which `loradeploy operator` built. The"
    " certificate then covers sessions with and without it.",
)
@click.option(
    "--genai-python",
    metavar="FILE",
    help="Check onnxruntime-genai too, with this Python interpreter, which has it installed.",
)
@click.option(
    "--controls",
    is_flag=True,
    help="Also run negative controls (deliberate mistakes), and fail unless each is caught.",
)
@click.option(
    "--shrink/--no-shrink",
    default=True,
    show_default=True,
    help="If a backend fails, find the smallest input that still fails.",
)
@click.option(
    "--evaluate",
    multiple=True,
    metavar="[NAME=]DATA",
    help="Compare the task metrics (accuracy, F1, RMSE, perplexity) on this held-out data, in any"
    " format of training data; with NAME=, only for that adapter. Repeat for more.",
)
@click.option(
    "--examples",
    type=int,
    default=EXAMPLES,
    show_default=True,
    help="With --evaluate: how many examples to sample from the data.",
)
@click.option(
    "--localize/--no-localize",
    default=None,
    help="Find the first module whose values diverge: always, or never. [default: if a backend"
    " failed]",
)
@trust_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    /,
    bundle: str,
    reference: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Compare all backends that can run BUNDLE with PyTorch. Exit with 0 if all agree, else with 1.

    The verdict is also written into the bundle, as parity.json.

    With --against, compare all outputs of CANDIDATE and REFERENCE instead. A function gets numpy
    arrays by name and returns its outputs by name, or in the order of the other side.
    """
    _refuse_mixture(context, compared=reference is not None)
    given = given_options(options)
    for name, parse in {"backends": _names, "phases": _names, "tolerances": _limits}.items():
        if name in given:
            given[name] = parse(given[name])
    with progress("loradeploy.parity"):
        if reference is not None:
            from loradeploy.parity.compare.api import compare

            common = _BOTH | _COMPARED
            found = compare(reference, bundle, **{n: v for n, v in given.items() if n in common})
        else:
            from loradeploy.parity.api import parity

            found = parity(bundle, **{n: v for n, v in given.items() if n not in _COMPARED})
    return _print_report(found, as_json=as_json)


def _refuse_mixture(context: click.Context, *, compared: bool) -> None:
    """Raise UsageError for an option that does not fit the kind of comparison."""
    flags = {
        parameter.name: parameter.opts[0]
        for parameter in context.command.params
        if parameter.name is not None
        and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    }
    for name, flag in flags.items():
        if name in _COMPARED and not compared:
            raise UsageError(f"{flag} needs --against")
        if compared and name not in _BOTH | _COMPARED | {"bundle", "reference", "as_json"}:
            raise UsageError(f"{flag} cannot be combined with --against")
    if "examples" in flags and "evaluate" not in flags:
        raise UsageError("--examples needs --evaluate")
    if "cases" in flags and "inputs" in flags:
        raise UsageError("--cases is for random inputs and cannot be combined with --inputs")


def _limits(text: str) -> str | dict[str, float]:
    """Return a precision, or limits by metric."""
    if "=" not in text:
        return text
    pairs = (pair.partition("=") for pair in text.split(","))
    try:
        return {name.strip(): float(limit) for name, _, limit in pairs}
    except ValueError:
        raise UsageError(f"--tolerances {text}: give METRIC=LIMIT, as in max_abs=0.1") from None


def _print_report(found: ParityReport, *, as_json: bool) -> int:
    if as_json:
        print_json(found.to_json())
    else:
        from rich.console import Console

        from loradeploy.parity.report.table import print_report

        # Without a terminal, such as in a log, the table is not truncated.
        width = None if sys.stdout.isatty() else _WIDTH
        print_report(found, Console(file=sys.stdout, highlight=False, width=width))
    return 0 if found.passed else 1


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name]
