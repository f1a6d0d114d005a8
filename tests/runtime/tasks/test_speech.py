"""Whisper: each row has the transcript of transformers and PEFT with its adapter."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.errors import BudgetError, BundleError, DataError, UnknownAdapterError, UsageError
from tests.cli.calling import call
from tests.conftest import MakeAdapter, once
from tests.inputs.edits import edited_json
from tests.inputs.sounds import RATE, save, tone, wav

SOUNDS = [tone(300, 0.7, noise=0.05), tone(900, 1, noise=0.05), tone(100, 0.3, noise=0.05)]
LONG = tone(500, 1.6, noise=0.05)
ROWS = ["first", None, "second"]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"language": "de", "task": "translate"},
    {"return_timestamps": True, "language": "english"},
    {"return_timestamps": True, "num_beams": 3},
    {"num_beams": 2, "language": "en", "no_repeat_ngram_size": 2},
]


@pytest.fixture(scope="module")
def adapters(tiny_whisper: Path, make_adapter: MakeAdapter) -> dict[str, Path]:
    """Two adapters of different ranks on every linear layer of encoder and decoder."""
    return {
        name: make_adapter(tiny_whisper, task="speech", r=rank, seed=rank, scale=0.2)
        for name, rank in (("first", 2), ("second", 4))
    }


@pytest.fixture(scope="module")
def bundle(tiny_whisper: Path, adapters: dict[str, Path], shared: Path) -> Path:
    """A bundle of the tiny Whisper with both adapters."""
    return once(shared / "speech", lambda place: ld.export(tiny_whisper, place, adapters=adapters))


@pytest.fixture(scope="module")
def recognizer(bundle: Path) -> ld.SpeechRecognizer:
    return ld.SpeechRecognizer(ld.AdapterSession(bundle))


class Reference:
    """Transcripts of transformers and PEFT: the segments and tokens of audio."""

    def __init__(self, model: Path, adapters: dict[str, Path]) -> None:
        import peft
        import transformers

        self.extract = transformers.WhisperFeatureExtractor.from_pretrained(model)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.models: dict[str | None, Any] = {}
        for name in (None, *adapters):
            made: Any = transformers.WhisperForConditionalGeneration.from_pretrained(model)
            if name is not None:
                made = peft.PeftModel.from_pretrained(made, adapters[name])
            self.models[name] = made.eval()

    def __call__(self, sound: Any, adapter: str | None, **settings: Any) -> ld.Transcript:
        import torch

        long = len(sound) > RATE
        features = self.extract(
            sound,
            sampling_rate=RATE,
            return_tensors="pt",
            truncation=not long,
            padding="longest" if long else "max_length",
        ).input_features
        language = settings.get("language")
        if language is None:
            found = self.models[adapter].detect_language(input_features=features)
            language = self.tokenizer.decode(found).strip("<|>")
        with torch.no_grad():
            (found,) = self.models[adapter].generate(
                features, return_segments=True, do_sample=False, **settings
            )["segments"]
        decode = self.tokenizer.decode
        segments = []
        for one in found:
            ids = tuple(one["tokens"].tolist())
            text = decode([i for i in ids if i <= 520], skip_special_tokens=True)
            begin, end = round(float(one["start"]), 6), round(float(one["end"]), 6)
            segments.append(ld.Segment(begin, end, text, ids))
        ids = tuple(token for segment in segments for token in segment.token_ids)
        text = decode([i for i in ids if i <= 520], skip_special_tokens=True)
        shown = tuple(segments) if long or settings.get("return_timestamps") else ()
        return ld.Transcript(text, ids, shown, language[:2], adapter, len(sound) / RATE)


@pytest.fixture(scope="module")
def reference(tiny_whisper: Path, adapters: dict[str, Path]) -> Reference:
    return Reference(tiny_whisper, adapters)


def options_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Translate transformers' settings to the names of loradeploy."""
    return {("timestamps" if n == "return_timestamps" else n): v for n, v in settings.items()}


@pytest.mark.breadth(2)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_each_row_has_the_transcript_of_transformers_with_its_adapter(
    settings: dict[str, Any], recognizer: ld.SpeechRecognizer, reference: Reference
) -> None:
    settings = {"max_new_tokens": 10, **settings}
    found = recognizer.transcribe(SOUNDS, ROWS, **options_of(settings))
    for sound, row, answer in zip(SOUNDS, ROWS, found, strict=True):
        assert answer == reference(sound, row, **settings)
    if settings.get("return_timestamps"):
        assert any(len(answer.segments) > 1 for answer in found), "windows begin within windows"


