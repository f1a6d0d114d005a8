"""Decode of one token on SmolLM2-135M: PyTorch, PEFT, and every path of loradeploy, in one run.

    python -m tools.bench_runtime [--rounds 12] [--output build/bench]

Writes runtime.json and runtime.md. How it is timed is in `tools/alternate.py`: a process for each
side, turns in random order, ratios within a round, one side twice as the control.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

import loradeploy as ld
from loradeploy.files import atomic_file, write_json
from loradeploy.runtime.timing import sample_feeds
from tools.alternate import Ratio, Side, Worker, alternate, ratio, serve_worker
from tools.real_models import cache, smollm2

RANK = 16
ADAPTERS = 8
PAST = 128
console = Console(stderr=True)


# -- the sides: each is made in a process of its own -------------------------------------------


def torch_base(model: str, batch: int, **_: Any) -> Side:
    return _torch_call(_torch_model(model), batch)


def peft_one(model: str, adapters: Sequence[str], batch: int, **_: Any) -> Side:
    return _torch_call(_peft_model(model, adapters[:1]), batch)


def peft_mixed(model: str, adapters: Sequence[str], batch: int, **_: Any) -> Side:
    names = [f"a{row % len(adapters)}" for row in range(batch)]
    return _torch_call(_peft_model(model, adapters), batch, adapter_names=names)


def onnx_merged(merged: str, batch: int, **_: Any) -> Side:
    return _session_call(ld.AdapterSession(merged), batch, None)


def side_base(bundle: str, batch: int, **_: Any) -> Side:
    return _session_call(ld.AdapterSession(bundle), batch, None)


def side_one(bundle: str, adapters: Sequence[str], batch: int, **_: Any) -> Side:
    session = ld.AdapterSession(bundle)
    session.load("a0", adapters[0])
    return _session_call(session, batch, "a0")


def side_mixed(bundle: str, adapters: Sequence[str], batch: int, **_: Any) -> Side:
    session = ld.AdapterSession(bundle)
    for number, place in enumerate(adapters):
        session.load(f"a{number}", place)
    return _session_call(session, batch, [f"a{row % len(adapters)}" for row in range(batch)])


SIDES: dict[str, Callable[..., Side]] = {
    side.__name__: side
    for side in (
        torch_base,
        peft_one,
        peft_mixed,
        onnx_merged,
        side_base,
        side_one,
        side_mixed,
    )
}

# Batch, sides (the first of which runs twice), and the ratios that are reported.
PLANS: tuple[tuple[int, tuple[str, ...], tuple[tuple[str, str], ...]], ...] = (
    (
        1,
        ("onnx_merged", "side_base", "side_one", "torch_base", "peft_one"),
        (
            ("torch_base", "onnx_merged"),
            ("peft_one", "side_one"),
            ("side_base", "onnx_merged"),
            ("side_one", "onnx_merged"),
        ),
    ),
    (
        8,
        ("onnx_merged", "side_base", "side_one", "side_mixed", "torch_base", "peft_mixed"),
        (
            ("torch_base", "onnx_merged"),
            ("peft_mixed", "side_mixed"),
            ("side_base", "onnx_merged"),
            ("side_one", "onnx_merged"),
            ("side_mixed", "onnx_merged"),
        ),
    ),
)


def _torch_model(model: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


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


def _session_call(session: ld.AdapterSession, batch: int, adapters: Any) -> Side:
    import onnxruntime

    feeds = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(values)
        for name, values in sample_feeds(session, batch, PAST).items()
    }
    outputs = [spec.name for spec in session.manifest.outputs]
    return lambda: session.run_with_ort_values(outputs, feeds, adapters)


# -- the run -----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--calls", type=int, default=5, help="calls of a side in a round")
    arguments = parser.parse_args()

    prepared = prepare()
    results = [measure(plan, prepared, arguments.rounds, arguments.calls) for plan in PLANS]
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "rank": RANK, "past": PAST}
    report = {"machine": machine, "rounds": arguments.rounds, "results": results}
    write_json(arguments.output / "runtime.json", report)
    with atomic_file(arguments.output / "runtime.md") as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


def prepare() -> dict[str, Any]:
    """The base, eight random adapters of rank 16 on all linear layers, and both bundles."""
    model, place = smollm2(), cache() / "bench"
    adapters = [place / f"adapter-{number}" for number in range(ADAPTERS)]
    if not adapters[-1].exists():
        console.print("making eight random adapters")
        _random_adapters(model, adapters)
    bundle, merged = place / "bundle", place / "merged"
    console.print("exporting with side inputs, then merging")
    begin = time.perf_counter()
    ld.export(model, bundle)
    exported = time.perf_counter()
    ld.export(bundle, merged, adapters={"a0": adapters[0]}, merge=True)
    console.print(
        f"exported in {exported - begin:.1f} s, merged in {time.perf_counter() - exported:.1f} s"
    )
    return {
        "model": str(model),
        "adapters": [str(adapter) for adapter in adapters],
        "bundle": str(bundle),
        "merged": str(merged),
    }


def _random_adapters(model: Path, places: Sequence[Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from loradeploy.adapter import AdapterConfig
    from loradeploy.lora.inject import inject

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for seed, place in enumerate(places):
        config = AdapterConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        injection = inject(base, config, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for layer in injection.layers.values():
            fresh = torch.randn(layer.lora_B.shape, generator=generator) * 0.01
            layer.lora_B.data.copy_(fresh)
        ld.save_adapter(injection.adapter(), place)
        injection.remove()


def measure(plan: tuple[int, Any, Any], prepared: dict[str, Any], rounds: int, calls: int) -> Any:
    """Milliseconds of each side, the ratios, and the control, at one batch size."""
    batch, names, pairs = plan
    console.print(f"batch {batch}: starting {', '.join(names)}")
    given = {**prepared, "batch": batch}
    workers = [Worker("tools.bench_runtime", name, given) for name in (*names, names[0])]
    try:
        taken = alternate(workers, rounds=rounds, calls=calls)
    finally:
        for worker in workers:
            worker.close()
    by_name = dict(zip(names, taken, strict=False))

    def facts(found: Ratio) -> dict[str, float]:
        return {"median": found.median, "low": found.low, "high": found.high}

    return {
        "batch": batch,
        "milliseconds": {name: median(seconds) * 1e3 for name, seconds in by_name.items()},
        "ratios": {f"{a} / {b}": facts(ratio(by_name[a], by_name[b])) for a, b in pairs},
        "control": {f"{names[0]} / itself": facts(ratio(taken[-1], taken[0]))},
    }


def markdown(results: Sequence[Any]) -> str:
    """The results as a table."""
    lines = ["| batch | ratio | median | quartiles |", "|---|---|---|---|"]
    for result in results:
        for name, found in {**result["ratios"], **result["control"]}.items():
            spread = f"{found['low']:.2f}–{found['high']:.2f}"
            lines.append(f"| {result['batch']} | {name} | {found['median']:.2f} | {spread} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__" and not serve_worker(SIDES):
    main()
