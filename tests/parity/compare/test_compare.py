"""`loradeploy.compare`: two models of any kind, compared as they are."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import loradeploy as ld
from loradeploy.errors import DataError, LoraDeployError, ModelError, UsageError
from loradeploy.parity.report.results import ParityReport, Result
from tests.cli.calling import exit_status
from tests.parity.graphs import HIDDEN, LABELS, in_numpy, token_model, weights

Feeds = dict[str, NDArray[Any]]


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return token_model(tmp_path / "reference.onnx")


class InTorch(torch.nn.Module):
    """The same model in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        E, W = weights()
        self.embedding = torch.nn.Embedding.from_pretrained(torch.from_numpy(E))
        self.head = torch.nn.Linear(HIDDEN, LABELS, bias=False)
        self.head.weight.data = torch.from_numpy(W.T.copy())
        self.eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(input_ids))  # type: ignore[no-any-return]


def result(report: ParityReport, aspect: str, backend: str = "compared") -> Result:
    (found,) = (r for r in report.results if (r.backend, r.aspect) == (backend, aspect))
    return found


def failure_of(report: ParityReport) -> str:
    (failure,) = report.failures
    return failure


# -- what agrees -------------------------------------------------------------------------------


CANDIDATES: dict[str, Callable[[Path], Any]] = {
    "an ONNX file": lambda place: token_model(place / "candidate.onnx"),
    "its directory": lambda place: token_model(place / "there" / "model.onnx").parent,
    "outputs by name": lambda place: in_numpy,
    "outputs in order": lambda place: lambda feeds: [in_numpy(feeds)["logits"]],
    "a single output": lambda place: lambda feeds: in_numpy(feeds)["logits"],
    "PyTorch": lambda place: InTorch(),
    "PyTorch by a function": lambda place: lambda f: InTorch()(torch.from_numpy(f["input_ids"])),
    "module:function": lambda place: "tests.parity.graphs:in_numpy",
}


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_models_that_compute_the_same_agree_in_any_form(
    candidate: str, reference: Path, tmp_path: Path
) -> None:
    report = ld.compare(reference, CANDIDATES[candidate](tmp_path))
    assert report.passed, report.failures
    assert (report.mode, report.precision, report.inputs.prompts) == ("compared", "fp32", 6)
    figures = result(report, "logits").figures
    assert figures is not None
    assert figures.max_abs < 1e-5
    assert figures.top1 == 1.0


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_the_two_sides_can_be_exchanged(candidate: str, reference: Path, tmp_path: Path) -> None:
    report = ld.compare(CANDIDATES[candidate](tmp_path), reference)
    assert report.passed, report.failures


