"""The examples run and print the documented results."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, MakeAdapter
from tests.inputs.sounds import save, tone


def example(name: str, *arguments: object) -> str:
    """Run the program in this process, with its imports and cached traces; return its output."""
    program = ROOT / "examples" / name
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [str(program), *map(str, arguments)])
        runpy.run_path(str(program), run_name="__main__")
    return printed.getvalue()


@pytest.fixture(scope="module")
def bundle(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle of the tiny Llama with two adapters of different ranks."""
    from loradeploy.export.api import export

    place = tmp_path_factory.mktemp("examples") / "bundle"
    adapters = {
        "first": make_adapter(tiny_llama, r=4, seed=1, scale=0.3),
        "second": make_adapter(tiny_llama, r=8, seed=2, scale=0.3),
    }
    export(tiny_llama, place, adapters=adapters)
    return place


def answers(output: str) -> dict[str, str]:
    """Return the text of each adapter by name."""
    found = re.findall(r"^(\w+)(?: \(.*\))?: (.*)$", output, re.MULTILINE)
    return dict(found)


def test_plain_onnxruntime_swaps_adapters_like_the_runtime(bundle: Path) -> None:
    plain = answers(example("swap_adapters.py", bundle, "Good morning", "--max-new-tokens", 8))
    ours = answers(example("mixed_batch.py", bundle, "Good morning", "--max-new-tokens", 8))
    assert set(plain) == {"base", "first", "second"}
    assert len(set(plain.values())) == 3, "an adapter did nothing"
    assert plain == ours
    assert "import loradeploy" not in (ROOT / "examples" / "swap_adapters.py").read_text()


def test_plain_onnxruntime_runs_a_bundle_in_half_precision(tiny_llama_fp16_bundle: Path) -> None:
    plain = example("swap_adapters.py", tiny_llama_fp16_bundle, "A", "--max-new-tokens", 8)
    ours = example("mixed_batch.py", tiny_llama_fp16_bundle, "A", "--max-new-tokens", 8)
    assert answers(plain) == answers(ours) and set(answers(plain)) == {"base"}


def test_each_row_of_the_mixed_batch_has_the_same_text_as_alone(bundle: Path) -> None:
    output = example("mixed_batch.py", bundle, "Good morning", "--max-new-tokens", 8)
    assert output.count("(as alone)") == 3


def test_every_row_writes_json_of_the_schema(bundle: Path) -> None:
    pytest.importorskip("llguidance", reason="the example's own requirement")
    output = example("json_schema.py", bundle, "Good morning")
    message = answers(output)
    assert set(message) == {"base", "first", "second"}
    for text in message.values():
        values = json.loads(text)
        assert set(values) == {"topic", "important"}
        assert values["topic"] in ("business", "sport", "tech")
        assert isinstance(values["important"], bool)


def test_an_adapter_is_trained_deployed_and_checked(tiny_llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "lessons.jsonl"
    lessons = [{"prompt": f"Question {n}:", "completion": f" answer {n % 3}."} for n in range(8)]
    data.write_text("".join(json.dumps(lesson) + "\n" for lesson in lessons))
    output = example("train_and_deploy.py", tiny_llama, data, tmp_path / "out", "--steps", 20)
    assert "bundle: parity passed" in output
    assert "merged: parity passed" in output
    before, after = map(float, re.findall(r"loss (\S+) → (\S+)", output)[0])
    assert after < before


def test_a_token_classifier_is_trained_checked_and_run(tiny_bert: Path, tmp_path: Path) -> None:
    names = {"Paris": "B-LOC", "Rome": "B-LOC", "Anna": "B-PER", "Tom": "B-PER"}
    rows = [
        {"tokens": [name, word, "again"], "tags": [tag, "O", "O"]}
        for word in ("won", "fell", "rose", "came")
        for name, tag in names.items()
    ]
    data = tmp_path / "names.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--steps", 40, "--learning-rate", 2e-2, "--text", "Rome won again")
    output = example("ner.py", tiny_bert, data, tmp_path / "out", *given)
    assert "parity passed" in output
    assert re.search(r"^ONNX side inputs: entity_f1 (\S+), PyTorch \1$", output, re.MULTILINE)
    assert re.search(r"^0-4 Rome: LOC \(", output, re.MULTILINE)


def test_a_speech_recognizer_is_trained_checked_and_run(tiny_whisper: Path, tmp_path: Path) -> None:
    from tests.inputs.training_data import spoken

    data = spoken(tmp_path / "sounds.jsonl")
    new = save(tmp_path / "new.wav", tone(900, 0.6, noise=0.05, seed=7))
    given = ("--steps", 80, "--learning-rate", 1e-2, "--audio", new)
    output = example("speech.py", tiny_whisper, data, tmp_path / "out", *given)
    assert "parity passed" in output
    message = answers(output)
    assert message["clinic"] == "a middle tone" != message["base"]
    assert "wer of clinic: 0.00, PyTorch 0.00\n" in output
    base = re.search(r"^wer of base: (\S+), PyTorch (\S+)$", output, re.MULTILINE)
    assert base is not None and float(base[1]) == float(base[2]) > 0.5


# The document of a query contains the words of the query.
SOUGHT = {
    "who won the cup": "the home side won the cup",
    "where did shares rise": "shares rise in the bank market",
    "which phone is new": "the new phone has a chip",
}


def test_a_sentence_encoder_is_trained_checked_and_used_for_search(
    tiny_bert: Path, tmp_path: Path
) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [{"anchor": query, "positive": document} for query, document in SOUGHT.items()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    query = "which phone is new"
    given = ("--steps", 30, "--learning-rate", 2e-2, "--query", query)
    output = example("embeddings.py", tiny_bert, data, tmp_path / "out", *given)
    assert "parity passed" in output
    assert "search: recall@1 1.000, MRR 1.000" in output
    assert output.splitlines()[-3].endswith(SOUGHT[query])


def test_a_pair_classifier_is_trained_checked_and_used_for_ranking(
    tiny_bert: Path, tmp_path: Path
) -> None:
    data = tmp_path / "pairs.jsonl"
    query, other = "who won the cup", "which team has the cup"
    rows = [
        {"text": text, "text_pair": document, "label": ["relevant"] if own == query else []}
        for text in (query, other)
        for own, document in SOUGHT.items()
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--steps", 30, "--learning-rate", 2e-2, "--query", query)
    output = example("reranking.py", tiny_bert, data, tmp_path / "out", *given)
    assert "parity passed" in output
    assert re.search(r"^ONNX side inputs: micro_f1 (\S+), PyTorch \1$", output, re.MULTILINE)
    assert output.splitlines()[-3].endswith(SOUGHT[query])
