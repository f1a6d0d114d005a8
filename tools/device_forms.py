"""Test every form of a bundle on every execution provider: whether it opens, and its numbers.

    python -m tools.device_forms [MODEL] [--provider NAME]… [--form NAME]… [--json]

Prints a row for each provider and form: the largest difference from the CPU's logits in the same
form (of 12 tokens, then six more with the cache), for the base, for one adapter and for a mixed
batch; the effect of the adapter; the nodes on other providers; whether the device can record the
runs; and the CPU seconds of the row. Rows of `cpu` are compared with its fp32 slots: they show the
error of a precision. MODEL is a decoder's directory [default: a Llama of two layers with random
weights]. Each row is a separate process, since a faulty kernel may crash it. On a machine without a
GPU, `cuda` is opened with stub libraries (tools.cuda_placement), which compute nothing: its rows
have the placement only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

import loradeploy as ld
from loradeploy.bundle.names import ATTENTION_MASK, INPUT_IDS, PAST, POSITION_IDS
from loradeploy.errors import LoraDeployError, kind_and_line
from loradeploy.runtime.devices.findings import has_nvidia_device, machine_root
from loradeploy.runtime.devices.providers import full_name
from loradeploy.runtime.devices.table import BY_NAME, CPU, known
from tools.cuda_placement import place, stubs
from tools.inputs.made_adapters import make_adapters
from tools.inputs.tiny_llama import random_llama

# The export options of each form. Forms in fp16 are exported from the checkpoint, those with `half`
# from fp16 slots, all others from fp32 slots.
FORMS: Final[Mapping[str, Mapping[str, Any]]] = {
    "fp32 slots": {"layout": "slots"},
    "fp32 rows": {"layout": "rows"},
    "fp32 branches": {"layout": "rows", "branches": True},
    "fp32 gqa rows": {"layout": "rows", "attention": "gqa"},
    "fp32 merged": {"merge": True},
    "fp16 slots": {"precision": "fp16", "layout": "slots"},
    "fp16 gqa rows": {"precision": "fp16", "layout": "rows", "attention": "gqa"},
    "bf16 slots": {"precision": "bf16"},
    "bf16 rows": {"precision": "bf16", "layout": "rows"},
    "int8 rows": {"precision": "int8", "layout": "rows", "branches": False},
    "int4 slots": {"precision": "int4", "layout": "slots", "branches": False},
    "int4 rows": {"precision": "int4", "layout": "rows", "branches": False},
    "int4 branches": {"precision": "int4", "layout": "rows"},
    "int4 fp16 gqa rows": {
        "half": True,
        "precision": "int4",
        "layout": "rows",
        "branches": False,
        "attention": "gqa",
    },
}
HALF: Final = "fp16 slots"
REFERENCE: Final = "fp32 slots"
DEFAULTS: Final = ("cpu", "webgpu", "cuda")
_PROMPT, _STEPS = 12, 6
_COLUMNS: Final = (
    *("provider", "form", "opens", "runs", "base", "adapter", "mixed", "effect"),
    *("off the device", "captured", "CPU s"),
)


def main() -> None:
    if sys.argv[1:] == ["--one"]:
        print(json.dumps(measured(**json.load(sys.stdin))))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "model", type=Path, nargs="?", metavar="MODEL", help="[default: a random Llama]"
    )
    parser.add_argument("--provider", action="append", help=f"[default: {', '.join(DEFAULTS)}]")
    parser.add_argument("--form", action="append", choices=FORMS, help="[default: all]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or random_llama(
            Path(scratch) / "model", hidden_size=64, intermediate_size=96, vocab_size=512
        )
        forms = arguments.form or list(FORMS)
        bundles, adapters = made(model, Path(scratch), forms)
        rows = [
            {"provider": provider, "form": form}
            | one(provider, bundles[form], bundles[REFERENCE], adapters)
            for provider in arguments.provider or DEFAULTS
            for form in forms
        ]
    print(json.dumps(rows, indent=2) if arguments.json else "\n".join(table(rows)))


def made(model: Path, output: Path, forms: Sequence[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Export the bundles of the forms and of the reference; return them, and two adapters."""
    bundles = {REFERENCE: output / "reference"}
    ld.export(model, bundles[REFERENCE])
    large = make_adapters(bundles[REFERENCE], output / "large", 1, rank=16)
    small = make_adapters(
        bundles[REFERENCE], output / "small", 1, rank=4, modules=("q_proj", "down_proj")
    )
    adapters = {"large": large["large0"], "small": small["small0"]}
    needed = [HALF] if any(FORMS[form].get("half") for form in forms) else []
    for form in dict.fromkeys([*needed, *forms]):
        if form == REFERENCE:
            continue
        options = dict(FORMS[form])
        half = options.pop("half", False)
        if options.get("merge"):
            options["adapters"] = {"large": adapters["large"]}
        source = model if options.get("precision") == "fp16" else bundles[REFERENCE]
        source = bundles[HALF] if half else source
        bundles[form] = output / form.replace(" ", "-")
        ld.export(source, bundles[form], **options)
    return bundles, adapters


