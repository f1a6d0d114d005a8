"""The Node example computes the same logits as the runtime, with and without adapters."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from loradeploy.adapter.files.tensors import read_arrays
from loradeploy.bundle.names import LOGITS_TO_KEEP
from loradeploy.errors import BundleError, UsageError
from loradeploy.export.api import export
from loradeploy.export.graph.file import load_graph
from loradeploy.runtime.session import AdapterSession
from tests.clients.conftest import FORMS, Required
from tests.conftest import MakeAdapter
from tests.runtime.feeds import logits
from tests.tolerances import tolerance

IDS = np.array([[5, 6, 7, 8, 9]])


def run(javascript: Path, *words: object) -> subprocess.CompletedProcess[str]:
    place = javascript / "clients" / "node"
    command = ["node", "main.mjs", *map(str, words)]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("form", FORMS)
def test_node_computes_the_same_as_the_runtime_with_every_adapter(
    javascript: Path, required: Required, form: str
) -> None:
    bundle = required(form)
    done = run(javascript, bundle, ",".join(map(str, IDS[0])))
    assert done.returncode == 0, done.stderr
    theirs = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    session = AdapterSession(bundle)
    base = logits(session, IDS)[0, -1].astype(np.float32)
    half = tolerance("fp16-rounding") * np.abs(base).max()
    limit = half if form == "fp16" else tolerance("rows")
    assert set(theirs) == {"base", "all", "few"}
    for name, line in theirs.items():
        ours = logits(session, IDS, None if name == "base" else name)[0, -1].astype(np.float32)
        assert line["token"] == ours.argmax()
        assert abs(line["distance"] - np.abs(ours - base).max()) < limit
    assert min(theirs[name]["distance"] for name in ("all", "few")) > 10 * limit


def test_node_refuses_a_bundle_without_required_inputs_with_advice(
    javascript: Path, tiny_llama_bundle: Path
) -> None:
    done = run(javascript, tiny_llama_bundle, "5,6")
    assert done.returncode == 2
    assert "export --required-inputs" in done.stderr


def test_node_refuses_tokens_that_are_not_numbers_from_0(
    javascript: Path, required: Required
) -> None:
    for tokens in ("5,x", "-5", ""):
        done = run(javascript, required("rows"), tokens)
        assert done.returncode == 2
        assert "tokens as 5,6,7" in done.stderr


def test_the_required_graph_has_no_defaults_and_no_weights_of_its_own(
    required: Required,
) -> None:
    bundle = required("slots")
    graph = load_graph(bundle / "required.onnx").graph
    assert not any(value.is_initializer() for value in graph.inputs)
    fed, _ = read_arrays(bundle / "required.safetensors", error=BundleError)
    plain = load_graph(bundle / "model.onnx").graph
    # Clients give every input, so it has no input that selects positions.
    inputs = [value for value in plain.inputs if value.name != LOGITS_TO_KEEP]
    assert set(fed) == {str(v.name) for v in inputs if v.is_initializer()}
    assert [v.name for v in graph.inputs] == [v.name for v in inputs]
    sizes = [(bundle / name).stat().st_size for name in ("required.onnx", "model.onnx.data")]
    assert sizes[0] < sizes[1]


def test_required_inputs_are_refused_for_a_merged_graph(
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
