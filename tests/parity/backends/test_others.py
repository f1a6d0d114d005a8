"""User-defined backends (`others`), compared with PyTorch like the backends of the bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import loradeploy as ld
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import LoraDeployError, ModelError, UsageError
from loradeploy.parity.backends.others import other_backends
from loradeploy.parity.report.results import ParityReport, Result
from tests.cli.calling import exit_status
from tests.conftest import MakeAdapter
from tests.parity.conftest import CPU, CUDA, without_cuda
from tests.parity.graphs import token_model

PROMPTS = ["The capital of France is", "Hi", "Shares fell as 日本"]
Feeds = dict[str, NDArray[Any]]
Function = Callable[[Feeds], Any]
CACHED = ["prefill", "chunked prefill", "padded batch", "permuted batch", "decode", "repeat"]
WHOLE = ["prefill", "padded batch", "permuted batch", "repeat"]


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


@pytest.fixture(scope="module")
def check(bundle: Path, tiny_llama: Path) -> Callable[..., ParityReport]:
    """A function that runs `loradeploy.parity` with `others` and one fast backend."""

    def run(others: Any, place: Path = bundle, **options: Any) -> ParityReport:
        given = {"prompts": PROMPTS, "tokens": 4, "certificate": False, **options}
        first = "onnx-side-inputs" if place == bundle else "onnx-merged"
        return ld.parity(place, model=tiny_llama, others=others, backends=[first], **given)

    return run


@pytest.fixture(scope="module")
def session(bundle: Path) -> Function:
    """The base model of the bundle as a user's function, with a cache."""
    runtime = ld.AdapterSession(bundle)
    names = [spec.name for spec in runtime.manifest.outputs]
    return lambda feeds: dict(zip(names, runtime.run(names, feeds), strict=True))


@pytest.fixture(scope="module")
def whole(bundle: Path, session: Function) -> Function:
    """The same without a cache: it takes ids and mask and returns logits."""
    manifest = ld.AdapterSession(bundle).manifest
    empty = {s.name: (s.shape[1], s.shape[3]) for s in manifest.inputs if "past" in s.name}

    def run(feeds: Feeds) -> Any:
        if unknown := [name for name in feeds if name.startswith("past")]:
            raise TypeError(f"{unknown} are no inputs of mine")
        rows = len(feeds["input_ids"])
        past = {n: np.zeros((rows, h, 0, d), np.float32) for n, (h, d) in empty.items()}
        return session({**feeds, **past})["logits"]

    return run


def results_of(report: ParityReport, title: str) -> list[Result]:
    return [result for result in report.results if result.backend == f"other:{title}"]


# -- what agrees -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def agreeing(
    check: Callable[..., ParityReport],
    bundle: Path,
    merged: Path,
    session: Function,
    whole: Function,
    tiny_llama: Path,
) -> ParityReport:
    """One check of several correct functions."""
    from transformers import AutoModelForCausalLM

    return check(
        {
            "base": bundle / "model.onnx",
            "fused": (merged / "model.onnx", "one"),
            "cached": session,
            "in order": lambda feeds: list(session(feeds).values()),
            "whole": whole,
            "transformers": AutoModelForCausalLM.from_pretrained(tiny_llama).eval(),
        }
    )


def test_functions_and_models_of_all_kinds_agree(agreeing: ParityReport) -> None:
    assert agreeing.passed, agreeing.failures


@pytest.mark.parametrize(
    ("title", "claim", "phases"),
    [
        ("base", None, CACHED),
        ("fused", "one", CACHED),
        ("cached", None, CACHED),
        ("in order", None, CACHED),
        ("whole", None, WHOLE),
        ("transformers", None, CACHED),
    ],
)
def test_a_model_is_compared_in_every_phase_that_it_supports(
    title: str, claim: str | None, phases: list[str], agreeing: ParityReport
) -> None:
    results = results_of(agreeing, title)
    assert [(r.adapter, r.phase) for r in results] == [(claim, phase) for phase in phases]
    assert all(("no cache" in r.title) == (phases == WHOLE) for r in results)


def test_an_onnx_file_can_be_compared_as_a_merged_model(
    merged: Path, check: Callable[..., ParityReport], adapter: Path
) -> None:
    report = check([f"{merged}/model.onnx"], place=merged, adapters={"one": adapter})
    assert report.passed, report.failures
    assert {r.adapter for r in results_of(report, "model.onnx")} == {"one"}


