"""The initial tokens of a transcript are those of transformers, for every kind of checkpoint."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from loradeploy.bundle.text.speech import forced_tokens, read_speech
from loradeploy.bundle.text.speech_prompt import SpeechPrompt

START, EN, DE, TRANSLATE, TRANSCRIBE, NO_TIMESTAMPS = 50, 51, 52, 60, 61, 70
MULTILINGUAL = {
    "is_multilingual": True,
    "lang_to_id": {"<|en|>": EN, "<|de|>": DE},
    "task_to_id": {"translate": TRANSLATE, "transcribe": TRANSCRIBE},
    "no_timestamps_token_id": NO_TIMESTAMPS,
}
# Settings of generation_config.json, as in released checkpoints of different ages.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "multilingual": MULTILINGUAL,
    "with a language": {**MULTILINGUAL, "language": "german"},
    "with a task": {**MULTILINGUAL, "task": "translate"},
    "forced": {**MULTILINGUAL, "forced_decoder_ids": [[1, DE], [2, TRANSCRIBE]]},
    "forced, without timestamps": {
        **MULTILINGUAL,
        "forced_decoder_ids": [[1, DE], [2, TRANSLATE], [3, NO_TIMESTAMPS]],
    },
    "forced, any language": {**MULTILINGUAL, "forced_decoder_ids": [[1, None], [2, TRANSCRIBE]]},
    "forced, with a task": {
        **MULTILINGUAL,
        "task": "transcribe",
        "forced_decoder_ids": [[1, DE], [2, TRANSLATE]],
    },
    "English only": {"is_multilingual": False, "no_timestamps_token_id": NO_TIMESTAMPS},
    "English only, forced": {
        "is_multilingual": False,
        "no_timestamps_token_id": NO_TIMESTAMPS,
        "forced_decoder_ids": [[1, NO_TIMESTAMPS]],
    },
    "without timestamps": {
        name: value for name, value in MULTILINGUAL.items() if name != "no_timestamps_token_id"
    },
}
# English-only models take no language and no task; models without timestamps give none.
CASES = [
    (name, language, task, timestamps)
    for name, language, task, timestamps in itertools.product(
        CHECKPOINTS, (None, "en", "German"), (None, "transcribe", "translate"), (False, True)
    )
    if (CHECKPOINTS[name]["is_multilingual"] or not (language or task))
    and ("no_timestamps_token_id" in CHECKPOINTS[name] or not timestamps)
]


def expected(
    settings: dict[str, Any], language: str | None, task: str | None, timestamps: bool
) -> Any:
    """Return the initial tokens of transformers' `generate`; the detected language is German."""
    import torch
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    generation = GenerationConfig(decoder_start_token_id=START, **settings)
    generation.return_timestamps = timestamps
    for name, value in (("language", language), ("task", task)):
        if value is not None:
            setattr(generation, name, value)

    class Model:
        device = "cpu"

        def detect_language(self, **_: Any) -> torch.Tensor:
            return torch.tensor([DE])

    retrieve: Any = WhisperForConditionalGeneration._retrieve_init_tokens
    return retrieve(Model(), None, 1, generation, WhisperConfig(), 3000, {})[0].tolist()


@pytest.mark.parametrize(("checkpoint", "language", "task", "timestamps"), CASES)
def test_the_initial_tokens_are_those_of_transformers(
    checkpoint: str, language: str | None, task: str | None, timestamps: bool
) -> None:
    settings = CHECKPOINTS[checkpoint]
    speech = read_speech(settings, "generation_config.json")
    assert speech is not None
    prompt = SpeechPrompt.of(
        START,
        speech,
        forced_tokens(settings, "generation_config.json"),
        language=language,
        task=task,
        timestamps=timestamps,
        what="audio 1",
    )
    found = prompt.tokens(DE if prompt.needs_language else None)
    assert found == expected(settings, language, task, timestamps)
