"""`loradeploy parity`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

import click
from click.core import ParameterSource

from loradeploy.cli.console import json_option, print_json, progress, trust_option
from loradeploy.errors import UsageError
from loradeploy.parity.inputs.prompts import CASES, EXAMPLES, GENERATED

if TYPE_CHECKING:
    from loradeploy.parity.report.results import ParityReport

# Options of both forms, and of the one that compares; all others are of a bundle and PyTorch.
_BOTH: Final = {"bundle", "reports", "seed", "baseline", "providers", "as_json"}
_COMPARED: Final = {"reference", "inputs", "cases", "tolerances"}
_WHOLE: Final = 160  # columns of the table


@click.command(
    name="parity",
    short_help="Prove that a bundle computes what PyTorch computes.",
    epilog="Example: loradeploy parity bundle --model ./smollm2 --report parity.json",
)
@click.argument("bundle", type=click.Path(), metavar="BUNDLE|CANDIDATE")
@click.option(
    "--against",
    "reference",
    metavar="REFERENCE",
    help="Compare CANDIDATE with this: each an ONNX file, a bundle, or module:function.",
)
@click.option(
    "--inputs",
    metavar="FILE.npz|DIR",
    help="With --against: the inputs, arrays by name; a file is a case. [default: made up]",
)
@click.option(
    "--cases",
    type=int,
    default=CASES,
    show_default=True,
    help="With --against: how many inputs to make up.",
)
@click.option(
    "--tolerances",
    metavar="PRECISION|METRIC=LIMIT,…",
    help="With --against: those of a precision, or these limits (max_abs=0.1). [default: those of"
    " CANDIDATE's precision]",
)
@click.option("--model", help="The base model: Hugging Face id or directory.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]DIR",
    help="PEFT adapter besides the bundle's own; the one that a merged bundle claims to hold.",
)
@click.option(
    "--report",
    "reports",
    multiple=True,
    metavar="FILE",
    help="Write a report: .json, .xml (JUnit), .md or .html; repeat for more.",
)
@click.option(
    "--sign",
    metavar="KEY.pem",
    help="Sign the certificate of a check that passed with this ed25519 key.",
)
@click.option(
    "--backends",
    metavar="NAME,…",
    help="Only these: torch-merged, peft, onnx-merged, onnx-side-inputs, onnx-native, onnx-mixed,"
    " onnx-genai, onnx-reference.",
)
@click.option(
    "--phases",
    metavar="NAME,…",
    help="Only these: prefill, chunked-prefill, padded-batch, permuted-batch, decode, repeat;"
    " one-row of an encoder.",
)
@click.option("--prompts", metavar="FILE", help="One prompt a line, or JSONL.")
@click.option(
    "--tokens",
    type=int,
    help=f"To generate after each prompt, by a decoder.  [default: {GENERATED}]",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="For random tokens and made-up inputs."
)
@click.option(
    "--other",
    "others",
    multiple=True,
    metavar="[NAME=]PLACE[@ADAPTER]",
    help="Hold this against PyTorch too: an ONNX file or module:function that computes what the"
    " base does, or what it does with ADAPTER.",
)
@click.option(
    "--baseline", metavar="FILE", help="A report (.json) of before: fail on what got worse."
)
@click.option(
    "--fuzz",
    type=int,
    default=0,
    show_default=True,
    metavar="ROWS",
    help="Rows of random tokens besides the prompts.",
)
@click.option(
    "--provider",
    "providers",
    multiple=True,
    metavar="NAME",
    help="onnxruntime's execution provider, such as cuda; repeat to run on each.  [default: cpu]",
)
@click.option(
    "--optimization",
    multiple=True,
    metavar="LEVEL",
    help="Of graphs by onnxruntime: disable, basic, extended or all; repeat to run at each."
    "  [default: all]",
)
@click.option(
    "--genai-python",
    metavar="FILE",
    help="The Python of an environment with onnxruntime-genai, to check that too.",
)
@click.option("--controls", is_flag=True, help="Make mistakes on purpose; each must be caught.")
@click.option(
    "--shrink/--no-shrink",
    default=True,
    show_default=True,
    help="Find the smallest input that fails, where one does.",
)
@click.option(
    "--evaluate",
    multiple=True,
    metavar="[NAME=]DATA",
    help="Held-out data to take the accuracy or perplexity on, in the forms of training data; with"
    " NAME for that adapter.",
)
@click.option(
    "--examples",
    type=int,
    default=EXAMPLES,
    show_default=True,
    help="How many of them to draw.",
)
@click.option(
    "--localize/--no-localize",
    default=None,
    help="Find the first module that diverges: always, or never; without, where something failed.",
)
@trust_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    bundle: str,
    reference: str | None,
    inputs: str | None,
    cases: int,
    tolerances: str | None,
    model: str | None,
    adapters: tuple[str, ...],
    reports: tuple[str, ...],
    sign: str | None,
    backends: str | None,
    phases: str | None,
    prompts: str | None,
    tokens: int | None,
    seed: int,
    others: tuple[str, ...],
    baseline: str | None,
    fuzz: int,
    providers: tuple[str, ...],
    optimization: tuple[str, ...],
    genai_python: str | None,
    controls: bool,
    shrink: bool,
    evaluate: tuple[str, ...],
    examples: int,
    localize: bool | None,
    trust_remote_code: bool,
    as_json: bool,
) -> int:
    """Hold every way to run BUNDLE against PyTorch; exit 0 only where all agree, 1 where not.

    The verdict is written into the bundle too, as parity.json.

    With --against, hold CANDIDATE against REFERENCE instead, output by output, whatever they are.
    A function is given numpy arrays by name and returns its outputs by name, or in the order of the
    other side's.
    """
    _refuse_mixture(context, compared=reference is not None)
    with progress("loradeploy.parity"):
        if reference is not None:
            from loradeploy.parity.compare.api import compare

            found = compare(
                reference,
                bundle,
                inputs,
                cases=cases,
                tolerances=_limits(tolerances),
                seed=seed,
                providers=providers or None,
                report=reports,
                baseline=baseline,
            )
            return _tell(found, as_json=as_json)
        from loradeploy.parity.api import parity

        found = parity(
            bundle,
            model=model,
            adapters=list(adapters),
            report=reports,
            sign=sign,
            backends=_names(backends),
            phases=_names(phases),
            prompts=prompts,
            tokens=tokens,
            seed=seed,
            fuzz=fuzz,
            providers=providers or None,
            optimization=optimization or None,
            genai_python=genai_python,
            controls=controls,
            others=others,
            baseline=baseline,
            shrink=shrink,
            evaluate=evaluate or None,
            examples=examples,
            localize=localize,
            trust_remote_code=trust_remote_code,
        )
    return _tell(found, as_json=as_json)


def _refuse_mixture(context: click.Context, *, compared: bool) -> None:
    """Raise UsageError for an option of one form that is given with the other."""
    flags = {
        parameter.name: parameter.opts[0]
        for parameter in context.command.params
        if parameter.name is not None
        and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    }
    for name, flag in flags.items():
        if name in _BOTH or (name in _COMPARED) == compared:
            continue
        alone = name in _COMPARED
        fits = "goes with --against alone" if alone else "does not go with --against"
        raise UsageError(f"{flag} {fits}")
    if "examples" in flags and "evaluate" not in flags:
        raise UsageError("--examples goes with --evaluate alone")
    if "cases" in flags and "inputs" in flags:
        raise UsageError("--cases are made up: it does not go with --inputs")


def _limits(text: str | None) -> str | dict[str, float] | None:
    """A precision, or limits by metric."""
    if text is None or "=" not in text:
        return text
    pairs = (pair.partition("=") for pair in text.split(","))
    try:
        return {name.strip(): float(limit) for name, _, limit in pairs}
    except ValueError:
        raise UsageError(f"--tolerances {text}: give METRIC=LIMIT, as in max_abs=0.1") from None


def _tell(found: ParityReport, *, as_json: bool) -> int:
    if as_json:
        print_json(found.to_json())
    else:
        from rich.console import Console

        from loradeploy.parity.report.table import print_report

        # Nobody can widen a log: what is no terminal gets the whole table.
        width = None if sys.stdout.isatty() else _WHOLE
        print_report(found, Console(file=sys.stdout, highlight=False, width=width))
    return 0 if found.passed else 1


def _names(listed: str | None) -> list[str] | None:
    return None if listed is None else [name.strip() for name in listed.split(",") if name]
