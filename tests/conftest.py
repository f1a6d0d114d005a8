"""Fixtures shared by all tests: models, adapters and bundles, each created once per test run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from filelock import FileLock

from tests.devices import enable_swiftshader
from tests.inputs.adapters import random_adapter
from tests.inputs.tiny import make_tiny, make_tiny_whisper
from tests.traces import cached
from tools.inputs import real_models

ROOT = Path(__file__).parent.parent
MakeAdapter = Callable[..., Path]

# One in this many cases of a test marked breadth runs by default; the mark can change the number.
_ONE_IN = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--all`: run every parametrized case of every test."""
    parser.addoption("--all", action="store_true", help="run every case of tests marked breadth")


def pytest_configure() -> None:
    """Enable the software GPU before any test registers the WebGPU plugin."""
    enable_swiftshader()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect breadth cases (without --all), skip tests that need a GPU, run slow tests first."""
    if not config.getoption("--all"):
        _thin(config, items)
    # One worker starts with these, in a row: no other worker waits while the bundle is exported.
    items.sort(key=lambda item: "smollm2_bundle" not in getattr(item, "fixturenames", ()))
    on_gpu = [item for item in items if "gpu" in item.keywords]
    if on_gpu and not _cuda_works():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="CUDAExecutionProvider does not work here"))


def _thin(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one in N cases of each test marked breadth, the same cases in every run."""
    seen: dict[str, int] = {}
    left_out = []
    for item in items:
        mark = item.get_closest_marker("breadth")
        if mark is not None:
            test = item.nodeid.partition("[")[0]
            seen[test] = seen.get(test, -1) + 1
            if seen[test] % (mark.args[0] if mark.args else _ONE_IN):
                left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        dropped = set(left_out)
        items[:] = [item for item in items if item not in dropped]


def _cuda_works() -> bool:
    # The provider is listed wherever its package is installed; only a session shows that it works.
    import onnx
    import onnxruntime

    device = any(Path(name).exists() for name in ("/dev/nvidia0", "/dev/dxg"))
    if not device or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return False
    onnxruntime.preload_dlls()
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    opset = [onnx.helper.make_opsetid("", 21)]
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=opset)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    return "CUDAExecutionProvider" in session.get_providers()


