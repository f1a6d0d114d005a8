"""What `loradeploy run` runs, and how it prints results on stdout: as text or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from loradeploy.cli.console import say_text
from loradeploy.printable import as_json, one_line

if TYPE_CHECKING:
    from loradeploy.runtime.adapters.resident import AdapterSpec
    from loradeploy.runtime.session import AdapterSession


@dataclass(frozen=True)
class Printer:
    """Prints results on stdout. `one`: for a single prompt, whose text may have line breaks."""

    as_json: bool
    one: bool

    def piece(self, text: str) -> None:
        """Print a part of a text, without a line break."""
        say_text(text, end="")

    def result(self, plain: str, values: dict[str, Any], *, several: bool = False) -> None:
        """Print `plain`, or `values` as JSON. `several`: the prompt has more results."""
        if self.as_json:  # several results are JSONL
            click.echo(as_json(values, indent=2 if self.one and not several else None))
        else:
            say_text(plain if self.one else one_line(plain))


@dataclass(frozen=True)
class Job:
    """The prompts to run, `batch_size` at a time, with the adapter of each."""

    session: AdapterSession
    prompts: Sequence[Any]
    adapters: Sequence[AdapterSpec | None]
    batch_size: int
    printer: Printer
