"""Demonstrate the whole workflow on a real model: `make demo`.

Two adapters for SmolLM2-135M are trained on tasks from BBC News. The base is exported with side
inputs, and that bundle is exported again with an adapter merged. ONNX Runtime generates text
without an adapter, with each adapter, and with all of them in one batch. Parity is checked, and
tables show sizes, losses, errors and latencies. Finally the bundle is served, and each of its
three models gets a request.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.table import Table

import loradeploy as ld
from loradeploy.cli.console import size
from loradeploy.runtime.timing import time_bundle
from tools.inputs.news_tasks import Story, stories, write_tasks
from tools.inputs.real_models import bbc_news, smollm2

if TYPE_CHECKING:
    from loradeploy.parity.report.results import ParityReport
    from loradeploy.train.result import TrainResult

TASKS = ("headline", "topic")
Made = TypeVar("Made")
console = Console(width=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/demo"))
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    output, begin = arguments.output, time.perf_counter()

    model = step("prepare SmolLM2-135M-Instruct from its package", smollm2)
    news = step("read BBC News from its package", lambda: stories(bbc_news()))
    held_out, training = news[:2], news[2:802]
    data = write_tasks(training, output)
    directories = {task: output / "adapters" / task for task in TASKS}
    trained = {
        task: step(
            f"train the adapter {task!r}: {arguments.steps} steps on {len(training)} stories",
            partial(
                ld.train, model, data[task], directories[task], max_steps=arguments.steps, rank=8
            ),
        )
        for task in TASKS
    }
    bundle, merged = output / "bundle", output / "merged"
    step(
        "export the base with side inputs",
        partial(ld.export, model, bundle, adapters=directories),
    )
    one = {"headline": directories["headline"]}
    step(
        "merge the headline adapter into that graph",
        partial(ld.export, bundle, merged, adapters=one, merge=True),
    )
    step("answer with ONNX Runtime", partial(show_answers, bundle, merged, held_out))
    reports = (
        step("check parity of the side inputs", partial(ld.parity, bundle, model=model)),
        step(
            "check parity of the merged graph",
            partial(ld.parity, merged, model=model, adapters=one),
        ),
    )
    latency = step("time every path", partial(latencies, bundle, merged))
    for table in (learning(trained), sizes(output), proofs(reports), latency):
        console.print(table)
    step("serve the bundle: a request for each model", partial(show_served, bundle, held_out[0]))
    console.print(f"{time.perf_counter() - begin:.0f} s in total; the results are in {output}")
    if not all(report.passed for report in reports):
        raise SystemExit(1)


def step(title: str, make: Callable[[], Made]) -> Made:
    """Print `title`, call `make`, print its time, and return its result."""
    console.print(f"[bold]{title}[/bold]", highlight=False)
    begin = time.perf_counter()
    made = make()
    console.print(f"  [dim]{time.perf_counter() - begin:.1f} s[/dim]", highlight=False)
    return made


def show_answers(bundle: Path, merged: Path, news: list[Story]) -> None:
    """Generate without an adapter, with each adapter, and with the merged graph."""
    rows = [(story, name) for story in news for name in (None, *TASKS)]
    prompts, adapters = [story.prompt for story, _ in rows], [name for _, name in rows]
    generator = ld.TextGenerator(ld.AdapterSession(bundle))
    answers = generator.generate(prompts, adapters, max_new_tokens=16)
    alone = ld.TextGenerator(ld.AdapterSession(merged)).generate(
        [story.prompt for story in news], max_new_tokens=16
    )
    for number, story in enumerate(news):
        console.print(f"  [italic]{story.text[:90]}…[/italic]", highlight=False)
        for name, answer in zip((None, *TASKS), answers[3 * number :], strict=False):
            show(name or "base", answer.text)
        show("merged headline", alone[number].text)


def show_served(bundle: Path, story: Story) -> None:
    """Run `loradeploy serve` in a process, and send concurrent requests to all models."""
    models = (bundle.name, *TASKS)
    command = [sys.executable, "-m", "loradeploy", "serve", str(bundle), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            for model, text in zip(models, asked(server, models, story.prompt), strict=True):
                show(model, text)
        finally:
            server.terminate()


def asked(server: subprocess.Popen[str], models: Sequence[str], prompt: str) -> list[str]:
    """Return the text that each model of a server generates after a prompt."""
    assert server.stdout is not None
    printed = "".join(iter(server.stdout.readline, "}\n"))  # printed when the server is ready
    url = json.loads(printed + "}")["url"]

    def ask(model: str) -> str:
        body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            text: str = json.load(answer)["choices"][0]["text"]
        return text

    with ThreadPoolExecutor(len(models)) as pool:
        return list(pool.map(ask, models))


def show(name: str, text: str) -> None:
    line = " ".join(text.split()) or "(ends at once)"
    console.print(f"    {name:>16}: {line}", highlight=False, markup=False)


def learning(trained: dict[str, TrainResult]) -> Table:
    table = Table("adapter", "loss before", "after", "steps", "s", "parameters", title="Training")
    for name, result in trained.items():
        table.add_row(
            name,
            f"{result.loss_before:.2f}",
            f"{result.loss_after:.2f}",
            str(result.steps),
            f"{result.seconds:.0f}",
            f"{result.parameters:,}",
        )
    return table


def sizes(output: Path) -> Table:
    table = Table("file", "size", title="Sizes")
    for name in (
        "bundle/model.onnx.data",
        "bundle/model.onnx",
        "merged/model.onnx.data",
        "bundle/adapters/headline.onnx_adapter",
        "bundle/adapters/topic.onnx_adapter",
    ):
        table.add_row(name, size((output / name).stat().st_size))
    return table


def proofs(reports: tuple[ParityReport, ...]) -> Table:
    table = Table(
        "path", "adapter", "phase", "max abs error", "adapter's effect", "", title="Parity"
    )
    for report in reports:
        for result in report.results:
            table.add_row(
                result.title,
                result.adapter_label,
                result.phase or "",
                f"{result.figures.max_abs:.1e}" if result.figures else "",
                f"{result.effect:.1f}" if result.effect else "",
                result.outcome,
            )
    return table


def latencies(bundle: Path, merged: Path) -> Table:
    table = Table(
        "one token after 128",
        "ms",
        "× base (quartiles)",
        title="Latency, batch 4 (rough; tools/bench_runtime.py measures it properly)",
    )
    for place in (bundle, merged):
        session = ld.AdapterSession(place)
        for timing in time_bundle(session, batch=4, rounds=7):
            ratio = ""
            if timing.ratio is not None:
                ratio = f"{timing.ratio:.2f} ({timing.ratio_low:.2f}–{timing.ratio_high:.2f})"
            table.add_row(f"{place.name}: {timing.name}", f"{timing.median:.0f}", ratio)
    return table


if __name__ == "__main__":
    main()
