"""Bundles for clients that feed all inputs, and the JavaScript examples with their packages."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loradeploy.export.api import export
from tests.conftest import ROOT, MakeAdapter, once
from tests.devices import unavailable

CLIENTS = ROOT / "examples" / "clients"
# The forms of a graph that clients must distinguish, with the options of the export.
FORMS: dict[str, dict[str, Any]] = {
    "slots": {"layout": "slots"},
    "rows": {},
    "branches": {"branches": True},
    "int4": {"precision": "int4"},
    "gqa": {"attention": "gqa"},
    "fp16": {"precision": "fp16"},
}
Required = Callable[[str], Path]
Jobs = list[dict[str, Any]]
Node = Callable[[Jobs], list[Any]]


@pytest.fixture(scope="session")
def client_adapters(tiny_llama: Path, make_adapter: MakeAdapter, shared: Path) -> dict[str, Path]:
    """Two adapters for the tiny Llama: rank 4 on all linear layers, and rank 2 on some.

    The second has its own chat template, end tokens and generation settings.
    """
    few = make_adapter(tiny_llama, r=2, seed=6, scale=0.3, target_modules=["q_proj"])

    def with_texts(place: Path) -> None:
        shutil.copytree(few, place)
        template = "{% for m in messages %}[{{ m.content | upper }}]{% endfor %}{{ eos_token }}"
        (place / "chat_template.jinja").write_text(template)
        settings = {"eos_token_id": list(range(3, 100)), "repetition_penalty": 1.3}
        (place / "generation_config.json").write_text(json.dumps(settings))

    return {
        "all": make_adapter(tiny_llama, r=4, seed=5, scale=0.3),
        "few": once(shared / "client-adapters" / "few", with_texts),
    }


@pytest.fixture(scope="session")
def required(
    tiny_llama: Path, tiny_llama_bundle: Path, client_adapters: dict[str, Path], shared: Path
) -> Required:
    """A function: form → the tiny Llama's bundle with required inputs and the adapters."""

    def made(form: str) -> Path:
        return once(
            shared / f"required-{form}",
            lambda place: export(
                tiny_llama if form == "fp16" else tiny_llama_bundle,  # fp16 needs the checkpoint
                place,
                adapters=client_adapters,
                required_inputs=True,
                **FORMS[form],
            ),
        )

    return made


@pytest.fixture(scope="session")
def javascript(shared: Path) -> Path:
    """The examples `web` and `clients/{js,node}` with the packages of the lock file in `js`."""
    npm = shutil.which("npm")
    for program, found in (("node", shutil.which("node")), ("npm", npm)):
        if found is None:
            unavailable(f"{program} is not installed, which the tests of JavaScript need")
    lock = CLIENTS / "js" / "package-lock.json"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()[:12]

    def install(place: Path) -> None:
        place.mkdir()
        for file in (lock, CLIENTS / "js" / "package.json"):
            shutil.copyfile(file, place / file.name)
        # The packages include the CPU library; the install script would download one for GPUs.
        command = [str(npm), "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run(command, cwd=place, check=True, capture_output=True, timeout=300)

    try:
        installed = once(ROOT / "build" / f"npm-{digest}", install) / "node_modules"
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as problem:
        unavailable(f"the packages of npm could not be installed: {problem}")

    def copy(place: Path) -> None:
        ignored = shutil.ignore_patterns("node_modules", "bundle")
        for name in ("web", "clients/js", "clients/node"):
            shutil.copytree(ROOT / "examples" / name, place / name, ignore=ignored)
        for name in ("clients/js", "clients"):
            (place / name / "node_modules").symlink_to(installed)

    return once(shared / "javascript", copy)


@pytest.fixture(scope="session")
def node(javascript: Path) -> Node:
    """A function that runs jobs (js/jobs.mjs) in the Node client."""

    def run(jobs: Jobs) -> list[Any]:
        client = javascript / "clients" / "js" / "index.js"
        done = subprocess.run(
            ["node", ROOT / "tests" / "clients" / "js" / "node.mjs", client],
            input=json.dumps(jobs, default=str),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        results: list[Any] = json.loads(done.stdout)
        return results

    return run
