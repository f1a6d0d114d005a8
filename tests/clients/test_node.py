"""A program in Node gives what the runtime gives, told by the adapter's effect."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from loradeploy.adapter.tensors import read_arrays
from loradeploy.errors import BundleError, UsageError
from loradeploy.export.api import export
from loradeploy.export.graph.file import load_graph
from loradeploy.runtime.session import AdapterSession
from tests.conftest import ROOT, MakeAdapter
from tests.runtime.feeds import logits
from tests.tolerances import tolerance

IDS = np.array([[5, 6, 7, 8, 9]])
EXAMPLE = ROOT / "examples" / "clients" / "node"


@pytest.fixture(scope="session")
def node() -> Path:
    """The example with its package installed, where Node and a package registry are at hand."""
    place = ROOT / "build" / "node"
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    place.mkdir(parents=True, exist_ok=True)
    for file in EXAMPLE.iterdir():
        if file.is_file():
            shutil.copyfile(file, place / file.name)
    if not (place / "node_modules" / "onnxruntime-node").exists():
        # The package has the CPU's library in it; its script would fetch one for GPUs.
        command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund"]
        try:
            subprocess.run(command, cwd=place, check=True, capture_output=True, timeout=120)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            pytest.skip("onnxruntime-node could not be installed")
    return place


@pytest.mark.parametrize(
    "options",
    [{}, {"layout": "rows"}, {"layout": "rows", "branches": True}, {"precision": "int4"}],
    ids=["slots", "rows", "branches", "int4"],
)
def test_node_has_the_effect_of_every_adapter(
    node: Path,
    tiny_llama_bundle: Path,
    tiny_llama: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    options: dict[str, object],
) -> None:
    adapters = {
        "all": make_adapter(tiny_llama, r=4, seed=5, scale=0.3),
        "few": make_adapter(tiny_llama, r=2, seed=6, scale=0.3, target_modules=["q_proj"]),
    }
    bundle = tmp_path / "bundle"
    export(tiny_llama_bundle, bundle, adapters=adapters, required_inputs=True, **options)  # type: ignore[arg-type]
    done = subprocess.run(
        ["node", "main.mjs", bundle, ",".join(map(str, IDS[0]))],
        cwd=node,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    theirs = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    session = AdapterSession(bundle)
    base = logits(session, IDS)[0, -1]
    for name in ("base", *adapters):
        ours = logits(session, IDS, None if name == "base" else name)[0, -1]
        assert theirs[name]["token"] == ours.argmax()
        assert abs(theirs[name]["distance"] - np.abs(ours - base).max()) < tolerance("rows")
    assert min(theirs[name]["distance"] for name in adapters) > 0.01


def test_node_is_told_what_bundle_it_needs(node: Path, tiny_llama_bundle: Path) -> None:
    command = ["node", "main.mjs", tiny_llama_bundle, "5,6"]
    done = subprocess.run(command, cwd=node, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "export --required-inputs" in done.stderr


def test_the_required_graph_has_no_defaults_and_no_weights_of_its_own(
    tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    export(tiny_llama_bundle, tmp_path / "b", required_inputs=True)
    graph = load_graph(tmp_path / "b" / "required.onnx").graph
    assert not any(value.is_initializer() for value in graph.inputs)
    fed, _ = read_arrays(tmp_path / "b" / "required.safetensors", error=BundleError)
    plain = load_graph(tmp_path / "b" / "model.onnx").graph
    assert set(fed) == {str(v.name) for v in plain.inputs if v.is_initializer()}
    assert [v.name for v in graph.inputs] == [v.name for v in plain.inputs]
    sizes = [
        (tmp_path / "b" / name).stat().st_size for name in ("required.onnx", "model.onnx.data")
    ]
    assert sizes[0] < sizes[1]


def test_a_merged_graph_has_nothing_to_require(
    tiny_llama_bundle: Path, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="`required_inputs` and `merge` do not go together"):
        export(
            tiny_llama_bundle,
            tmp_path / "b",
            adapters=[make_adapter(tiny_llama)],
            merge=True,
            required_inputs=True,
        )
