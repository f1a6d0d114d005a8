"""Encoder-decoders: training on text and audio, and the same loss in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import loradeploy as ld
from loradeploy.errors import DataError, ModelError
from loradeploy.train.config import TrainConfig
from loradeploy.train.preview import preview
from tests.inputs.sounds import save, tone, wav
from tests.inputs.training_data import TONES, spoken, translations
from tests.tolerances import tolerance
from tests.train.conftest import write_lines

TASK = {"task": "seq2seq-lm"}
SETTINGS: dict[str, Any] = {**TASK, "max_steps": 12, "batch_size": 6, "rank": 4}


def of_peft(model: Path, adapter: Path, batch: dict[str, Any], auto: str) -> float:
    """Return the loss of transformers with the adapter loaded by PEFT."""
    import peft
    import torch
    import transformers

    made = getattr(transformers, auto).from_pretrained(model)
    made = peft.PeftModel.from_pretrained(made, adapter).eval()
    with torch.no_grad():
        return float(made(**batch).loss)


def test_training_on_texts_lowers_the_loss_and_peft_has_the_same_loss(
    tiny_t5: Path, tmp_path: Path
) -> None:
    import torch
    import transformers

    data = translations(tmp_path / "data.jsonl")
    result = ld.train(tiny_t5, data, tmp_path / "one", learning_rate=2e-2, **SETTINGS)
    assert result.loss_after < 0.7 * result.loss_before
    again = ld.train(tiny_t5, data, tmp_path / "two", learning_rate=2e-2, **SETTINGS)
    assert again.digest == result.digest, "the same seed, the same adapter"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_t5)
    sources = [f"translate {w}" for w in ("one", "two", "three")]
    batch = tokenizer(sources, padding=True, return_tensors="pt").data
    batch.pop("token_type_ids", None)
    # The end token, which this tokenizer does not add, is learned too.
    rows = [[*tokenizer.encode(text), 2] for text in ("eins", "zwei und zwanzig", "drei")]
    longest = max(map(len, rows))
    batch["labels"] = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    found = of_peft(tiny_t5, tmp_path / "one", batch, "AutoModelForSeq2SeqLM")
    assert abs(found - result.loss_after) <= tolerance("same-torch")


def test_training_on_audio_lowers_the_loss_and_peft_has_the_same_loss(
    tiny_whisper: Path, tmp_path: Path
) -> None:
    import torch
    import transformers

    data = spoken(tmp_path / "data.jsonl")
    adapter = tmp_path / "one"
    result = ld.train(tiny_whisper, data, adapter, learning_rate=2e-2, **SETTINGS)
    assert result.loss_after < 0.7 * result.loss_before
    extract = transformers.WhisperFeatureExtractor.from_pretrained(tiny_whisper)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_whisper)
    sounds = [tone(hertz, 0.6, noise=0.05, seed=seed) for seed in (0, 1) for hertz in TONES]
    features = extract(sounds, sampling_rate=16_000, return_tensors="pt").input_features
    # The tokens for English, transcribe and no timestamps; the text; the end token.
    rows = [[514, 517, 520, *tokenizer.encode(word), 512] for word in TONES.values()] * 2
    longest = max(map(len, rows))
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    batch = {"input_features": features, "labels": labels}
    found = of_peft(tiny_whisper, adapter, batch, "AutoModelForSpeechSeq2Seq")
    assert abs(found - result.loss_after) <= tolerance("torch-onnx-tiny")
    assert ld.load_adapter(adapter).config.task_type is None


def test_a_preview_shows_sources_and_targets(
    tiny_t5: Path, tiny_whisper: Path, tmp_path: Path
) -> None:
    config = TrainConfig(**TASK)
    shown = preview(tiny_t5, translations(tmp_path / "data.jsonl"), config)
    pieces = dict(piece for example in shown.shown for piece in example.pieces)
    assert any("zwei" in text and learned for text, learned in pieces.items())
    assert all(learned != text.endswith("→ ") for text, learned in pieces.items())
    heard = preview(tiny_whisper, spoken(tmp_path / "sounds.jsonl", task="translate"), config)
    assert heard.examples == 6 and heard.learned == heard.tokens
    texts = [text for example in heard.shown for text, learned in example.pieces if learned]
    assert all(text.startswith("<|en|><|translate|><|notimestamps|>") for text in texts)


def bad_rate(file: Path) -> Path:
    wav(file.parent / "a.wav", bytes(640), rate=8000)
    return write_lines(file, [{"audio": "a.wav", "target": "low", "language": "en"}])


def too_long(file: Path) -> Path:
    save(file.parent / "a.wav", tone(300, 1.2))
    return write_lines(file, [{"audio": "a.wav", "target": "low", "language": "en"}])


BAD = {
    "no file": (
        lambda file: write_lines(file, [{"audio": "b.wav", "target": "x", "language": "en"}]),
        "line 1: .*b.wav does not exist",
    ),
    "another rate": (bad_rate, "8000 samples a second, the model takes 16000"),
    "too long": (too_long, "lasts 1.2 s, the model takes 1 s at once: cut it"),
    "a language": (
        lambda file: spoken(file, language="Klingon"),
        "'Klingon' is not one of the model's",
    ),
    "no language": (lambda file: spoken(file, language=None), "line 1: the model has several lang"),
    "a text for a sound": (translations, "audio"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_audio_is_refused_in_one_line(
    case: str, tiny_whisper: Path, tmp_path: Path
) -> None:
    make, message = BAD[case]
    with pytest.raises(DataError, match=message) as problem:
        preview(tiny_whisper, make(tmp_path / "data.jsonl"), TrainConfig(**TASK))
    assert "\n" not in str(problem.value)


def test_models_of_other_kinds_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded for seq2seq-lm"):
        ld.train(tiny_bert, translations(tmp_path / "data.jsonl"), tmp_path / "out", **SETTINGS)