def test_long_audio_is_transcribed_in_windows_as_in_transformers(
    recognizer: ld.SpeechRecognizer, reference: Reference
) -> None:
    found = recognizer.transcribe([LONG, SOUNDS[0], LONG], ["first", "second", None], language="en")
    for row, answer in (("first", found[0]), (None, found[2])):
        assert answer == reference(LONG, row, language="en")
        assert answer.segments[-1].end > 1, "behind the first window"
    # Short audio in the same batch has the same text as alone.
    (alone,) = recognizer.transcribe(SOUNDS[0], "second", language="en")
    assert found[1] == alone and not alone.segments


def test_an_adapter_has_an_effect_and_a_doubled_alpha_another_one(
    recognizer: ld.SpeechRecognizer,
    adapters: dict[str, Path],
    reference: Reference,
    tmp_path: Path,
) -> None:
    settings = {"language": "en", "max_new_tokens": 10}
    found = recognizer.transcribe([SOUNDS[1]] * 3, ROWS, **settings)
    assert len({answer.token_ids for answer in found}) == 3
    doubled = tmp_path / "doubled"
    shutil.copytree(adapters["first"], doubled)
    with edited_json(doubled / "adapter_config.json") as config:
        config["lora_alpha"] *= 2
    recognizer.session.load("doubled", doubled)
    (wrong,) = recognizer.transcribe(SOUNDS[1], "doubled", **settings)
    recognizer.session.unload("doubled")
    expected = reference(SOUNDS[1], "first", **settings)
    assert found[0].token_ids == expected.token_ids != wrong.token_ids


def test_parity_passes_for_both_graphs_and_fails_mistakes(bundle: Path, tiny_whisper: Path) -> None:
    report = ld.parity(
        bundle,
        model=tiny_whisper,
        backends=["onnx-side-inputs"],
        prompts=["Hello there", "Hi"],
        controls=True,
        certificate=False,
    )
    assert report.passed, report.failures
    seen = {result.phase for result in report.results}
    assert seen >= {"prefill", "padded batch", "decode", "permuted batch"}
    assert report.controls and all(control.caught for control in report.controls)


def test_sampling_is_repeatable_and_each_row_can_have_its_own_language(
    recognizer: ld.SpeechRecognizer,
) -> None:
    def sampled(seed: int) -> list[ld.Transcript]:
        return recognizer.transcribe(
            SOUNDS, language=["de", None, "English"], temperature=1.0, seed=seed, max_new_tokens=8
        )

    assert sampled(3) == sampled(3) != sampled(4)
    languages = [answer.language for answer in sampled(3)]
    (found,) = recognizer.transcribe(SOUNDS[1], max_new_tokens=8)
    assert languages == ["de", found.language, "en"]


