"""`loradeploy train`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, Final

import click

from loradeploy.cli.console import json_option, print_json, print_pairs, say, trust_option
from loradeploy.errors import UsageError
from loradeploy.printable import readable
from loradeploy.train.config import CHOICES, PLACES, TrainConfig

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
    return "" if field.default == "" else f" [default: {field.default}]"


@click.command(
    name="train",
    short_help="Train an adapter.",
    epilog="Example: loradeploy train --model ./smollm2 --data news.jsonl --output adapters/news"
    " --rank 16",
)
@click.option("--model", help="Hugging Face id or directory of the base model.")
@click.option(
    "--data",
    type=click.Path(),
    help="JSONL, CSV, Parquet, a saved dataset or one of the hub, with prompt and completion,"
    " messages, or text; for a classifier text and label, or a folder of class folders.",
)
@click.option("--output", type=click.Path(), help="Directory of the adapter.")
@click.option("--config", type=click.Path(), help="YAML file of settings; flags win.")
@click.option(
    "--resume", is_flag=True, help="Go on from the newest checkpoint, where a run was cut off."
)
@click.option("--print-config", is_flag=True, help="Print the settings as YAML, and end.")
@click.option("--dry-run", is_flag=True, help="Show what it would train on, and end.")
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

    The loss is on completions, or on what the assistant says. Beside the adapter stand its loss
    curve (loss.csv, loss.png), its settings in full (train.yaml) and its card (README.md). --model,
    --data and --output may stand in the YAML file too.
    """
    from loradeploy.lora.loading import custom_code
    from loradeploy.train.api import train
    from loradeploy.train.config import read_config, read_places, read_yaml, to_yaml

    given = {name: value for name, value in flags.items() if value is not None}
    told = read_yaml(config)
    places = read_places(told, {name: given.pop(name, None) for name in PLACES})
    if print_config:
        head = "".join(f"{name}: {json.dumps(place)}\n" for name, place in places.items())
        click.echo(head + to_yaml(read_config(told, given), explained=True), nl=False)
        return
    needed = [name for name in PLACES if name not in places and (name != "output" or not dry_run)]
    if needed:
        raise UsageError(f"give --{needed[0]}, or {needed[0]} in the file of --config")
    if dry_run:
        with custom_code(trust_remote_code):
            _show(places, read_config(told, given), as_json=as_json)
        return
    result = train(
        places["model"],
        places["data"],
        places["output"],
        config=told,
        resume=resume,
        trust_remote_code=trust_remote_code,
        **given,
    )
    from loradeploy.train.processes import is_main_process

    if not is_main_process():
        return
    values = dataclasses.asdict(result)
    if as_json:
        print_json(values)
    else:
        print_pairs(f"Trained {result.adapter}", values)


def _show(places: dict[str, str], config: TrainConfig, *, as_json: bool) -> None:
    """What `config` would train on: figures, then examples with what is learnt marked."""
    from loradeploy.lora.quiet import quiet

    with quiet():  # what is imported has remarks
        from loradeploy.train.preview import preview

    found = preview(places["model"], places["data"], config)
    values = dataclasses.asdict(found)
    if as_json:
        print_json(values)
        return
    shown = values.pop("shown")
    print_pairs(f"Would train on {places['data']}", values)
    click.echo("Learnt is what stands in ⟦…⟧; special tokens are spelled out.")
    for number, example in enumerate(shown, start=1):
        label = f", label {example['label']}" if example["label"] is not None else ""
        click.echo()
        say(f"Example {number}: {example['tokens']} tokens, {example['learnt']} learnt{label}")
        for text, learnt in example["pieces"]:
            text = readable(text)
            click.echo(click.style(f"⟦{text}⟧", fg="green") if learnt else text, nl=False)
        click.echo()
