"""WebGPU on a software GPU: one separate process runs all cases for all tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loradeploy.export.api import export
from loradeploy.runtime.devices.table import SOFTWARE_ADAPTER
from tests.conftest import ROOT, MakeAdapter, once
from tests.devices import DRIVER, swiftshader
from tests.runtime.devices.recordable import make_recordable


def run(command: list[str], *, environment: dict[str, str], **options: Any) -> Any:
    """Run a Python process with the repository on its path."""
    unset = (DRIVER, SOFTWARE_ADAPTER)
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=500,
        **options,
    )


@pytest.fixture(scope="session")
def webgpu(
    shared: Path,
    tiny_llama: Path,
    tiny_bert: Path,
    tiny_llama_bundle: Path,
    tiny_bert_bundle: Path,
    in_place: Path,
    make_adapter: MakeAdapter,
    llama_adapters: dict[str, Path],
    bert_adapters: dict[str, Path],
) -> dict[str, Any]:
    """The results of `measure` by case; `status` is the exit status of its process."""
    environment = swiftshader()

    def make(place: Path) -> None:
        place.mkdir()
        bundles = {"rows": tiny_llama_bundle, "bert": tiny_bert_bundle, "in place": in_place}
        export(in_place, place / "all logits", logits_to_keep=False)
        bundles["recordable"] = make_recordable(place / "all logits", place / "recordable")
        forms: dict[str, dict[str, Any]] = {
            "slots": {"layout": "slots"},
            "branches": {"branches": True},
            "gqa": {"attention": "gqa"},
            "dora": {"side_inputs": ["dora"]},
        }
        for name, options in forms.items():
            export(tiny_llama_bundle, place / name, **options)
            bundles[name] = place / name
        adapters = {
            **llama_adapters,
            "dora": make_adapter(tiny_llama, r=4, seed=3, use_dora=True),
            **{f"bert {name}": path for name, path in bert_adapters.items()},
        }
        job = json.dumps({"bundles": bundles, "adapters": adapters}, default=str)
        results = place / "results.jsonl"
        done = run(
            ["-m", "tests.runtime.devices.measure", str(results)],
            environment=environment,
            input=job,
        )
        found = {"status": done.returncode, "errors": done.stderr[-2000:]}
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")

    results = once(shared / "webgpu", make) / "results.jsonl"
    found: dict[str, Any] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        found |= json.loads(line)
    return found
