"""`loradeploy train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import click

from loradeploy.cli.console import json_option, print_json, print_pairs
from loradeploy.train.config import CHOICES, TrainConfig

_TYPES: Final = {"int": int, "float": float}  # all else is text that the settings parse


def _settings(function: Callable[..., None]) -> Callable[..., None]:
    """A flag for each field of TrainConfig, without a default: the dataclass has it."""
    for field in reversed(dataclasses.fields(TrainConfig)):
        flag = f"--{field.name.replace('_', '-')}"
        text = f"{field.metadata['help']}{_default(field)}"
        if field.type == "bool":
            negative = f"--no-{flag.removeprefix('--')}"  # a flag wins over the file both ways
            option = click.option(f"{flag}/{negative}", default=None, help=text)
        elif field.name in CHOICES:
            option = click.option(flag, type=click.Choice(CHOICES[field.name]), help=text)
        else:
            option = click.option(flag, type=_TYPES.get(str(field.type), str), help=text)
        function = option(function)
    return function


def _default(field: dataclasses.Field[Any]) -> str:
    empty = field.default is dataclasses.MISSING or field.default in ("", ())
    return "" if empty else f" [default: {field.default}]"


@click.command(
    name="train",
    short_help="Train an adapter.",
    epilog="Example: loradeploy train --model ./smollm2 --data news.jsonl --output adapters/news"
    " --rank 16",
)
@click.option("--model", required=True, help="Hugging Face id or directory of the base model.")
@click.option(
    "--data",
    required=True,
    type=click.Path(),
    help="JSONL with prompt and completion, messages, or text; for a classifier JSONL or CSV with"
    " text and label, or a folder of class folders.",
)
@click.option("--output", required=True, type=click.Path(), help="Directory of the adapter.")
@click.option("--config", type=click.Path(), help="YAML file of settings; flags win.")
@click.option(
    "--resume", is_flag=True, help="Go on from the newest checkpoint, where a run was cut off."
)
@_settings
@json_option
def command(
    model: str,
    data: str,
    output: str,
    config: str | None,
    resume: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train a LoRA adapter and write it as a PEFT directory.

    On several GPUs or machines: accelerate launch -m loradeploy train …, or torchrun -m.

    The loss is on completions, or on what the assistant says. Beside the adapter stand its loss
    curve (loss.csv, loss.png) and its settings in full (train.yaml).
    """
    from loradeploy.train.api import train
    from loradeploy.train.processes import is_main_process

    given = {name: value for name, value in flags.items() if value is not None}
    result = train(model, data, output, config=config, resume=resume, **given)
    if not is_main_process():
        return
    values = dataclasses.asdict(result)
    if as_json:
        print_json(values)
    else:
        print_pairs(f"Trained {output}", values)
