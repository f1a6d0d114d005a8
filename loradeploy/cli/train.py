"""`loradeploy train`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any, Final

import click

from loradeploy.cli.console import (
    GivenPath,
    flag_of,
    json_option,
    print_json,
    print_pairs,
    say,
    trust_option,
)
from loradeploy.errors import UsageError
from loradeploy.printable import readable
from loradeploy.train.config import CHOICES, OPTIONAL, TrainConfig
from loradeploy.train.config_file import PATHS

_TYPES: Final = {"int": int, "float": float}  # others are strings, which TrainConfig parses
_PRINTED: Final = {"learned": "tokens in the loss"}  # labels of fields with other names in --json
# A setting in a help text: `max_steps` as in Python and YAML, which becomes --max-steps here.
_SETTING: Final = re.compile(r"`([a-z_]+)`")


def _settings(function: Callable[..., None]) -> Callable[..., None]:
    """Add a flag for each field of TrainConfig, without a default: TrainConfig has it."""
    for field in reversed(dataclasses.fields(TrainConfig)):
        flag = flag_of(field.name)
        named = _SETTING.sub(lambda match: flag_of(match[1]), field.metadata["help"])
        text = f"{named}{_default(field)}"
        if field.type == "bool":
            # With a negative form, a flag overrides the file both ways.
            both = f"{flag}/--no-{flag.removeprefix('--')}"
            option = click.option(both, default=None, help=text)
        elif field.name in CHOICES:
            option = click.option(flag, type=click.Choice(CHOICES[field.name]), help=text)
        else:
            kind = str(field.type).removesuffix(OPTIONAL)
            option = click.option(flag, type=_TYPES.get(kind, str), help=text)
        function = option(function)
    return function


def _default(field: dataclasses.Field[Any]) -> str:
    return "" if field.default in ("", None) else f"  [default: {field.default}]"


@click.command(
    name="train",
    short_help="Train an adapter.",
    epilog="Example: loradeploy train --model ./smollm2 --data news.jsonl --output adapters/news"
    " --rank 16",
)
@click.option(
    "--model",
    type=GivenPath(),
    metavar="ID|PATH",
    help="Hugging Face id or directory of the base model.",
)
@click.option(
    "--data",
    type=GivenPath(),
    help="Training data: a JSONL, CSV or Parquet file, a saved dataset, or a dataset on the Hugging"
    " Face hub. Columns: prompt and completion, messages, or text; for a classifier text and label,"
    " or a directory with one subdirectory per class.",
)
@click.option("--output", type=GivenPath(), help="Directory to write the adapter to.")
@click.option("--config", type=GivenPath(), help="A YAML file of settings. Flags take precedence.")
@click.option(
    "--resume", is_flag=True, help="Continue an interrupted run from its newest checkpoint."
)
@click.option("--print-config", is_flag=True, help="Print the settings as YAML and exit.")
@click.option(
    "--dry-run", is_flag=True, help="Show the examples, tokens and steps of the run and exit."
)
@_settings
@trust_option
@json_option
def command(
    config: str | None,
    resume: bool,
    print_config: bool,
    dry_run: bool,
    trust_remote_code: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train a LoRA adapter and write it as a PEFT directory.

    On several GPUs or machines: accelerate launch -m loradeploy train …, or torchrun -m.

    The loss is computed on completions, or on assistant turns. The output directory also gets the
    loss curve (loss.csv, loss.png), all settings (train.yaml) and a model card (README.md).
    --model, --data and --output may be given in the YAML file instead.
    """
    from loradeploy.lora.base.loading import custom_code
    from loradeploy.train.api import train
    from loradeploy.train.config_file import read_config, read_paths, read_yaml, to_yaml

    given = {name: value for name, value in flags.items() if value is not None}
    settings = read_yaml(config)
    paths = read_paths(settings, {name: given.pop(name, None) for name in PATHS})
    if print_config:
        head = "".join(f"{name}: {json.dumps(path)}\n" for name, path in paths.items())
        click.echo(head + to_yaml(read_config(settings, given), explained=True), nl=False)
        return
    missing = [name for name in PATHS if name not in paths and (name != "output" or not dry_run)]
    if missing:
        raise UsageError(f"give --{missing[0]}, or {missing[0]} in the file of --config")
    if dry_run:
        with custom_code(trust_remote_code):
            _show(paths, read_config(settings, given), as_json=as_json)
        return
    result = train(
        paths["model"],
        paths["data"],
        paths["output"],
        config=settings,
        resume=resume,
        trust_remote_code=trust_remote_code,
        **given,
    )
    from loradeploy.train.loop.processes import is_main_process

    if not is_main_process():
        return
    values = dataclasses.asdict(result)
    if as_json:
        print_json(values)
    else:
        print_pairs(f"Trained {result.adapter}", values)


def _show(paths: dict[str, str], config: TrainConfig, *, as_json: bool) -> None:
    """Print the figures of the run, then examples in which the tokens of the loss are marked."""
    from loradeploy.lora.quiet import quiet

    with quiet():  # imported libraries print warnings
        from loradeploy.train.preview import preview

    found = preview(paths["model"], paths["data"], config)
    values = dataclasses.asdict(found)
    if as_json:
        print_json(values)
        return
    shown = values.pop("shown")
    values = {_PRINTED.get(name, name): value for name, value in values.items()}
    print_pairs(f"Would train on {paths['data']}", values)
    click.echo("Tokens inside ⟦…⟧ contribute to the loss; special tokens are shown by name.")
    for number, example in enumerate(shown, start=1):
        label = f", label {example['label']}" if example["label"] is not None else ""
        click.echo()
        say(
            f"Example {number}: {example['tokens']} tokens, {example['learned']} in the loss{label}"
        )
        for text, learned in example["pieces"]:
            text = readable(text)
            click.echo(click.style(f"⟦{text}⟧", fg="green") if learned else text, nl=False)
        click.echo()
