"""Backends of the user's own, held against PyTorch on the way that the bundle's go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import loradeploy as ld
from loradeploy.cli.main import main
from loradeploy.errors import LoraDeployError, ModelError, UsageError
from loradeploy.parity.report import ParityReport, Result
from tests.conftest import MakeAdapter
from tests.parity.graphs import token_model

PROMPTS = ["The capital of France is", "Hi", "Shares fell as 日本"]
Feeds = dict[str, NDArray[Any]]
Function = Callable[[Feeds], Any]
CACHED, WHOLE = ["prefill", "padded batch", "decode"], ["prefill", "padded batch"]


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, make_adapter: MakeAdapter) -> Path:
    return make_adapter(tiny_llama, seed=1)


@pytest.fixture(scope="module")
def bundle(
    tiny_llama_bundle: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    place = tmp_path_factory.mktemp("others") / "bundle"
    ld.export(tiny_llama_bundle, place, adapters={"one": adapter})
    return place


@pytest.fixture(scope="module")
def merged(bundle: Path, adapter: Path) -> Path:
    ld.export(bundle, bundle.parent / "merged", adapters={"one": adapter}, merge=True)
    return bundle.parent / "merged"


@pytest.fixture
def check(bundle: Path, tiny_llama: Path) -> Callable[..., ParityReport]:
    """`loradeploy.parity` with some others and one backend that is quick."""

    def run(others: Any, place: Path = bundle, **options: Any) -> ParityReport:
        given = {"prompts": PROMPTS, "tokens": 4, "certificate": False, **options}
        first = "onnx-side-inputs" if place == bundle else "onnx-merged"
        return ld.parity(place, model=tiny_llama, others=others, backends=[first], **given)

    return run


@pytest.fixture
def session(bundle: Path) -> Function:
    """The bundle as somebody's function: the base of it."""
    runtime = ld.AdapterSession(bundle)
    names = [spec.name for spec in runtime.manifest.outputs]
    return lambda feeds: dict(zip(names, runtime.run(names, feeds), strict=True))


def own(report: ParityReport) -> list[Result]:
    return [result for result in report.results if result.backend.startswith("other:")]


def messages(report: ParityReport) -> set[str | None]:
    return {result.message for result in own(report)}


# -- what agrees -------------------------------------------------------------------------------


def test_an_onnx_file_is_shown_every_phase(
    bundle: Path, merged: Path, check: Callable[..., ParityReport]
) -> None:
    report = check({"base": bundle / "model.onnx", "fused": (merged / "model.onnx", "one")})
    assert report.passed, report.failures
    seen = {(r.title, r.adapter, r.phase) for r in own(report)}
    assert seen == {("base", None, p) for p in CACHED} | {("fused", "one", p) for p in CACHED}


def test_an_onnx_file_stands_for_what_a_merged_bundle_holds(
    merged: Path, check: Callable[..., ParityReport], adapter: Path
) -> None:
    report = check([f"{merged}/model.onnx"], place=merged, adapters={"one": adapter})
    assert report.passed, report.failures
    assert {r.adapter for r in own(report)} == {"one"}


def test_a_function_that_keeps_a_cache_decodes(
    session: Function, check: Callable[..., ParityReport]
) -> None:
    report = check({"mine": session})
    assert report.passed, report.failures
    assert [r.phase for r in own(report)] == CACHED


def test_a_function_without_a_cache_is_shown_whole_prompts(
    session: Function, bundle: Path, check: Callable[..., ParityReport]
) -> None:
    manifest = ld.AdapterSession(bundle).manifest
    empty = {s.name: (s.shape[1], s.shape[3]) for s in manifest.inputs if "past" in s.name}

    def whole(feeds: Feeds) -> Any:
        assert not any(name.startswith("past") for name in feeds)
        rows = len(feeds["input_ids"])
        past = {n: np.zeros((rows, h, 0, d), np.float32) for n, (h, d) in empty.items()}
        return session({**feeds, **past})["logits"]

    report = check({"mine": whole})
    assert report.passed, report.failures
    assert [(r.title, r.phase) for r in own(report)] == [("mine (no cache)", p) for p in WHOLE]


