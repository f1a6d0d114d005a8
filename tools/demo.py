"""The main job end to end, on a real model: `make demo`.

SmolLM2-135M learns two tasks from BBC News as two adapters. The base is exported once with side
inputs, and from that bundle once more with an adapter merged; ONNX Runtime then answers with no
adapter, with each, and with both in one batch; parity proves all of it, and tables tell sizes,
losses, errors and latencies. At the end the bundle is served, and three requests ask three models.
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
    told = step("read BBC News from its package", lambda: stories(bbc_news()))
    held_out, training = told[:2], told[2:802]
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
        step("prove the side inputs", partial(ld.parity, bundle, model=model)),
        step("prove the merged graph", partial(ld.parity, merged, model=model, adapters=one)),
    )
    latency = step("time every path", partial(latencies, bundle, merged))
    for table in (learning(trained), sizes(output), proofs(reports), latency):
        console.print(table)
    step("serve the bundle: a request for each model", partial(show_served, bundle, held_out[0]))
    console.print(f"{time.perf_counter() - begin:.0f} s in all; what was made is in {output}")
    if not all(report.passed for report in reports):
        raise SystemExit(1)


def step(title: str, make: Callable[[], Made]) -> Made:
    """What `make` returns, announced and timed."""
    console.print(f"[bold]{title}[/bold]", highlight=False)
    begin = time.perf_counter()
    made = make()
    console.print(f"  [dim]{time.perf_counter() - begin:.1f} s[/dim]", highlight=False)
    return made


def show_answers(bundle: Path, merged: Path, told: list[Story]) -> None:
    """The same prompts with no adapter, with each, and merged; all rows in one batch."""
    rows = [(story, name) for story in told for name in (None, *TASKS)]
    prompts, adapters = [story.prompt for story, _ in rows], [name for _, name in rows]
    generator = ld.TextGenerator(ld.AdapterSession(bundle))
    answers = generator.generate(prompts, adapters, max_new_tokens=16)
    alone = ld.TextGenerator(ld.AdapterSession(merged)).generate(
        [story.prompt for story in told], max_new_tokens=16
    )
    for number, story in enumerate(told):
        console.print(f"  [italic]{story.text[:90]}…[/italic]", highlight=False)
        for name, answer in zip((None, *TASKS), answers[3 * number :], strict=False):
            show(name or "base", answer.text)
        show("merged headline", alone[number].text)


def show_served(bundle: Path, story: Story) -> None:
    """`loradeploy serve` in a process of its own, asked by three clients at once."""
    models = (bundle.name, *TASKS)
    command = [sys.executable, "-m", "loradeploy", "serve", str(bundle), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            for model, text in zip(models, asked(server, models, story.prompt), strict=True):
                show(model, text)
        finally:
            server.terminate()


def asked(server: subprocess.Popen[str], models: Sequence[str], prompt: str) -> list[str]:
    """The texts that the models of a server continue a prompt with."""
    assert server.stdout is not None
    printed = "".join(iter(server.stdout.readline, "}\n"))  # once it is ready; it goes on
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
        title="Latency, batch 4; a glance: tools/bench_runtime.py measures",
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
