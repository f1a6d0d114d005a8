"""`loradeploy bench`."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from loradeploy.cli.console import (
    GivenPath,
    capture_option,
    json_option,
    operator_option,
    print_json,
    print_rows,
    provider_option,
    say,
)

if TYPE_CHECKING:
    from loradeploy.runtime.timing import Timing


@click.command(
    name="bench",
    short_help="Time a bundle: base, adapters, swap, mixed batch.",
    epilog="Example: loradeploy bench bundle --batch 8 --length 128",
)
@click.argument("bundle", type=GivenPath())
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]DIR",
    help="Time this adapter too. Repeat for more.",
)
@click.option(
    "--batch", type=int, default=1, show_default=True, help="Number of rows in the batch."
)
@click.option(
    "--length",
    type=int,
    help="Number of tokens in a decoder's cache, or in an encoder's texts. [default: 128, or as"
    " many as the model has positions for]",
)
@click.option(
    "--rounds", type=int, default=15, show_default=True, help="Number of measurements of each side."
)
@provider_option
@capture_option
@operator_option
@json_option
def command(
    bundle: str,
    adapters: tuple[str, ...],
    batch: int,
    length: int | None,
    rounds: int,
    provider: str,
    capture_graphs: bool,
    operator: str | None,
    as_json: bool,
) -> None:
    """Time one forward pass of BUNDLE, with the sides taking turns in random order.

    A ratio compares a side with the base in the same round, and is given with its quartiles. The
    control is a second run of the base: a difference within the control's quartiles is noise.
    """
    from loradeploy.adapter.files.named import named_directory
    from loradeploy.runtime.session import AdapterSession
    from loradeploy.runtime.timing import default_length, time_bundle

    begin = time.perf_counter()
    session = AdapterSession(bundle, [provider], capture_graphs=capture_graphs, operator=operator)
    opened = time.perf_counter() - begin
    loads = {}
    for text in adapters:
        name, path = named_directory(text)
        begin = time.perf_counter()
        session.load(name, path)
        loads[name] = (time.perf_counter() - begin) * 1e3
    length = default_length(session) if length is None else length
    timings = time_bundle(session, batch=batch, length=length, rounds=rounds)
    own, *_ = session.providers
    off_device = {name: counts for name, counts in session.placement.items() if name != own}
    if as_json:
        print_json(
            {
                "bundle": bundle,
                "batch": batch,
                "length": length,
                "rounds": rounds,
                "providers": session.providers,
                "captured": session.captured,
                "open_s": opened,
                "load_ms": loads,
                "device": asdict(session.provider),
                "placement": session.placement,
                "off_device": off_device,
                "timings": [asdict(timing) for timing in timings],
            }
        )
        return
    title = f"{bundle}, batch {batch}, length {length}, {', '.join(session.providers)}"
    header = ("side", "ms", "quartiles", "× base", "quartiles")
    print_rows(title, header, [_row(timing) for timing in timings])
    print_rows("loading", ("adapter", "ms"), [(n, f"{ms:.1f}") for n, ms in loads.items()])
    nodes = [
        (name, sum(counts.values()), ", ".join(f"{op} {count}" for op, count in counts.items()))
        for name, counts in session.placement.items()
    ]
    print_rows("nodes", ("provider", "nodes", "operators"), nodes)
    total = sum(sum(counts.values()) for counts in session.placement.values())
    off = sum(sum(counts.values()) for counts in off_device.values())
    say(f"ran on {session.provider}; {off} of {total} nodes run on other providers than {own}")
    if session.captured is not None:
        say(f"{session.captured} runs were captured")
    say(f"opened in {opened:.2f} s")


def _row(timing: Timing) -> tuple[Any, ...]:
    spread = f"{timing.low:.2f}–{timing.high:.2f}"
    if timing.ratio is None:
        return timing.name, f"{timing.median:.2f}", spread, "", ""
    ratios = f"{timing.ratio_low:.2f}–{timing.ratio_high:.2f}"
    return timing.name, f"{timing.median:.2f}", spread, f"{timing.ratio:.2f}", ratios