def once(place: Path, make: Callable[[Path], object]) -> Path:
    """Return the directory `place`, complete: the first process creates it, the others wait."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.exists():
            partial = place.with_name(f"{place.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
            make(partial)
            partial.rename(place)
    return place


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory shared by all processes of this test run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    return shared / "shared"


@pytest.fixture(scope="session", autouse=True)
def traces(shared: Path) -> Iterator[None]:
    """Exports of equal tiny models reuse one trace; `tests.traces` defines what is equal."""
    from loradeploy.export import trace

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "trace", cached(trace.trace, shared / "traces"))
        yield


@pytest.fixture(scope="session", autouse=True)
def waiting_threads_sleep() -> Iterator[None]:
    """Turn off spinning of onnxruntime's idle threads: the test processes share the CPU cores."""
    import onnxruntime

    class Sleeping(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.add_session_config_entry("session.intra_op.allow_spinning", "0")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", Sleeping)
        yield


# -- real models and data ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, float32."""
    return real_models.smollm2()


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The MiniLM-L6 sentence encoder."""
    return real_models.minilm()


@pytest.fixture(scope="session")
def bbc() -> Path:
    """BBC News: a directory with one subdirectory per topic."""
    return real_models.bbc_news()


# -- tiny random models ------------------------------------------------------------------------


def _tiny(name: str, shared: Path, news: Path) -> Path:
    return once(shared / f"tiny-{name}", lambda place: make_tiny(name, place, news))


@pytest.fixture(scope="session")
def tiny_llama(shared: Path, bbc: Path) -> Path:
    """A two-layer Llama with random weights: grouped-query attention, untied head."""
    return _tiny("llama", shared, bbc)


@pytest.fixture(scope="session")
def tiny_gpt2(shared: Path, bbc: Path) -> Path:
    """A two-layer GPT-2 with random weights: Conv1D, learned positions, tied head."""
    return _tiny("gpt2", shared, bbc)


@pytest.fixture(scope="session")
def tiny_t5(shared: Path, bbc: Path) -> Path:
    """A T5 with one encoder and one decoder layer, random: relative positions, tied head."""
    return _tiny("t5", shared, bbc)


@pytest.fixture(scope="session")
def tiny_whisper(shared: Path, bbc: Path) -> Path:
    """A random Whisper with one-second windows, two languages, two tasks and timestamps."""
    return once(shared / "tiny-whisper", lambda place: make_tiny_whisper(place, bbc))


@pytest.fixture(scope="session")
def tiny_bert(shared: Path, bbc: Path) -> Path:
    """A two-layer BERT encoder with random weights and no classifier head."""
    return _tiny("bert", shared, bbc)


# -- adapters ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def make_adapter(shared: Path) -> MakeAdapter:
    """A function (model, *, r, seed, alpha, target_modules, …) → PEFT directory written by PEFT."""

    def make(model: Path, *, out: Path | None = None, **options: Any) -> Path:
        if out is not None:
            return random_adapter(model, out, **options)
        key = hashlib.sha256(repr((str(model), sorted(options.items()))).encode()).hexdigest()[:12]
        return once(
            shared / "adapters" / key, lambda place: random_adapter(model, place, **options)
        )

    return make


@pytest.fixture(scope="session")
def smollm2_adapters(smollm2: Path, shared: Path) -> dict[str, Path]:
    """Two random adapters for SmolLM2, rank 16 on all linear layers, with a clear effect."""
    return {
        name: once(
            shared / f"smollm2-{name}",
            lambda place, seed=seed: random_adapter(  # type: ignore[misc]
                smollm2, place, r=16, alpha=32, seed=seed, scale=0.01
            ),
        )
        for seed, name in enumerate(("first", "second"))
    }


@dataclass(frozen=True)
class Topics:
    """An adapter trained on MiniLM to classify news by topic, and held-out stories.

    `result`: the fields of the result of `train`. `held_out`: JSONL with `text` and `label`.
    """

    adapter: Path
    result: dict[str, Any]
    held_out: Path


def _learn_topics(minilm: Path, bbc: Path, place: Path) -> None:
    from dataclasses import asdict

    import loradeploy as ld
    from tools.inputs.news_tasks import stories

    place.mkdir()
    lines = [
        json.dumps({"text": " ".join(story.text.split()[:40]), "label": story.topic})
        for story in stories(bbc)
    ]
    for name, part in (("training", lines[:200]), ("held-out", lines[200:])):
        (place / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    result = ld.train(
        minilm,
        place / "training.jsonl",
        place / "topic",
        task="sequence-classification",
        max_steps=40,
        batch_size=8,
        rank=8,
        learning_rate=3e-3,
        validation_split=0.25,
    )
    (place / "result.json").write_text(json.dumps(asdict(result), default=str), encoding="utf-8")


@pytest.fixture(scope="session")
def topics_of_news(minilm: Path, bbc: Path, shared: Path) -> Topics:
    """MiniLM trained for 40 steps on the topics of 150 stories; 50 more are for validation."""
    place = once(shared / "topics", lambda partial: _learn_topics(minilm, bbc, partial))
    result = json.loads((place / "result.json").read_text(encoding="utf-8"))
    return Topics(place / "topic", result, place / "held-out.jsonl")


@pytest.fixture(scope="session")
def operator_library(shared: Path) -> Path:
    """The operators' library, built here; without a compiler, the test is skipped."""
    from loradeploy.errors import MissingDependencyError
    from loradeploy.runtime.operator.build import build_operator

    try:
        return once(shared / "operator" / "lora_add.so", build_operator)
    except MissingDependencyError as problem:
        pytest.skip(str(problem))


# -- bundles -----------------------------------------------------------------------------------


def _export(model: Path, place: Path, **options: Any) -> Path:
    from loradeploy.export.api import export

    return once(place, lambda partial: export(model, partial, **options))


@pytest.fixture(scope="session")
def tiny_llama_bundle(tiny_llama: Path, shared: Path) -> Path:
    """The tiny Llama exported with side inputs and without an adapter."""
    return _export(tiny_llama, shared / "bundle-llama")


@pytest.fixture(scope="session")
def tiny_gpt2_bundle(tiny_gpt2: Path, shared: Path) -> Path:
    """The tiny GPT-2 exported with side inputs and without an adapter."""
    return _export(tiny_gpt2, shared / "bundle-gpt2")


@pytest.fixture(scope="session")
def tiny_bert_bundle(tiny_bert: Path, shared: Path) -> Path:
    """The tiny BERT exported as a classifier with side inputs and without an adapter."""
    return _export(tiny_bert, shared / "bundle-bert", task="sequence-classification")


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2: Path) -> Path:
    """SmolLM2 with side inputs and no adapter, cached until the code that exports it changes."""
    made_by = hashlib.sha256()
    for package in ("adapter", "bundle", "export"):
        for file in sorted((ROOT / "loradeploy" / package).rglob("*.py")):
            made_by.update(file.read_bytes())
    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")
    }
    made_by.update(json.dumps(versions, sort_keys=True).encode())
    made_by.update(smollm2.name.encode())
    cache = real_models.cache() / "bundles"
    bundle = _export(smollm2, cache / f"smollm2-{made_by.hexdigest()[:12]}")
    bundle.touch()
    # Half a gigabyte each: keep this bundle and the two most recent ones before it.
    kept = [path for path in cache.glob("smollm2-*") if not path.suffix]
    for path in sorted(kept, key=lambda path: path.stat().st_mtime)[:-3]:
        shutil.rmtree(path, ignore_errors=True)
    return bundle