def test_the_command_prints_transcripts(
    bundle: Path, recognizer: ld.SpeechRecognizer, tmp_path: Path
) -> None:
    for number, sound in enumerate(SOUNDS):
        save(tmp_path / f"{number}.wav", sound)
    expected = recognizer.transcribe(SOUNDS, ROWS, language="en", timestamps=True)
    flags = ("--language", "en", "--timestamps")
    printed = call("run", bundle, tmp_path / "0.wav", "--adapter", "first", *flags)
    first = expected[0].segments[0]
    assert printed.splitlines()[0] == (
        f"[{first.start:.2f} - {first.end:.2f}] {first.text.strip()}"
    )
    # A text field beside the audio, such as a reference transcript, is ignored.
    lines = [
        json.dumps({"audio": f"{n}.wav", "text": "Good morning", "adapter": row})
        for n, row in enumerate(ROWS)
    ]
    (tmp_path / "sounds.jsonl").write_text("\n".join(lines) + "\n")
    answers = call("run", bundle, "--input", tmp_path / "sounds.jsonl", *flags, "--json")
    for line, answer in zip(answers.splitlines(), expected, strict=True):
        values = json.loads(line)
        assert values["token_ids"] == list(answer.token_ids)
        assert [part["start"] for part in values["segments"]] == [s.start for s in answer.segments]
    flags = ("--task", "translate", "--language", "de", "--max-new-tokens", "8")
    translated = call("run", bundle, tmp_path / "0.wav", *flags)
    transcript = recognizer.transcribe(
        tmp_path / "0.wav", task="translate", language="de", max_new_tokens=8
    )[0]
    assert translated.strip() == transcript.text.strip()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"no_timestamps_token_id": 9999},
            "no_timestamps_token_id is 9999, the vocabulary ends at",
        ),
        ({"lang_to_id": {"<|en|>": 9999}}, "lang_to_id '<|en|>' is 9999"),
        ({"task_to_id": {"translate": 9999}}, "task_to_id 'translate' is 9999"),
        ({"forced_decoder_ids": [[1, 9999]]}, "a token that a text begins with is 9999"),
    ],
)
def test_tokens_that_the_vocabulary_lacks_are_refused_by_name(
    values: dict[str, Any],
    message: str,
    recognizer: ld.SpeechRecognizer,
    adapters: dict[str, Path],
    tiny_whisper: Path,
    tmp_path: Path,
) -> None:
    own = shutil.copytree(adapters["first"], tmp_path / "own")
    settings = json.loads((tiny_whisper / "generation_config.json").read_text())
    (own / "generation_config.json").write_text(json.dumps(settings | values))
    recognizer.session.load("own", own)
    with pytest.raises(BundleError, match=f"audio 1: generation_config.json: {re.escape(message)}"):
        recognizer.transcribe(SOUNDS[0], "own", timestamps=True)
    recognizer.session.unload("own")


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no audio": ({"audio": []}, UsageError, "no audio"),
    "no samples": ({"audio": np.zeros(0, np.float32)}, DataError, "audio 1 has no samples"),
    "NaN": ({"audio": np.array([0.0, np.nan])}, DataError, "not finite"),
    "numbers in a list": ({"audio": [0.0, 0.1]}, UsageError, "numpy array"),
    "a language": (
        {"language": "Klingon"},
        UsageError,
        "'Klingon' is not one of the model's: de, en",
    ),
    "languages": ({"language": ["en", "de"]}, UsageError, "one for each of 1"),
    "a task": ({"task": "sing"}, UsageError, "one of transcribe, translate"),
    "an adapter": ({"adapters": "third"}, UnknownAdapterError, "third"),
    "n": ({"n": 2}, UsageError, "`n` is only for texts"),
    "long": ({"audio": LONG, "timestamps": False}, UsageError, "1.6 s, more than the 1 s"),
    "beams": ({"num_beams": 10**9}, BudgetError, "MiB"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_audio_and_options_are_refused_in_one_line(
    case: str, recognizer: ld.SpeechRecognizer
) -> None:
    given, kind, message = BAD[case]
    given = {"audio": SOUNDS[0], **given}
    with pytest.raises(kind, match=message) as problem:
        recognizer.transcribe(**given)
    assert "\n" not in str(problem.value)


def test_audio_of_hours_is_refused_with_figures(
    recognizer: ld.SpeechRecognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loradeploy.runtime.tasks.speech.MAX_SECONDS", 1)
    with pytest.raises(DataError, match="audio 2 lasts 2 s, 1 s is the maximum: cut it"):
        recognizer.transcribe([SOUNDS[0], LONG])


def test_bundles_and_files_that_do_not_fit_are_refused(
    bundle: Path, recognizer: ld.SpeechRecognizer, tiny_bert_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no text: use SpeechRecognizer"):
        ld.TextGenerator(recognizer.session)
    with pytest.raises(UsageError, match="takes no audio"):
        ld.SpeechRecognizer(ld.AdapterSession(tiny_bert_bundle))
    with pytest.raises(DataError, match="8000 samples a second, the model takes 16000"):
        recognizer.transcribe(wav(tmp_path / "slow.wav", bytes(64), rate=8000))
    sound = save(tmp_path / "a.wav", SOUNDS[0])
    for flags, message in (
        (("--chat",), "chat: only for texts"),
        (("--threshold", "0.5"), "threshold: only for classifiers"),
    ):
        with pytest.raises(UsageError, match=message):
            call("run", bundle, sound, *flags)
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"audio": "a.wav"}\n')
    with pytest.raises(UsageError, match="audio: only for speech recognizers"):
        call("run", tiny_bert_bundle, "--input", asked)
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    for own, message in (
        ({**settings, "feature_size": 80}, r"\[80, 100\].*\[8, 100\]"),
        (None, "put"),
    ):
        (copy / "preprocessor_config.json").unlink()
        if own is not None:
            (copy / "preprocessor_config.json").write_text(json.dumps(own))
        with pytest.raises(BundleError, match=message):
            ld.SpeechRecognizer(ld.AdapterSession(copy))