def test_a_pytorch_model_is_one_too(tiny_llama: Path, check: Callable[..., ParityReport]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    report = check({"transformers": model})
    assert report.passed, report.failures
    assert [r.phase for r in own(report)] == CACHED


# -- what does not -----------------------------------------------------------------------------


def test_a_claim_that_is_not_so_fails(bundle: Path, check: Callable[..., ParityReport]) -> None:
    report = check([f"wrong={bundle}/model.onnx@one"])
    assert {r.outcome for r in own(report)} == {"failed"}
    assert {r.adapter for r in own(report)} == {"one"}


def broken(spoil: Callable[[Feeds, Any], Any], session: Function) -> Function:
    return lambda feeds: spoil(feeds, session(feeds))


def raising(feeds: Feeds, given: Any) -> Any:
    raise KeyError("no such layer")


def leaving(feeds: Feeds, given: Any) -> Any:
    raise SystemExit(0)


BROKEN: dict[str, tuple[Callable[[Feeds, Any], Any], str]] = {
    "raises": (raising, "KeyError: 'no such layer'"),
    "leaves": (leaving, "it called sys.exit(0)"),
    "gives no logits": (lambda _, g: {**g, "logits": None}, "it does not give logits"),
    "gives too few": (lambda _, g: [g["logits"]] * 2, "2 outputs without names, not 1: logits"),
    "another vocabulary": (
        lambda _, g: {**g, "logits": g["logits"][..., :-1]},
        "for 1 rows, the bundle's is [batch, sequence, 512]",
    ),
    "too few positions": (
        lambda _, g: {**g, "logits": g["logits"][:, :-1]},
        "it gave less than all positions",
    ),
    "NaN": (lambda _, g: {**g, "logits": g["logits"] * np.nan}, "hold NaN"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_function_that_is_broken_fails_and_says_how(
    how: str, session: Function, check: Callable[..., ParityReport]
) -> None:
    spoil, said = BROKEN[how]
    report = check({"mine": broken(spoil, session)})
    results = own(report)
    assert results
    assert {r.outcome for r in results} == {"failed"}
    assert said in str(results[0].message)
    assert {r.outcome for r in report.results if r not in results} == {"passed"}


REFUSED: dict[str, tuple[Callable[[Path, Path], Any], type[LoraDeployError], str]] = {
    "no file": (lambda b, t: ["no.onnx"], UsageError, "does not exist"),
    "no function": (lambda b, t: ["x=json:nothing"], UsageError, "json has no nothing"),
    "no ONNX": (lambda b, t: [f"{t}/broken.onnx"], ModelError, "cannot open"),
    "no such adapter": (
        lambda b, t: [f"{b}/model.onnx@two"],
        UsageError,
        "no adapter 'two' is in the bundle or given, there are: one",
    ),
    "one name for two": (
        lambda b, t: [f"x={b}/model.onnx", f"x={b}"],
        UsageError,
        "two backends are named 'x'",
    ),
    "other inputs": (
        lambda b, t: [token_model(t / "t.onnx", names=("tokens", "logits"))],
        UsageError,
        "takes tokens, which a check of this bundle does not feed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_runs(
    case: str, bundle: Path, tmp_path: Path, check: Callable[..., ParityReport]
) -> None:
    (tmp_path / "broken.onnx").write_text("x")
    given, error, said = REFUSED[case]
    with pytest.raises(error, match=said):
        check([str(other) for other in given(bundle, tmp_path)])


def test_the_command_takes_others(
    bundle: Path, merged: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", tiny_llama, "--tokens", 2, "--backends", "onnx-side-inputs"]
    given += ["--other", f"fused={merged}/model.onnx@one"]
    for more, code in (([], 0), (["--other", f"{merged}/model.onnx"], 1)):
        with pytest.raises(SystemExit) as ended:
            main(["parity", *map(str, (bundle, *given, *more))])
        out = capsys.readouterr().out
        assert ended.value.code == code, out
        assert "fused" in out