def one(
    provider: str, bundle: Path, reference: Path, adapters: Mapping[str, str]
) -> dict[str, Any]:
    """Return a row: the results of `bundle` on `provider`, or how its process ended."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    on_stubs = full_name(provider) == BY_NAME["cuda"].full and not has_nvidia_device(machine_root())
    if on_stubs:
        environment["LD_LIBRARY_PATH"] = str(stubs())
    job = {
        "provider": provider,
        "bundle": os.fspath(bundle),
        "reference": os.fspath(reference),
        "adapters": adapters,
        "computes": not on_stubs,
    }
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "tools.device_forms", "--one"],
        input=json.dumps(job, default=str),
        text=True,
        capture_output=True,
        env=environment,
        check=False,
    )
    found: dict[str, Any]
    if done.returncode < 0:
        found = {"error": f"the process ended ({signal.Signals(-done.returncode).name})"}
    elif done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        found = {"error": lines[-1]}
    else:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    if on_stubs and "error" not in found:
        (placement,) = place([bundle / "model.onnx"])
        found |= {"captured": placement.refusal is None, "copies": placement.copies}
    after = os.times()
    spent = after.children_user + after.children_system
    found["cpu_s"] = round(spent - before.children_user - before.children_system, 1)
    return found


def measured(
    provider: str,
    bundle: str,
    reference: str,
    adapters: Mapping[str, str],
    computes: bool = True,
) -> dict[str, Any]:
    """Run `bundle` on `provider` in this process. `computes`: whether its numbers count."""
    found: dict[str, Any] = {"opens": False, "runs": False}
    try:
        device = ld.AdapterSession(bundle, [provider], check_device=False)
        found["opens"] = True
        own = device.providers[0]
        found["nodes"] = {name: sum(ops.values()) for name, ops in device.placement.items()}
        found["off_device"] = {n: ops for n, ops in device.placement.items() if n != own}
        compares_with = reference if full_name(provider) == CPU else bundle
        with ld.AdapterSession(compares_with) as host, ld.AdapterSession(reference) as plain:
            found |= compared(device, host, plain, adapters)
        if not computes:
            found = {name: found[name] for name in ("opens", "nodes", "off_device")}
        elif known(full_name(provider).partition(":")[0]).recording:
            found["captured"] = captures(bundle, provider)
    except LoraDeployError as problem:
        found["error"] = str(problem)
    except Exception as problem:  # an error of onnxruntime
        found["error"] = kind_and_line(problem)
    return found


def compared(
    device: ld.AdapterSession,
    host: ld.AdapterSession,
    reference: ld.AdapterSession,
    adapters: Mapping[str, str],
) -> dict[str, Any]:
    """Return the largest differences of `device` from `host`, and the first adapter's effect."""
    for session in (device, host, reference):
        for name, path in adapters.items() if session.manifest.mode != "merged" else ():
            session.load(name, path)
    first = next(iter(adapters))
    base, tokens = logits(reference, None)
    adapted, _ = logits(reference, first, tokens)
    sides: dict[str, Any] = {"adapter": first}
    if device.manifest.mode != "merged":
        sides |= {"base": None, "mixed": [None, *adapters]}
    found: dict[str, Any] = {"runs": True, "effect": float(np.abs(adapted - base).max())}
    for side, names in sides.items():
        here, there = (logits(session, names, tokens)[0] for session in (device, host))
        found[side] = float(np.abs(here - there).max())
    return found


def logits(
    session: ld.AdapterSession, adapters: Any, tokens: Any = None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return logits [rows, positions, vocabulary] of a prompt and of decode steps, and the tokens.

    `tokens` [positions]: the tokens that are fed; by default a random prompt and the tokens that
    the model generates. A merged graph ignores `adapters`.
    """
    if session.manifest.mode == "merged":
        adapters = None
    rows = len(adapters) if isinstance(adapters, list) else 1
    fed = np.random.default_rng(0).integers(3, 500, _PROMPT) if tokens is None else tokens
    cache = session.empty_cache(rows)
    cache.make_room(_PROMPT + _STEPS)
    inputs = {spec.name for spec in session.manifest.inputs if not spec.name.startswith(PAST)}
    found: list[np.ndarray[Any, Any]] = []
    with session.hold(adapters) as held:
        for begin, end in ((0, _PROMPT), *((n, n + 1) for n in range(_PROMPT, _PROMPT + _STEPS))):
            feeds: dict[str, Any] = {
                INPUT_IDS: np.tile(fed[begin:end], (rows, 1)),
                ATTENTION_MASK: np.ones((rows, end), np.int64),
                POSITION_IDS: np.tile(np.arange(begin, end), (rows, 1)),
            }
            given, *present = held.run_with_ort_values(
                ["logits", *cache.outputs],
                {**{n: v for n, v in feeds.items() if n in inputs}, **cache.inputs},
                buffers=cache.buffers,
            )
            cache.keep(present)
            found.append(given.numpy().astype(np.float64))
            if tokens is None:
                fed = np.append(fed, found[-1][0, -1].argmax())
    return np.concatenate(found, axis=1), fed[: _PROMPT + _STEPS]


def captures(bundle: str, provider: str) -> bool:
    """Whether a session that captures runs can be opened."""
    try:
        ld.AdapterSession(bundle, [provider], check_device=False, capture_graphs=True).close()
    except LoraDeployError:
        return False
    return True


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the rows as a table in Markdown, followed by the errors."""
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    errors: dict[str, list[str]] = {}
    for row in rows:
        off = sum(sum(ops.values()) for ops in row.get("off_device", {}).values())
        total = sum(row.get("nodes", {}).values())
        cells = [
            *(row["provider"], row["form"], _yes(row.get("opens")), _yes(row.get("runs"), none="")),
            *(_figure(row.get(name)) for name in ("base", "adapter", "mixed", "effect")),
            f"{off} of {total}" if total else "",
            *(_yes(row.get("captured"), none=""), f"{row['cpu_s']:.0f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if "error" in row:
            errors.setdefault(row["error"], []).append(f"{row['provider']} {row['form']}")
    return [*lines, "", *(f"{', '.join(where)}: {error}" for error, where in errors.items())]


def _yes(value: bool | None, *, none: str = "no") -> str:
    return none if value is None else "yes" if value else "no"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if 0 < value < 0.1 else f"{value:.2g}"


if __name__ == "__main__":
    main()
