"""Benchmark SmolLM2-135M on PyTorch, PEFT, onnxruntime-genai and every path of loradeploy.

    python -m tools.bench_runtime [--starts 4] [--only decode] [--output build/bench]

Writes runtime.json, runtime.md and runtime.svg. The timing method is described in
`tools/timing/alternate.py`: a process for each side, turns in random order, ratios within a round,
one side twice as the control.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

from rich.console import Console

import loradeploy as ld
from loradeploy.files import atomic_file, write_json
from loradeploy.runtime.timing import forward
from tools.inputs import genai_builder
from tools.inputs.real_models import cache, smollm2
from tools.timing.alternate import Ratio, Side, Worker, in_processes, ratio, serve_worker
from tools.timing.charts import bars, svg_axes

RANK = 16
ADAPTERS = 8
PAST = 128
console = Console(stderr=True)


# -- the sides, each in its own process --------------------------------------------------------


def torch_base(model: str, batch: int, **_: Any) -> Side:
    return _torch_call(_torch_model(model), batch)


def peft_one(model: str, adapters: Sequence[str], batch: int, **_: Any) -> Side:
    return _torch_call(_peft_model(model, adapters[:1]), batch)


def peft_mixed(model: str, adapters: Sequence[str], batch: int, **_: Any) -> Side:
    names = [f"a{row % len(adapters)}" for row in range(batch)]
    return _torch_call(_peft_model(model, adapters), batch, adapter_names=names)


def onnx(bundle: str, adapters: Sequence[str], batch: int, **given: Any) -> Side:
    """Run a bundle with the first `count` adapters: none, one for all rows, or several in turn."""
    session = ld.AdapterSession(bundle)
    names = [f"a{number}" for number in range(given["count"])]
    for name, place in zip(names, adapters, strict=False):
        session.load(name, place)
    rows: Any = None
    if names:
        rows = names[0] if len(names) == 1 else [names[row % len(names)] for row in range(batch)]
    return partial(forward(session, batch, past=given["past"], new=given["new"]), rows)


SIDES: dict[str, Callable[..., Side]] = {
    side.__name__: side for side in (torch_base, peft_one, peft_mixed, onnx)
}


@dataclass(frozen=True)
class Plan:
    """The sides that are timed together, the first of which runs twice, and their ratios."""

    name: str
    batch: int
    sides: tuple[str, ...]
    ratios: tuple[tuple[str, str], ...]
    past: int = PAST
    new: int = 1


def _over(first: str, *others: str) -> tuple[tuple[str, str], ...]:
    return tuple((other, first) for other in others)


# A side is "BUNDLE USE", with a bundle of `prepare` and a key of USES, or the name of another side.
PLANS: Final = (
    Plan(
        "fp32 decode",
        1,
        (
            *("merged", "slots idle", "slots one", "rows idle", "rows one"),
            *("branches idle", "branches one", "torch_base", "peft_one"),
            *("genai_base", "genai_one", "genai_built", "genai_lora", "built idle", "built one"),
        ),
        (
            *_over("merged", "slots idle", "slots one", "rows idle", "rows one"),
            *_over("merged", "branches idle", "branches one"),
            *(("torch_base", "merged"), ("peft_one", "slots one"), ("peft_one", "rows one")),
            *(("genai_base", "slots idle"), ("genai_one", "slots one")),
            *(("genai_built", "merged"), ("genai_lora", "genai_built")),
            *(("built one", "built idle"), ("genai_lora", "built one"), ("genai_lora", "rows one")),
        ),
    ),
    Plan(
        "fp32 decode",
        8,
        (
            *("merged", "slots idle", "slots one", "slots mixed", "rows idle", "rows one"),
            *("rows mixed", "branches idle", "branches mixed", "torch_base", "peft_mixed"),
            *("in place idle", "in place mixed"),
        ),
        (
            *_over("merged", "slots idle", "slots one", "slots mixed"),
            *_over("merged", "rows idle", "rows one", "rows mixed"),
            *_over("merged", "branches idle", "branches mixed"),
            *_over("rows idle", "in place idle"),
            *_over("rows mixed", "in place mixed"),
            *(("torch_base", "merged"), ("peft_mixed", "slots mixed")),
            *(("peft_mixed", "rows mixed"), ("peft_mixed", "in place mixed")),
        ),
    ),
    Plan(
        "fp32 decode past 1024",
        8,
        ("rows idle", "in place idle", "rows mixed", "in place mixed"),
        (*_over("rows idle", "in place idle"), *_over("rows mixed", "in place mixed")),
        past=1024,
    ),
    Plan(
        "fp32 prefill of 512",
        1,
        ("merged", "slots idle", "slots one", "rows one"),
        _over("merged", "slots idle", "slots one", "rows one"),
        past=0,
        new=512,
    ),
    Plan(
        "int4 decode",
        1,
        ("merged4", "slots4 idle", "slots4 one", "rows4 idle", "rows4 one"),
        _over("merged4", "slots4 idle", "slots4 one", "rows4 idle", "rows4 one"),
    ),
    Plan(
        "int4 decode",
        8,
        ("merged4", "slots4 idle", "slots4 mixed", "rows4 idle", "rows4 mixed"),
        _over("merged4", "slots4 idle", "slots4 mixed", "rows4 idle", "rows4 mixed"),
    ),
)
USES: Final = {"idle": 0, "one": 1, "mixed": ADAPTERS}


def _torch_model(model: str) -> Any:
    from loradeploy.export.trace import load_model

    return load_model(Path(model), "causal-lm")[0]


def _peft_model(model: str, adapters: Sequence[str]) -> Any:
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(_torch_model(model), adapters[0], adapter_name="a0")
    for number, place in enumerate(adapters[1:], start=1):
        adapted.load_adapter(place, adapter_name=f"a{number}")
    return adapted.eval()


def _torch_call(model: Any, batch: int, **options: Any) -> Side:
    import torch
    from transformers.cache_utils import DynamicCache

    config = model.config
    shape = (batch, config.num_key_value_heads, PAST, config.head_dim)
    ids = torch.ones(batch, 1, dtype=torch.long)

    def call() -> None:
        past = DynamicCache(
            [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]
        )
        with torch.inference_mode():
            model(input_ids=ids, past_key_values=past, use_cache=True, **options)

    return call


# -- the run -----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--starts", type=int, default=4, help="sets of fresh processes")
    parser.add_argument("--rounds", type=int, default=3, help="turns of a side in each set")
    parser.add_argument("--only", help="run plans whose name contains this, such as int4 or decode")
    parser.add_argument("--calls", type=int, default=5, help="calls of a side in a round")
    arguments = parser.parse_args()

    prepared = prepare()
    plans = [plan for plan in PLANS if arguments.only is None or arguments.only in plan.name]
    turns = {"starts": arguments.starts, "rounds": arguments.rounds, "calls": arguments.calls}
    results = [measure(plan, prepared, **turns) for plan in plans]
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "rank": RANK, "past": PAST}
    report = {
        "machine": machine,
        **turns,
        "results": results,
        "memory": {form: memory(form, prepared) for form in FORMS},
    }
    write_json(arguments.output / "runtime.json", report)
    text = markdown(report)
    with atomic_file(arguments.output / "runtime.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    draw(results, arguments.output / "runtime.svg")
    print(text)


# The first is exported from the checkpoint, the others from the first.
FORMS: Final[Mapping[str, Mapping[str, Any]]] = {
    "slots": {"layout": "slots"},
    "merged": {"merge": True},
    "rows": {"layout": "rows"},
    "branches": {"layout": "rows", "branches": True},
    "in place": {"layout": "rows", "attention": "gqa"},
    "merged4": {"merge": True, "precision": "int4"},
    "slots4": {"layout": "slots", "branches": False, "precision": "int4"},
    "rows4": {"layout": "rows", "precision": "int4"},
}


def prepare() -> dict[str, Any]:
    """Prepare the base, eight random adapters of rank 16 on all linear layers, and the bundles."""
    model, place = smollm2(), cache() / "bench"
    adapters = [place / f"adapter-{number}" for number in range(ADAPTERS)]
    if not adapters[-1].exists():
        console.print("making eight random adapters")
        random_adapters(model, adapters)
    bundles: dict[str, str] = {}
    for form, options in FORMS.items():
        begin = time.perf_counter()
        source = bundles.get("slots", model)
        ld.export(source, place / form, adapters={"a0": adapters[0]}, **options)
        console.print(f"exported {form} in {time.perf_counter() - begin:.1f} s")
        bundles[form] = str(place / form)
    bundles.update(_built(model, adapters[0], place))
    return {
        "model": str(model),
        "adapters": [str(adapter) for adapter in adapters],
        "bundles": bundles,
    }


def _built(model: Path, adapter: Path, place: Path) -> dict[str, str]:
    """Build graphs with onnxruntime-genai: plain, with an adapter, and exported by loradeploy."""
    if not genai_builder.PYTHON.exists():
        raise SystemExit("onnxruntime-genai is not set up: make setup")
    built, lora = place / "genai-built", place / "genai-lora"
    for target, own in ((built, None), (lora, adapter)):
        if not target.exists():
            console.print(f"building {target.name}")
            genai_builder.build(model, target, "fp32", adapter=own)
    ld.export(built, place / "built", adapters={"a0": adapter}, layout="rows", checkpoint=model)
    return {"genai_built": str(built), "genai_lora": str(lora), "built": str(place / "built")}


def random_adapters(model: Path, places: Sequence[Path]) -> None:
    import torch

    from loradeploy.adapter import AdapterConfig
    from loradeploy.lora.inject import inject

    base = _torch_model(str(model))
    for seed, place in enumerate(places):
        config = AdapterConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        injection = inject(base, config, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for layer in injection.layers.values():
            fresh = torch.randn(layer.lora_B.shape, generator=generator) * 0.01
            layer.lora_B.data.copy_(fresh)
        ld.save_adapter(injection.adapter(), place)
        injection.remove()


def start(side: str, plan: Plan, prepared: Mapping[str, Any]) -> Worker:
    """Start a side in its own process."""
    given = {
        "model": prepared["model"],
        "adapters": prepared["adapters"],
        "batch": plan.batch,
        "past": plan.past,
        "new": plan.new,
    }
    bundles = prepared["bundles"]
    if side.startswith("genai"):
        given["bundle"] = bundles.get(side, bundles["slots"])
        given["native"] = f"{bundles['slots']}/adapters/a0.onnx_adapter"
        return Worker("tools.timing.genai_sides", side, given, python=str(genai_builder.PYTHON))
    if side in SIDES:
        return Worker("tools.bench_runtime", side, given)
    form, _, use = (side, "", "idle") if side in bundles else side.rpartition(" ")
    given.update(bundle=bundles[form], count=USES[use])
    return Worker("tools.bench_runtime", "onnx", given)


def measure(plan: Plan, prepared: Mapping[str, Any], **turns: int) -> Any:
    """Measure milliseconds of each side, ratios and control; `turns`: see `in_processes`."""
    console.print(f"{plan.name}, batch {plan.batch}: starting {', '.join(plan.sides)}")
    sides = (*plan.sides, plan.sides[0])
    taken = in_processes([partial(start, side, plan, prepared) for side in sides], **turns)
    by_name = dict(zip(plan.sides, taken, strict=False))

    def facts(found: Ratio) -> dict[str, float]:
        return {"median": found.median, "low": found.low, "high": found.high}

    return {
        "plan": plan.name,
        "batch": plan.batch,
        "milliseconds": {name: median(seconds) * 1e3 for name, seconds in by_name.items()},
        "ratios": {f"{a} / {b}": facts(ratio(by_name[a], by_name[b])) for a, b in plan.ratios},
        "control": {f"{plan.sides[0]} / itself": facts(ratio(taken[-1], taken[0]))},
    }


_MEMORY: Final = """
import sys, loradeploy as ld, onnxruntime
from loradeploy.runtime.timing import forward
options = None
if sys.argv[3] == "mapped":
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("loradeploy.map_weights", "1")
session = ld.AdapterSession(sys.argv[1], session_options=options)
forward(session, 1, past=128, new=1)(sys.argv[2] or None)
lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(*(int(lines[name].split()[0]) // 1024 for name in ("VmRSS", "VmHWM")))
"""


def memory(form: str, prepared: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return resident and peak memory in MB of processes that ran the bundle once.

    In one the weights were read into memory, in the other onnxruntime maps their file.
    """
    adapter = "" if form.startswith("merged") else "a0"
    found = {}
    for how in ("read", "mapped"):
        command = [sys.executable, "-c", _MEMORY, prepared["bundles"][form], adapter, how]
        resident, peak = subprocess.check_output(command, text=True).split()
        found[how] = {"resident": int(resident), "peak": int(peak)}
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """Return the results as tables."""
    lines = ["| what | batch | ratio | median | quartiles |", "|---|---|---|---|---|"]
    for result in report["results"]:
        for name, found in {**result["ratios"], **result["control"]}.items():
            spread = f"{found['low']:.2f}–{found['high']:.2f}"
            head = f"| {result['plan']} | {result['batch']} | {name} "
            lines.append(f"{head}| {found['median']:.2f} | {spread} |")
    lines += ["", "| bundle | weights | resident, MB | peak, MB |", "|---|---|---|---|"]
    for form, ways in report["memory"].items():
        for how, used in ways.items():
            lines.append(f"| {form} | {how} | {used['resident']} | {used['peak']} |")
    return "\n".join(lines) + "\n"


# The names of other engines' sides in docs/performance.md.
_NAMES: Final = {
    "torch_base": "PyTorch base",
    "peft_one": "PEFT, one",
    "peft_mixed": "PEFT, mixed",
    "genai_base": "onnxruntime-genai, base",
    "genai_one": "onnxruntime-genai, one",
    "genai_built": "genai, its own graph",
    "genai_lora": "genai LoRA",
}


def _named(side: str) -> str:
    """The name of a side in docs/performance.md: "slots, idle" for "slots4 idle".

    In int4, bundles in rows have branches by default.
    """
    form, _, use = side.replace("rows4", "branches").replace("4", "").rpartition(" ")
    return _NAMES.get(side) or (f"{form}, {use}" if form else use)


def draw(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the milliseconds of every side as bars, with a plot for each plan."""
    heights = [len(result["milliseconds"]) for result in results]
    size = (7, 0.28 * sum(heights) + 0.7 * len(results))
    grid = svg_axes(file, len(results), name="runtime", font_size=9, figsize=size, heights=heights)
    with grid as axes:
        for axis, result in zip(axes[:, 0], results, strict=True):
            bars(
                axis,
                f"{result['plan']}, batch {result['batch']}",
                {_named(side): value for side, value in result["milliseconds"].items()},
                others=_NAMES.values(),
                digits=1,
                padding=3,
                margin=0.1,
            )


if __name__ == "__main__" and not serve_worker(SIDES):
    main()
