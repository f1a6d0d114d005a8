"""onnxruntime-genai opens a merged Whisper bundle and generates the tokens of transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from tests.clients.test_genai import GENAI
from tests.conftest import MakeAdapter
from tests.inputs.edits import edited_json
from tests.inputs.sounds import RATE, save, tone
from tests.inputs.tiny import make_tiny_whisper

PROMPT = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
SOUND = tone(300, 3, noise=0.05)
NEW = 12
FILES = ("genai_config.json", "audio_processor_config.json")

pytestmark = pytest.mark.skipif(not GENAI.exists(), reason="make setup makes .venv-genai")


@dataclass(frozen=True)
class Made:
    """A tiny Whisper with windows of 30 s, an adapter, and its bundles."""

    model: Path
    adapter: Path
    merged: Path
    side_inputs: Path


@pytest.fixture(scope="module")
def made(bbc: Path, make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory) -> Made:
    place = tmp_path_factory.mktemp("whisper")
    made = Made(*(place / name for name in ("model", "adapter", "merged", "side-inputs")))
    make_tiny_whisper(made.model, bbc, seconds=30, mels=80)
    file = made.model / "generation_config.json"
    with edited_json(file) as settings:
        # onnxruntime-genai does not apply them.
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            del settings[name]
    make_adapter(made.model, out=made.adapter, task="speech", r=4, scale=0.2)
    for bundle, merge in ((made.merged, True), (made.side_inputs, False)):
        ld.export(made.model, bundle, adapters={"mine": made.adapter}, merge=merge)
    return made


def generated(bundle: Path, audio: Path, *adapter: Path) -> list[int]:
    """Return the tokens that onnxruntime-genai generates."""
    client = Path(__file__).with_name("genai_speech_client.py")
    length = NEW + PROMPT.count("<|")
    done = subprocess.run(
        [GENAI, client, bundle, audio, str(length), PROMPT, *adapter],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tokens: list[int] = json.loads(done.stdout.splitlines()[-1])
    return tokens


def reference(made: Made, adapter: Path | None) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Return the features, and the tokens of transformers and PEFT."""
    import peft
    import torch
    import transformers

    extract = transformers.WhisperFeatureExtractor.from_pretrained(made.model)
    features = extract(SOUND, sampling_rate=RATE, return_tensors="pt").input_features
    model: Any = transformers.WhisperForConditionalGeneration.from_pretrained(made.model)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        out = model.eval().generate(features, language="en", max_new_tokens=NEW, do_sample=False)
    tokens = [int(token) for token in out[0]]
    return features.numpy(), tokens[PROMPT.count("<|") :] if tokens[0] == 513 else tokens


def test_genai_generates_the_tokens_of_transformers_from_a_merged_bundle(
    made: Made, tmp_path: Path
) -> None:
    features, expected = reference(made, made.adapter)
    np.save(tmp_path / "features.npy", features)
    found = generated(made.merged, tmp_path / "features.npy")
    assert len(found) >= 8 and found[: len(expected)] == expected
    (ours,) = ld.SpeechRecognizer(ld.AdapterSession(made.merged)).transcribe(
        SOUND, language="en", max_new_tokens=NEW
    )
    assert list(ours.token_ids) == [token for token in expected if token != 512]
    assert expected != reference(made, None)[1], "the adapter has an effect"
    # Its own features differ from transformers' in the frames at both ends of the audio.
    assert generated(made.merged, save(tmp_path / "sound.wav", SOUND))


def test_a_bundle_with_side_inputs_has_no_config_because_genai_ignores_adapters(
    made: Made, tmp_path: Path
) -> None:
    assert all((made.merged / name).is_file() for name in FILES)
    assert not any((made.side_inputs / name).exists() for name in FILES)
    forced = tmp_path / "forced"
    shutil.copytree(made.side_inputs, forced)
    for name in FILES:
        shutil.copy(made.merged / name, forced)
    features, base = reference(made, None)
    np.save(tmp_path / "features.npy", features)
    native = forced / "adapters" / "mine.onnx_adapter"
    # If this fails, onnxruntime-genai passes adapters to Whisper's graphs: allow side inputs.
    found = generated(forced, tmp_path / "features.npy", native)
    assert found[: len(base)] == base != reference(made, made.adapter)[1]


def test_models_with_other_windows_have_no_config(
    tiny_whisper: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_whisper, task="speech")
    ld.export(tiny_whisper, tmp_path / "bundle", adapters={"mine": adapter}, merge=True)
    assert not any((tmp_path / "bundle" / name).exists() for name in FILES)
