"""Transcribe audio with a Whisper bundle, each audio with its own adapter and language."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.tasks import SEQ2SEQ_LM
from loradeploy.bundle.audio.features import FeatureSettings, feature_settings
from loradeploy.bundle.audio.wav import checked_samples, read_wav
from loradeploy.bundle.names import INPUT_FEATURES, PREPROCESSOR_NAME
from loradeploy.errors import BundleError, DataError, UsageError, shown
from loradeploy.given_numbers import checked_count
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.arguments import Adapters, check_flag, each_row
from loradeploy.runtime.decoding.caches.source import Target
from loradeploy.runtime.decoding.choosing.options import GenerationOptions
from loradeploy.runtime.decoding.graph import DecoderGraph
from loradeploy.runtime.leased import leased_batches
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.speech.windows import ReadSound, SpeechProgress, Windows
from loradeploy.runtime.tasks.session_argument import check_session

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from loradeploy.runtime.decoding.choosing.options import GenerationFlags

    Audio = str | os.PathLike[str] | NDArray[np.floating]

# Longer audio should be split: its features alone take gigabytes.
MAX_SECONDS: Final = 4 * 3600
# Generation options that do not apply to transcripts, which may consist of several windows.
_REFUSED: Final = ("n", "stop", "logprobs")


@dataclass(frozen=True)
class Segment:
    """A part of a transcript with its start and end in the audio, in seconds."""

    start: float
    end: float
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Transcript:
    """The transcript of one audio.

    Args:
        text: without timestamps.
        token_ids: all generated tokens, including timestamps, without the initial and end tokens.
        segments: with `timestamps`, the parts of the text with their times; otherwise empty.
        language: the code of the given or detected language; None if the model has no languages.
        adapter: the adapter of the transcript.
        seconds: the duration of the audio.
    """

    text: str
    token_ids: tuple[int, ...]
    segments: tuple[Segment, ...]
    language: str | None
    adapter: AdapterSpec | None
    seconds: float


class SpeechRecognizer:
    """Transcribes and translates speech with a session on a Whisper bundle.

    `cache_budget`: see `TextGenerator`.

    Raises:
        UsageError: the bundle is for another task, takes text, or was exported without a cache.
        BundleError: it has no tokenizer or no preprocessor_config.json, or one that does not fit
            its graph.
    """

    def __init__(self, session: AdapterSession, *, cache_budget: int | None = None) -> None:
        check_session(session, type(self).__name__)
        if cache_budget is not None:
            cache_budget = checked_count("cache_budget", cache_budget)
        self.session = session
        self.features = _features_of(session)
        self.tokenizer = session.texts.base.tokenizer
        self._target = Target.of(session.path)
        self._graph = DecoderGraph.of(session, self.tokenizer.pad_id, source=True)
        self._budget = cache_budget

    def transcribe(
        self,
        audio: Audio | Sequence[Audio],
        adapters: Adapters = None,
        *,
        language: str | Sequence[str | None] | None = None,
        task: str | None = None,
        timestamps: bool | None = None,
        seed: int = 0,
        batch_size: int = 8,
        **options: Unpack[GenerationFlags],
    ) -> list[Transcript]:
        """Transcribe each audio. `adapters` is as in `AdapterSession.run`, one for each audio.

        Audio is a WAV file (PCM of 8, 16, 24 or 32 bits, or floats; channels are averaged), or an
        array of float samples [samples] from -1 to 1, at the model's sampling rate of 16 kHz.

        `language`: a code such as "en", or an English name; one for all, or one for each audio. By
        default, generation_config.json sets it, or the model detects it from the beginning of the
        audio. `task`: "transcribe", or "translate" into English. `timestamps`: whether to return
        segments with times, which can change the text.

        Audio longer than the model's 30 s is transcribed window by window, as in transformers:
        always with timestamps, and each window begins where the last segment before it ends.
        `options`: fields of `GenerationOptions` except `n`, `stop` and `logprobs`; `max_new_tokens`
        is the limit of each window, by default all positions of the model.

        Raises:
            UsageError: no audio, a language or a task that the model does not have,
                timestamps=False for long audio, or a setting out of range.
            DataError: a file that is missing, not a WAV file, or has another rate or encoding;
                samples that are empty, not finite, or longer than 4 hours.
            UnknownAdapterError: an adapter that was never loaded.
            BundleError: a generation_config.json names tokens outside of the vocabulary.
            BudgetError: a batch that needs more memory than is available.
            RunError: the graph gave logits that are not finite.
        """
        sounds = _listed(audio)
        spoken = _each(language, len(sounds))
        each = each_row(adapters, len(sounds))
        batch_size = checked_count("batch_size", batch_size)
        own = _options(options)
        if timestamps is not None:
            check_flag("timestamps", timestamps)

        def read(number: int) -> ReadSound:
            return self._read(number, sounds[number], each[number])

        windows = Windows(
            graph=self._graph,
            features=self.features,
            target=self._target,
            options=own,
            given="max_new_tokens" in options,
            budget=self._budget,
            languages=spoken,
            task=task,
            timestamps=timestamps,
            seed=seed,
        )
        results: dict[int, Transcript] = {}
        for start in range(0, len(sounds), batch_size):
            numbers = range(start, min(start + batch_size, len(sounds)))
            for batch, held in leased_batches(
                self.session,
                [[read(number) for number in numbers]],
                lambda batch: [sound.adapter for sound in batch],
                lambda batch: [[read(sound.number) for sound in batch]],
            ):
                for progress in windows.transcribe(batch, held):
                    results[progress.sound.number] = self._transcript(progress)
        return [results[number] for number in range(len(sounds))]

    def _read(self, number: int, sound: Audio, adapter: AdapterSpec | None) -> ReadSound:
        what = f"audio {number + 1}"
        if isinstance(sound, str | os.PathLike):
            samples = read_wav(sound, self.features.rate).samples
        else:
            samples = checked_samples(sound, what)
        seconds = len(samples) / self.features.rate
        if seconds > MAX_SECONDS:
            raise DataError(
                f"{what} lasts {seconds:,.0f} s, {MAX_SECONDS:,} s is the maximum: cut it into"
                " parts"
            )
        counts = self.session.texts.counts(adapter)
        side = self.session.texts.of(adapter)
        return ReadSound(number, samples, adapter, side, counts, what)

    def _transcript(self, progress: SpeechProgress) -> Transcript:
        decode = progress.sound.side.tokenizer.decode
        segments = tuple(
            Segment(round(start, 6), round(end, 6), decode(progress.text_of(ids)), ids)
            for start, end, ids in progress.segments
        )
        ids = tuple(token for _, _, part in progress.segments for token in part)
        return Transcript(
            text=decode(progress.text_of(ids)),
            token_ids=ids,
            segments=segments if progress.timestamps else (),
            language=progress.language,
            adapter=progress.sound.adapter,
            seconds=len(progress.sound.samples) / self.features.rate,
        )


def takes_audio(session: AdapterSession) -> bool:
    """Whether a session's bundle is for a SpeechRecognizer."""
    encoder = session.manifest.encoder
    return encoder is not None and INPUT_FEATURES in encoder.inputs


