"""Encode sources and targets of encoder-decoders as token ids; audio is read with each batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from loradeploy.adapter.files.digest import file_digest
from loradeploy.bundle.audio.features import FeatureSettings, feature_settings
from loradeploy.bundle.audio.wav import read_wav
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import PREPROCESSOR_NAME
from loradeploy.bundle.text.settings import GenerationSettings, read_settings
from loradeploy.bundle.text.speech import SpeechSettings, forced_tokens
from loradeploy.bundle.text.speech_prompt import SpeechPrompt
from loradeploy.bundle.text.tokenizer_files import GENERATION_NAME
from loradeploy.errors import BundleError, DataError, ModelError, UsageError
from loradeploy.files import optional_json
from loradeploy.names import MODEL_CONFIG_NAME
from loradeploy.train.data.examples import SpokenText, Translation
from loradeploy.train.data.features import IGNORED, Encoded, padded, padded_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUDIO: Final = "audio"


def translation_features(
    examples: Sequence[Translation], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Token ids of each source (`input_ids`) and target (`labels`), at most `max_length` each.

    Both have the special tokens that the tokenizer puts around sources and targets. A target ends
    with the end-of-text token (in mBART followed by the language). It is added here if the
    tokenizer does not add it, because the model must learn to stop.

    Raises:
        DataError: a source or a target without tokens.
    """
    found: dict[str, Any] = {}
    truncated = set()
    for name, column in (("source", "text"), ("target", "text_target")):
        texts = [getattr(example, name) for example in examples]
        whole = tokenizer(**{column: texts})["input_ids"]
        found[name] = tokenizer(**{column: texts}, truncation=True, max_length=max_length)
        truncated |= {number for number, ids in enumerate(whole) if len(ids) > max_length}
    features: list[dict[str, Any]] = []
    for example, source, target in zip(
        examples, found["source"]["input_ids"], found["target"]["input_ids"], strict=True
    ):
        if not source or not target:
            raise DataError(f"{example.where}: a text has no tokens")
        labels = list(target)
        if tokenizer.eos_token_id not in (None, *labels[-2:]):
            labels = [*labels[: max_length - 1], tokenizer.eos_token_id]
        features.append({"input_ids": list(source), "labels": labels})
    return Encoded(features, len(truncated))


@dataclass(frozen=True)
class TargetCollator:
    """Pads sources and targets on the right: int64 `input_ids`, `attention_mask`, `labels`."""

    pad_id: int

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [feature["input_ids"] for feature in features]
        return {**padded_inputs(rows, self.pad_id), "labels": _labels(features)}


@dataclass(frozen=True)
class AudioSettings:
    """How a checkpoint's model takes audio: its features, and the initial tokens of transcripts.

    `start`: the first token, which is not a label. `positions`: the decoder's number of positions.
    """

    features: FeatureSettings
    settings: GenerationSettings
    forced: tuple[int | None, ...]
    start: int
    positions: int

    @classmethod
    def of(cls, directory: Path) -> AudioSettings:
        """The settings of the model in `directory`.

        Raises:
            ModelError: it has no preprocessor_config.json, or its files contradict each other.
        """
        try:
            features = feature_settings(directory)
            config = model_config(directory, error=ModelError)
            values = optional_json(directory / GENERATION_NAME, error=ModelError)
            settings = read_settings(values, GENERATION_NAME)
            forced = settings.forced_decoder_ids or forced_tokens(config, MODEL_CONFIG_NAME)
        except BundleError as problem:
            raise ModelError(f"{directory}: {problem}") from None
        if features is None:
            raise ModelError(
                f"{directory} has no {PREPROCESSOR_NAME}, which specifies how to compute features"
                " from audio"
            )
        frames = 2 * int(config.get("max_source_positions", 0))
        bands = config.get("num_mel_bins")
        if (features.mels, features.chunk_frames) != (bands, frames):
            raise ModelError(
                f"{directory}: {PREPROCESSOR_NAME} makes features of"
                f" {[features.mels, features.chunk_frames]} (bands, frames), the model takes"
                f" {[bands, frames]}"
            )
        start = settings.decoder_start_token_id
        start = config.get("decoder_start_token_id") if start is None else start
        if start is None:
            raise ModelError(f"{directory}: no decoder_start_token_id is in its files")
        positions = int(config.get("max_target_positions", 448))
        return cls(features, settings, forced, int(start), positions)

    def encode(
        self, examples: Sequence[SpokenText], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Encoded:
        """The audio file of each example (`audio`), and the tokens of its text (`labels`).

        As in generation, labels begin with the tokens for the language, the task and no timestamps,
        and end with the end-of-text token. `input_ids` are the same tokens; examples are sorted by
        their number.

        Raises:
            DataError: an audio file that cannot be read or is longer than the model takes at once,
                a text without tokens, or no language although the model has several.
        """
        most = min(max_length, self.positions)
        features, truncated = [], 0
        for example in examples:
            begin = self._begin(example)
            text = tokenizer(example.target, add_special_tokens=False)["input_ids"]
            if not text:
                raise DataError(f"{example.where}: target has no tokens")
            end = tokenizer.eos_token_id
            ids = [*begin, *text, end]
            if len(ids) > most:
                truncated += 1
                ids = [*ids[: most - 1], end]
            seconds = len(self._samples(example)) / self.features.rate
            if seconds > self.features.chunk:
                raise DataError(
                    f"{example.where}: {example.audio} lasts {seconds:.1f} s, the model takes"
                    f" {self.features.chunk} s at once: cut it into parts with a text each"
                )
            features.append(
                {
                    AUDIO: str(example.audio),
                    "digest": file_digest(example.audio),
                    "input_ids": ids,
                    "labels": list(ids),
                }
            )
        return Encoded(features, truncated)

    def collator(self, pad_id: int) -> AudioCollator:
        """The collator for these features."""
        return AudioCollator(self.features)

    def _begin(self, example: SpokenText) -> list[int]:
        try:
            prompt = SpeechPrompt.of(
                self.start,
                self.settings.speech or SpeechSettings(),
                self.forced,
                language=example.language,
                task=example.task,
                timestamps=False,
                what=example.where,
            )
        except UsageError as problem:
            raise DataError(str(problem)) from None
        if prompt.needs_language:
            raise DataError(
                f"{example.where}: the model has several languages: give `language` in each row,"
                f" or in the model's {GENERATION_NAME}"
            )
        return prompt.tokens()[1:]

    def _samples(self, example: SpokenText) -> Any:
        try:
            return read_wav(example.audio, self.features.rate).samples
        except DataError as problem:
            raise DataError(f"{example.where}: {problem}") from None


@dataclass(frozen=True)
class AudioCollator:
    """Reads the audio of a batch: float `input_features` [batch, bands, frames], and `labels`."""

    settings: FeatureSettings

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = [
            self.settings.of(read_wav(feature[AUDIO], self.settings.rate).samples)
            for feature in features
        ]
        stacked = torch.stack([torch.from_numpy(values) for values in inputs])
        return {"input_features": stacked, "labels": _labels(features)}


def _labels(features: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    rows = [feature["labels"] for feature in features]
    return torch.tensor(padded(rows, IGNORED, max(map(len, rows))))


def takes_audio(directory: Path) -> bool:
    """Whether the model in `directory` takes audio features."""
    return "num_mel_bins" in model_config(directory, error=ModelError)