def test_a_bundle_is_compared_with_transformers_cache_included(
    tiny_llama: Path, tiny_llama_bundle: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    report = ld.compare(model, tiny_llama_bundle)
    assert report.passed, report.failures
    assert {r.aspect for r in report.results if r.backend == "compared"} == {"logits", "present"}


def test_half_precision_is_detected_by_the_weights_and_has_its_own_tolerances(
    reference: Path, tmp_path: Path
) -> None:
    half = token_model(tmp_path / "half.onnx", dtype="float16")
    report = ld.compare(reference, half)
    assert report.passed, report.failures
    assert report.precision == "fp16"
    assert not ld.compare(reference, half, tolerances="fp32").passed


def test_different_names_can_be_mapped(reference: Path, tmp_path: Path) -> None:
    other = token_model(tmp_path / "other.onnx", names=("tokens", "scores"))
    names = {"input_ids": "tokens", "logits": "scores"}
    assert ld.compare(reference, other, names=names).passed


def test_a_candidate_that_overwrites_its_inputs_does_not_change_those_of_the_next_run(
    reference: Path,
) -> None:
    def spoil(feeds: Feeds) -> Feeds:
        found = in_numpy(feeds)
        feeds["input_ids"][:] = 0
        return found

    assert ld.compare(reference, spoil).passed
    assert ld.compare(spoil, reference).passed


def test_a_precision_without_default_limits_needs_tolerances(
    reference: Path, tmp_path: Path
) -> None:
    from tests.export.others import quantise_dynamically

    quantise_dynamically(reference, tmp_path / "int8")
    with pytest.raises(UsageError, match="no limits are known for int8 models.*give tolerances"):
        ld.compare(reference, tmp_path / "int8")
    report = ld.compare(reference, tmp_path / "int8", tolerances="bf16")
    assert report.passed, report.failures
    assert report.precision == "int8"


# -- what does not agree -----------------------------------------------------------------------


def test_an_error_in_one_weight_fails(reference: Path, tmp_path: Path) -> None:
    report = ld.compare(reference, token_model(tmp_path / "off.onnx", error=1e-3))
    assert not report.passed
    assert "max abs" in failure_of(report)


def test_given_limits_replace_those_of_the_precision(reference: Path, tmp_path: Path) -> None:
    off = token_model(tmp_path / "off.onnx", error=1e-3)
    wide = dict.fromkeys(("max_abs", "p99_abs", "mean_abs", "max_rel", "cosine_distance", "kl"), 1)
    assert ld.compare(reference, off, tolerances=wide).passed
    assert not ld.compare(reference, off, tolerances={**wide, "max_abs": 1e-5}).passed


def test_an_output_that_one_side_lacks_fails_on_either_side(
    reference: Path, tmp_path: Path
) -> None:
    more = token_model(tmp_path / "more.onnx", extra=True)
    assert "the candidate does not give hidden" in failure_of(ld.compare(more, reference))
    assert "the reference does not give hidden" in failure_of(ld.compare(reference, more))
    assert "gives 1 without names" in failure_of(
        ld.compare(more, lambda f: [in_numpy(f)["logits"]])
    )


def test_no_outputs_at_all_fail(reference: Path) -> None:
    def nothing(feeds: Feeds) -> Feeds:
        return {}

    report = ld.compare(nothing, nothing, [{"input_ids": np.ones((1, 2), np.int64)}])
    assert "no output is common to both sides" in failure_of(report)


@pytest.mark.parametrize("labels", [LABELS - 1, LABELS + 1])
def test_a_different_number_of_labels_fails_and_is_reported(
    labels: int, reference: Path, tmp_path: Path
) -> None:
    report = ld.compare(reference, token_model(tmp_path / "other.onnx", labels=labels))
    assert "the vocabulary or the number of labels differs" in failure_of(report)


def test_a_different_label_map_fails_though_the_numbers_agree(tmp_path: Path) -> None:
    places = [token_model(tmp_path / side / "model.onnx").parent for side in "ab"]
    for place, labels in zip(places, (("sport", "tech"), ("tech", "sport")), strict=True):
        named = {str(number): label for number, label in enumerate(labels)}
        (place / "config.json").write_text(json.dumps({"id2label": named}))
    message = failure_of(ld.compare(*places))
    assert "label map differs in 2 places: '0' is 'sport' in the reference" in message


def test_a_different_vocabulary_of_the_same_size_fails(tiny_llama: Path, tmp_path: Path) -> None:
    places = [token_model(tmp_path / side / "model.onnx").parent for side in "ab"]
    text = (tiny_llama / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[5:7]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (places[0] / "tokenizer.json").write_text(text, encoding="utf-8")
    (places[1] / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "the vocabulary differs in 2 places" in failure_of(ld.compare(*places))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_values_that_are_not_finite_on_both_sides_fail(wrong: float, reference: Path) -> None:
    def damaged(feeds: Feeds) -> Feeds:
        logits = in_numpy(feeds)["logits"]
        logits[0, 0, 0] = wrong
        return {"logits": logits}

    inputs = [{"input_ids": np.ones((2, 3), np.int64)}]
    assert "1 of 6 positions" in failure_of(ld.compare(reference, damaged, inputs))
    message = failure_of(ld.compare(damaged, damaged, inputs))
    assert "1 of 6 positions have NaN or infinite" in message
    assert ("NaN on both sides proves nothing" in message) == np.isnan(wrong)


@pytest.mark.parametrize("role", ["reference", "candidate"])
def test_a_nondeterministic_model_is_reported(role: str, reference: Path) -> None:
    calls = itertools.count()

    def drifting(feeds: Feeds) -> Feeds:
        return {"logits": in_numpy(feeds)["logits"] + np.float32(next(calls) // 6 * 0.25)}

    sides = (drifting, reference) if role == "reference" else (reference, drifting)
    message = failure_of(ld.compare(*sides))
    assert f"the {role} is nondeterministic: two runs differ by 0.25 at output" in message


def test_active_dropout_is_reported() -> None:
    # So wide that two runs never drop the same values.
    layers = torch.nn.Linear(4, 64), torch.nn.Dropout(), torch.nn.Linear(64, 4)
    model = torch.nn.Sequential(*layers).train()
    inputs = [{"x": np.ones((2, 4), np.float32)}]
    report = ld.compare(model, model.eval(), inputs)
    assert report.passed
    report = ld.compare(model.train(), lambda feeds: feeds["x"], inputs)
    assert any("training mode: call .eval()" in failure for failure in report.failures)


def test_nondeterminism_within_the_limits_is_a_note(reference: Path) -> None:
    calls = itertools.count()

    def jittering(feeds: Feeds) -> Feeds:
        return {"logits": in_numpy(feeds)["logits"] + np.float32(next(calls) % 2 * 3e-6)}

    report = ld.compare(reference, jittering, cases=1)
    assert report.passed, report.failures
    assert any(
        "candidate is nondeterministic, but within the limits" in note for note in report.notes
    )


@pytest.mark.parametrize("problem", [ValueError("no such\nfile"), SystemExit(0)], ids=repr)
def test_a_function_that_raises_fails_in_one_line(problem: BaseException, reference: Path) -> None:
    def raising(feeds: Feeds) -> Feeds:
        if feeds["input_ids"].shape == (1, 1):
            raise problem
        return in_numpy(feeds)

    report = ld.compare(reference, raising)
    message = failure_of(report)
    assert f"raised on case 2 (input_ids [1, 1]): {type(problem).__name__}: " in message
    assert "\n" not in message
    assert result(report, "logits").outcome == "passed", "of the cases that it did run"


def test_outputs_that_are_not_numeric_fail(reference: Path) -> None:
    report = ld.compare(reference, lambda feeds: {"logits": [["sport"]]})
    assert "logits is not an array of numbers" in report.failures[0]


def test_integers_must_be_equal() -> None:
    inputs = [{"x": np.array([[200_000]])}]
    assert ld.compare(lambda f: f["x"], lambda f: f["x"], inputs).passed
    assert not ld.compare(lambda f: f["x"], lambda f: f["x"] + 1, inputs).passed


# -- inputs ------------------------------------------------------------------------------------


def test_generated_inputs_have_several_sizes_including_1(reference: Path) -> None:
    seen: list[Feeds] = []
    report = ld.compare(reference, lambda feeds: (seen.append(feeds), in_numpy(feeds))[1], cases=8)
    shapes = [feeds["input_ids"].shape for feeds in seen[:-1]]
    assert shapes[1] == (1, 1)
    assert len({batch for batch, _ in shapes}) > 2
    assert len({length for _, length in shapes}) > 4
    assert any("assumed for input_ids: ids below 64" in note for note in report.notes) is False
    assert max(int(feeds["input_ids"].max()) for feeds in seen) < 40


def test_generated_inputs_depend_on_the_seed(reference: Path) -> None:
    def fed(seed: int) -> list[NDArray[Any]]:
        seen: list[NDArray[Any]] = []
        ld.compare(
            reference,
            lambda feeds: (seen.append(feeds["input_ids"]), in_numpy(feeds))[1],
            seed=seed,
        )
        return seen

    first, again, other = fed(1), fed(1), fed(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_generated_caches_fit_the_other_inputs_and_one_is_empty(tiny_llama_bundle: Path) -> None:
    seen: list[Feeds] = []

    def watch(feeds: Feeds) -> Feeds:
        seen.append(feeds)
        raise ValueError

    ld.compare(tiny_llama_bundle, watch, cases=3)
    for feeds in seen:
        past = feeds["past_key_values.0.key"].shape[2]
        rows, new = feeds["input_ids"].shape
        assert feeds["attention_mask"].shape == (rows, past + new)
        assert feeds["position_ids"].tolist() == [list(range(past, past + new))] * rows
    assert [feeds["past_key_values.0.key"].shape[2] > 0 for feeds in seen] == [True, False, True]


def test_a_generated_cache_was_computed_by_the_model(tiny_llama_bundle: Path) -> None:
    seen: list[Feeds] = []
    ld.compare(tiny_llama_bundle, lambda feeds: seen.append(feeds), cases=1)
    made = seen[0]["past_key_values.0.key"][0, :, 0]  # first token, [heads, head_dim]
    # The first layer's keys of every token of the vocabulary, at the first position.
    ids = np.arange(512)[:, None]
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids * 0}
    empty = {n: np.repeat(v[:1, :, :0], 512, axis=0) for n, v in seen[0].items() if "past" in n}
    (keys,) = ld.AdapterSession(tiny_llama_bundle).run(["present.0.key"], {**given, **empty})
    assert np.abs(keys[:, :, 0] - made).max(axis=(1, 2)).min() < 1e-5


def test_inputs_are_read_from_npz_files(reference: Path, tmp_path: Path) -> None:
    place = tmp_path / "inputs"
    place.mkdir()
    for number in range(3):
        np.savez(place / f"{number}.npz", input_ids=np.full((1, number + 1), number))
    report = ld.compare(reference, in_numpy, place)
    assert report.passed, report.failures
    assert report.inputs.prompts == 3
    assert ld.compare(reference, in_numpy, place / "2.npz").inputs.prompts == 1


BAD_INPUT: dict[str, tuple[Callable[[Path], tuple[Any, ...]], type[LoraDeployError], str]] = {
    "no file": (lambda p: (p / "no.onnx", in_numpy), UsageError, "does not exist"),
    "no ONNX": (lambda p: (p / "text.txt", in_numpy), UsageError, "is not an ONNX file"),
    "broken ONNX": (lambda p: (p / "broken.onnx", in_numpy), ModelError, "cannot open"),
    "no graph": (lambda p: (p / "empty", in_numpy), UsageError, "has no ONNX file"),
    "no module": (lambda p: ("no.such:f", in_numpy), UsageError, "cannot be imported: ModuleNot"),
    "no function": (lambda p: ("json:no", in_numpy), UsageError, "json has no no"),
    "no callable": (lambda p: ("json:__name__", in_numpy), UsageError, "is not a model to compare"),
    "no inputs told": (lambda p: (in_numpy, in_numpy), UsageError, "give inputs"),
    "no inputs": (lambda p: (in_numpy, in_numpy, []), UsageError, "no inputs"),
    "inputs no feeds": (lambda p: (in_numpy, in_numpy, [1]), UsageError, "sequence of feeds"),
    "a missing input": (
        lambda p: (p / "good.onnx", in_numpy, [{"x": np.ones(1)}]),
        UsageError,
        "case 1 has no input_ids, which",
    ),
    "no npz": (lambda p: (in_numpy, in_numpy, p / "no.npz"), DataError, "does not exist"),
    "a broken npz": (lambda p: (in_numpy, in_numpy, p / "broken.npz"), DataError, "not readable"),
    "a pickle": (lambda p: (in_numpy, in_numpy, p / "pickle.npz"), DataError, "not readable"),
    "no npz there": (lambda p: (in_numpy, in_numpy, p / "empty"), DataError, "has no .npz"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused(case: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("text.txt", "broken.onnx", "broken.npz"):
        (tmp_path / name).write_text("x")
    np.savez(tmp_path / "pickle.npz", x=np.array([{}], dtype=object))
    token_model(tmp_path / "good.onnx")
    given, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        ld.compare(*given(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": 0}, "give 1 or more"),
        ({"tolerances": "int3"}, "int3"),
        ({"tolerances": {"max_error": 1}}, "no metric is named 'max_error'"),
        ({"report": "r.pdf"}, "a report ends in"),
        ({"baseline": "no.json"}, "does not exist"),
        ({"providers": ["NoSuchProvider"]}, "NoSuchProvider"),
    ],
)
def test_impossible_options_are_refused(
    options: dict[str, Any], message: str, reference: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        ld.compare(reference, in_numpy, **options)


# -- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_the_command_exits_with_0_or_1(
    error: float, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    candidate = token_model(tmp_path / "new.onnx", error=error)
    code = exit_status("parity", candidate, "--against", reference, "--report", tmp_path / "r.json")
    out = capsys.readouterr().out
    assert code == (1 if error else 0), out
    assert out.splitlines()[-1].startswith(f"parity {'FAILED' if error else 'passed'}: {candidate}")
    assert json.loads((tmp_path / "r.json").read_text())["passed"] is not bool(error)


def test_the_command_takes_tolerances(reference: Path, tmp_path: Path) -> None:
    off = token_model(tmp_path / "off.onnx", error=1e-3)
    assert exit_status("parity", off, "--against", reference, "--tolerances", "fp16") == 0
    wide = "max_abs=1,p99_abs=1,mean_abs=1,max_rel=1,cosine_distance=1,kl=1,margin=1"
    assert exit_status("parity", off, "--against", reference, "--tolerances", wide) == 0
    assert exit_status("parity", off, "--against", reference, "--tolerances", "max_abs=1") == 1


def test_the_command_imports_a_function_from_the_working_directory(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_of_here.py").write_text(
        "from tests.parity.graphs import in_numpy\ndef leave(feeds): raise SystemExit(0)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    assert exit_status("parity", "mine_of_here:in_numpy", "--against", reference) == 0
    assert exit_status("parity", "mine_of_here:leave", "--against", reference) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--against", "{reference}", "--tokens", "3"],
            "--tokens cannot be combined with --against",
        ),
        (["--against", "{reference}", "--other", "x"], "--other cannot be combined with --against"),
        (
            ["--against", "{reference}", "--controls"],
            "--controls cannot be combined with --against",
        ),
        (["--inputs", "x.npz"], "--inputs needs --against"),
        (["--cases", "3"], "--cases needs --against"),
        (
            ["--against", "{reference}", "--inputs", "x", "--cases", "3"],
            "cannot be combined with --inputs",
        ),
        (["--examples", "3"], "--examples needs --evaluate"),
        (["--against", "{reference}", "--tolerances", "kl=a"], "give METRIC=LIMIT"),
        (["--against", "nowhere.onnx"], "nowhere.onnx does not exist"),
    ],
)
def test_the_command_exits_with_2_and_one_line_on_wrong_usage(
    arguments: list[str], message: str, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(reference=reference) for argument in arguments]
    assert exit_status("parity", reference, *given) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert message in line