@without_cuda
def test_an_onnx_file_runs_on_the_providers_that_are_given(bundle: Path) -> None:
    file, manifest = f"{bundle}/model.onnx", read_manifest(bundle)
    assert other_backends([file], manifest, [], [(CPU, {})])
    with pytest.raises(UsageError, match="CUDAExecutionProvider is installed but does not start"):
        other_backends([file], manifest, [], [(CUDA, {})])


# -- what does not -----------------------------------------------------------------------------


def raising(feeds: Feeds, given: Any) -> Any:
    raise KeyError("no such layer")


def leaving(feeds: Feeds, given: Any) -> Any:
    raise SystemExit(0)


BROKEN: dict[str, tuple[Callable[[Feeds, Any], Any], str]] = {
    "raises": (raising, "KeyError: 'no such layer'"),
    "leaves": (leaving, "it called sys.exit(0)"),
    "gives no logits": (lambda _, g: {**g, "logits": None}, "it does not give logits"),
    "another vocabulary": (
        lambda _, g: {**g, "logits": g["logits"][..., :-1]},
        ", 511] where [1, ",
    ),
    "too few positions": (lambda _, g: {**g, "logits": g["logits"][:, :-1]}, "is expected"),
    "NaN": (lambda _, g: {**g, "logits": g["logits"] * np.nan}, "have NaN"),
}


@pytest.fixture(scope="module")
def failing(
    check: Callable[..., ParityReport], session: Function, whole: Function, bundle: Path
) -> ParityReport:
    """One check of several broken functions."""

    def broken(spoil: Callable[[Feeds, Any], Any]) -> Function:
        return lambda feeds: spoil(feeds, session(feeds))

    others: dict[str, Any] = {how: broken(spoil) for how, (spoil, _) in BROKEN.items()}
    others["one too many"] = lambda feeds: [whole(feeds)] * 2
    number = iter(range(1, 10_000))
    others["another each time"] = broken(lambda _, g: {**g, "logits": g["logits"] * next(number)})
    return check({**others, "wrong claim": (bundle / "model.onnx", "one")})


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_function_fails_and_the_message_says_how(how: str, failing: ParityReport) -> None:
    results = results_of(failing, how)
    assert results
    assert {r.outcome for r in results} == {"failed"}
    assert BROKEN[how][1] in str(results[0].message)


def test_outputs_without_names_are_counted(failing: ParityReport) -> None:
    (message, *_) = (r.message for r in results_of(failing, "one too many"))
    assert "gives 2 outputs without names, not 1: logits" in str(message)


def test_a_false_claim_about_the_adapter_fails(failing: ParityReport) -> None:
    results = [r for r in results_of(failing, "wrong claim") if r.phase != "repeat"]
    assert {(r.outcome, r.adapter) for r in results} == {("failed", "one")}


def test_a_nondeterministic_function_is_reported(failing: ParityReport) -> None:
    (twice,) = (r for r in results_of(failing, "another each time") if r.phase == "repeat")
    assert twice.outcome == "failed"
    assert str(twice.message).startswith("two runs differ: ")


def test_correct_functions_pass_beside_broken_ones(failing: ParityReport) -> None:
    assert {r.outcome for r in failing.results if r.backend == "onnx-side-inputs"} == {"passed"}


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
def test_impossible_arguments_are_refused_before_anything_runs(
    case: str, bundle: Path, tmp_path: Path, check: Callable[..., ParityReport]
) -> None:
    (tmp_path / "broken.onnx").write_text("x")
    given, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        check([str(other) for other in given(bundle, tmp_path)])


def test_the_command_takes_others(
    bundle: Path,
    merged: Path,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    given = ["--model", tiny_llama, "--prompts", tmp_path / "prompts.txt", "--tokens", 2]
    given += ["--backends", "onnx-side-inputs"]
    given += ["--other", f"fused={merged}/model.onnx@one", "--other", f"{merged}/model.onnx"]
    status = exit_status("parity", bundle, *given, "--json")
    assert status == 1, "the second claims to be the base"
    results = json.loads(capsys.readouterr().out)["results"]
    outcomes = {(r["title"], r["adapter"], r["outcome"]) for r in results}
    assert {("fused", "one", "passed"), ("model.onnx", None, "failed")} < outcomes