def generated_tokens(bundle: Path, tokens: int) -> int | None:
    """The `tokens` option of a parity check: `tokens` for a decoder, None for other tasks."""
    from loradeploy.bundle.manifest import read_manifest

    return tokens if read_manifest(bundle).task == "causal-lm" else None


def export_and_check(
    model: Path, place: Path, *, adapters: dict[str, Path], merge: bool = False, **options: Any
) -> Path:
    """Export to the directory `place` and check parity, which writes the certificate."""
    import loradeploy as ld

    def make(partial: Path) -> None:
        ld.export(model, partial, adapters=adapters, merge=merge, **options)
        prompts = ["The capital of", "Shares fell"]
        claimed = adapters if merge else None
        tokens = generated_tokens(partial, 3)
        report = ld.parity(partial, model=model, adapters=claimed, prompts=prompts, tokens=tokens)
        assert report.passed, report.failures

    return once(place, make)


@pytest.fixture(scope="session")
def tiny_llama_fp16_bundle(tiny_llama: Path, shared: Path) -> Path:
    """The tiny Llama exported in fp16."""
    import loradeploy as ld

    return once(shared / "bundle-llama-fp16", lambda p: ld.export(tiny_llama, p, precision="fp16"))


@pytest.fixture(scope="session")
def certified_bundle(tiny_llama: Path, shared: Path, make_adapter: MakeAdapter) -> Path:
    """A bundle of the tiny Llama with the adapter `one` and a parity certificate."""
    adapters = {"one": make_adapter(tiny_llama)}
    return export_and_check(tiny_llama, shared / "bundle-certified", adapters=adapters)


@pytest.fixture
def certified(certified_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `certified_bundle` that a test may modify."""
    return shutil.copytree(certified_bundle, tmp_path / "bundle")


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Three images of different sizes."""
    from tests.inputs.pictures import image_file

    return [image_file(tmp_path, number) for number in range(3)]


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU provider as one that can record runs and replay them (as CUDA graphs do)."""
    from loradeploy.runtime.devices import table

    row = replace(table.BY_FULL_NAME[table.CPU], recording={"records": "1"})
    monkeypatch.setitem(table.BY_FULL_NAME, table.CPU, row)


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each decode step of an engine take 50 ms.

    For tests that act on a request of 100 tokens before it ends, on a machine of any speed or load.
    """
    from loradeploy.runtime.engine.worker import Worker

    step = Worker._step

    def slow(worker: Worker) -> None:
        if worker._active:
            time.sleep(0.05)
        step(worker)

    monkeypatch.setattr(Worker, "_step", slow)