def _features_of(session: AdapterSession) -> FeatureSettings:
    """The feature settings of the bundle, checked against its graph."""
    manifest = session.manifest
    if manifest.task != SEQ2SEQ_LM:
        raise UsageError(f"{session.path} is a {manifest.task} bundle: it takes no audio")
    if manifest.encoder is None:
        raise UsageError(f"{session.path} has no cache: export it again to transcribe with it")
    if not takes_audio(session):
        raise UsageError(
            f"{session.path} takes {manifest.encoder.inputs[0]}, not audio: use TextGenerator"
        )
    settings = feature_settings(session.path)
    if settings is None:
        raise BundleError(
            f"{session.path} has no {PREPROCESSOR_NAME}, which specifies how to compute features"
            " from audio: put it into the base model's directory, and export again"
        )
    taken = next(spec.shape for spec in manifest.inputs if spec.name == INPUT_FEATURES)
    made = (settings.mels, settings.chunk_frames)
    if tuple(taken[1:]) != made:
        raise BundleError(
            f"{session.path / PREPROCESSOR_NAME} makes features of {list(made)} (bands, frames),"
            f" the graph takes {list(taken[1:])}"
        )
    return settings


def _listed(audio: Audio | Sequence[Audio]) -> list[Audio]:
    if isinstance(audio, str | os.PathLike | np.ndarray):
        return [audio]
    if not isinstance(audio, Sequence) or isinstance(audio, bytes):
        raise UsageError(f"audio is {shown(audio)}: give a WAV file, samples, or a list of them")
    if not audio:
        raise UsageError("there is no audio")
    if isinstance(audio[0], float):
        raise UsageError("audio is a list of numbers: give samples as a numpy array")
    return list(audio)


def _each(language: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    """The language of each audio."""
    if language is None or isinstance(language, str):
        return [language] * count
    if not isinstance(language, Sequence) or len(language) != count:
        raise UsageError(f"`language` is {shown(language)}: give one, or one for each of {count}")
    return list(language)


def _options(options: Mapping[str, Any]) -> GenerationOptions:
    if refused := [name for name in _REFUSED if name in options]:
        raise UsageError(f"`{refused[0]}` is only for texts: an audio file has one transcript")
    return GenerationOptions.of(options)
