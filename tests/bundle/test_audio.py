"""Audio for Whisper: WAV files of every common encoding, and the features of transformers."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.bundle.audio.features import FeatureSettings, feature_settings
from loradeploy.bundle.audio.languages import language_token
from loradeploy.bundle.audio.wav import checked_samples, read_wav
from loradeploy.errors import BundleError, DataError
from loradeploy.files import write_json
from tests.inputs.sounds import tone, wav
from tests.tolerances import tolerance

RATE = 16_000


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("seconds", [0.4, 30, 31.3], ids=["short", "a chunk", "long"])
def test_features_are_those_of_transformers(mels: int, seconds: float, tmp_path: Path) -> None:
    from transformers import WhisperFeatureExtractor

    theirs = WhisperFeatureExtractor(feature_size=mels)
    theirs.save_pretrained(tmp_path)
    ours = feature_settings(tmp_path)
    assert ours is not None
    sound = tone(440, seconds, noise=0.05)
    long = seconds > 30
    expected = theirs(
        sound,
        sampling_rate=RATE,
        return_tensors="np",
        truncation=not long,
        padding="longest" if long else "max_length",
    ).input_features[0]
    found = ours.of(sound)
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance("log-mel-torch")
    # transformers' numpy implementation, which does not use torch's float32
    whole = np.concatenate([sound, np.zeros(max(0, 30 * RATE - len(sound)), np.float32)])
    exact = theirs._np_extract_fbank_features(whole[np.newaxis], "cpu")[0]
    assert np.abs(found - exact).max() <= tolerance("log-mel")
    assert np.abs(found - ours.of(tone(450, seconds, noise=0.05))).max() > 0.1


ENCODINGS: dict[str, tuple[Callable[[Any], bytes], int, int, float]] = {
    "8 bits": (lambda x: (np.round(x * 127) + 128).astype(np.uint8).tobytes(), 1, 8, 1e-2),
    "16 bits": (lambda x: np.round(x * 32767).astype("<i2").tobytes(), 1, 16, 1e-4),
    "24 bits": (
        lambda x: (
            np.round(x * (2**23 - 1)).astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
        ),
        1,
        24,
        1e-6,
    ),
    "32 bits": (lambda x: np.round(x * (2**31 - 1)).astype("<i4").tobytes(), 1, 32, 1e-6),
    "float32": (lambda x: x.astype("<f4").tobytes(), 3, 32, 1e-7),
    "float64": (lambda x: x.astype("<f8").tobytes(), 3, 64, 1e-7),
}


@pytest.mark.parametrize("extensible", [False, True], ids=["", "extensible"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_wav_file_gives_its_samples(encoding: str, extensible: bool, tmp_path: Path) -> None:
    encode, code, bits, allowed = ENCODINGS[encoding]
    left, right = tone(200, 0.1).astype(np.float64), tone(300, 0.1).astype(np.float64)
    mono = wav(tmp_path / "mono.wav", encode(left), code=code, bits=bits, extensible=extensible)
    assert np.abs(read_wav(mono, RATE).samples - left).max() <= allowed
    both = encode(np.stack([left, right], axis=1).reshape(-1))
    file = wav(
        tmp_path / "stereo.wav", both, code=code, bits=bits, channels=2, extensible=extensible
    )
    assert np.abs(read_wav(file, RATE).samples - (left + right) / 2).max() <= allowed


def test_files_of_the_wave_module_and_files_with_other_chunks_are_read(tmp_path: Path) -> None:
    import wave

    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.arange(-50, 50, dtype="<i2").tobytes())
    assert (read_wav(tmp_path / "a.wav", RATE).samples * 32768).tolist() == list(range(-50, 50))
    content = (tmp_path / "a.wav").read_bytes()
    noted = content[:12] + b"LIST" + struct.pack("<I", 3) + b"abc\0" + content[12:]
    (tmp_path / "b.wav").write_bytes(noted)
    assert len(read_wav(tmp_path / "b.wav", RATE).samples) == 100


def test_reading_a_file_takes_little_more_memory_than_its_samples(tmp_path: Path) -> None:
    import tracemalloc

    count = 1 << 21
    file = wav(tmp_path / "a.wav", bytes(count), bits=8)
    tracemalloc.start()
    try:
        samples = read_wav(file, RATE).samples
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert samples.shape == (count,) and (samples == -1).all()
    assert most < 1.5 * samples.nbytes


BAD = {
    "a text": (lambda d: b"Hello, this is a text file.\n" * 9, "not a WAV file: convert it"),
    "an MP3 file": (lambda d: b"ID3\x04" + bytes(99), "is MP3, not a WAV file"),
    "nothing": (lambda d: b"", "not a WAV file"),
    "another rate": (
        lambda d: wav(d, bytes(64), rate=44_100),
        "44100 samples a second.*takes 16000",
    ),
    "mu-law": (lambda d: wav(d, bytes(64), code=7, bits=8), "contains mu-law of 8 bits"),
    "no samples": (lambda d: wav(d, b""), "has no samples"),
    "no channels": (lambda d: wav(d, bytes(64), channels=0), "0 channels"),
    "a part of a sample": (lambda d: wav(d, bytes(63)), "not a whole number of samples"),
    "an early end": (
        lambda d: wav(d, bytes(640)).read_bytes()[:-9],
        "ends early: it has 631 of 640 bytes",
    ),
    "no data": (lambda d: wav(d, bytes(64)).read_bytes()[:36], "its data chunk is missing"),
    "24 bits in 4 bytes": (
        lambda d: wav(d, bytes(64), bits=24, frame=4),
        "4 bytes for a sample of 1 channels of 24 bits .nBlockAlign., expected 3",
    ),
    "floats of 16 bits' scale": (
        lambda d: wav(d, np.array([0, 16384], "<f4").tobytes(), code=3, bits=32),
        "as large as 16384, expected floats from -1 to 1: divide",
    ),
    "too large for float32": (
        lambda d: wav(d, np.array([0, 1e40], "<f8").tobytes(), code=3, bits=64),
        "not finite",
    ),
    "NaN": (
        lambda d: wav(d, np.array([0, np.nan], "<f4").tobytes(), code=3, bits=32),
        "not finite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_other_files_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    make, message = BAD[case]
    file = tmp_path / "sound.wav"
    made = make(file)
    if isinstance(made, bytes):
        file.write_bytes(made)
    with pytest.raises(DataError, match=message) as problem:
        read_wav(file, RATE)
    assert "\n" not in str(problem.value) and str(file) in str(problem.value)


def test_a_file_that_is_missing_or_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_wav(tmp_path / "none.wav", RATE)
    monkeypatch.setattr("loradeploy.bundle.audio.wav.MAX_WAV_SAMPLES", 319)
    with pytest.raises(DataError, match="320 samples, 319 is the maximum"):
        read_wav(wav(tmp_path / "a.wav", bytes(640)), RATE)
    monkeypatch.setattr("loradeploy.bundle.audio.wav.MAX_WAV_BYTES", 100)
    with pytest.raises(DataError, match="100"):
        read_wav(wav(tmp_path / "a.wav", bytes(640)), RATE)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "float64 .* no samples|has no samples"),
        (np.zeros((2, 9)), r"\[2, 9\]: give the samples of one channel"),
        (np.zeros(9, np.int16), "int16"),
        (np.array([0.1, np.inf]), "not finite"),
        (np.array([0.1, 1e40]), "not finite"),
        (np.array([0.1, -16384], np.float32), "as large as 16384.*divide those of 16 bits by"),
    ],
)
def test_invalid_samples_are_refused(samples: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        checked_samples(samples, "sound 1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"feature_extractor_type": "Wav2Vec2FeatureExtractor"}, "Wav2Vec2FeatureExtractor"),
        ({"n_fft": 10**9}, "n_fft is 1000000000"),
        ({"hop_length": 0}, "hop_length is 0"),
        ({"chunk_length": "30"}, "chunk_length"),
        ({"dither": 0.1}, "random noise"),
    ],
)
def test_invalid_settings_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_json(tmp_path / "preprocessor_config.json", values)
    with pytest.raises(BundleError, match=message):
        feature_settings(tmp_path)


def test_settings_are_read_from_a_processor_config_too(tmp_path: Path) -> None:
    assert feature_settings(tmp_path) is None
    nested = {"feature_extractor": {"feature_size": 128}, "processor_class": "WhisperProcessor"}
    write_json(tmp_path / "processor_config.json", nested)
    assert feature_settings(tmp_path) == FeatureSettings(128, RATE, 160, 30, 400)


def test_languages_are_those_of_transformers() -> None:
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    for name, code in TO_LANGUAGE_CODE.items():
        for given in (name, name.upper(), code, f"<|{code}|>"):
            assert language_token(given) == f"<|{code}|>"
