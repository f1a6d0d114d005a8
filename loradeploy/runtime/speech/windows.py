"""Transcribe audio window by window.

A window has as many frames as the encoder takes. The next one starts where the last complete
segment ends (see `timestamps.parts_of`), until the end of the audio. The windows of a batch are
encoded together, and decoded together if their prompts have one length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.bundle.audio.features import FeatureSettings
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import CONFIG_NAME, INPUT_FEATURES
from loradeploy.bundle.text.speech import SpeechSettings, check_speech_tokens, forced_tokens
from loradeploy.bundle.text.speech_prompt import SpeechPrompt
from loradeploy.bundle.text.tokenizer_files import GENERATION_NAME
from loradeploy.errors import UsageError
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.decoding.caches.memory import check_memory
from loradeploy.runtime.decoding.caches.rows import CachedRows
from loradeploy.runtime.decoding.caches.source import EncodedSource, Target
from loradeploy.runtime.decoding.choosing.logprobs import check_logits
from loradeploy.runtime.decoding.choosing.options import GenerationOptions
from loradeploy.runtime.decoding.graph import DecoderGraph, NewTokens
from loradeploy.runtime.decoding.loop import DecodingBatch
from loradeploy.runtime.decoding.prompts.requests import sequences_of
from loradeploy.runtime.held import HeldAdapters
from loradeploy.runtime.speech.timestamps import TimestampRules, parts_of, text_tokens
from loradeploy.runtime.text.sides import TextSide

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from loradeploy.runtime.adapters.resident import Resident
    from loradeploy.runtime.decoding.choosing.beams import BeamSearch
    from loradeploy.runtime.decoding.choosing.samples import Samples
    from loradeploy.runtime.running.feeds import Feeds

# Frames per timestamp: the encoder halves the number of frames.
_STRIDE: Final = 2


@dataclass(frozen=True, eq=False)
class ReadSound:
    """The samples of an audio with its adapter. `counts`: see `ReadText`."""

    number: int
    samples: NDArray[np.float32]
    adapter: AdapterSpec | None
    side: TextSide
    counts: tuple[int, ...]
    what: str


@dataclass(eq=False)
class SpeechProgress:
    """An audio that is being transcribed. `seek`: the frame at which the next window starts.

    `found`: the detected language. `segments`: start and end in seconds, and tokens.
    """

    sound: ReadSound
    prompt: SpeechPrompt
    features: NDArray[np.float32]  # [mels, frames]
    seek: int = 0
    found: int | None = None
    windows: int = 0
    segments: list[tuple[float, float, tuple[int, ...]]] = field(default_factory=list)

    @property
    def timestamps(self) -> bool:
        """Whether its text has timestamps."""
        return self.prompt.timestamps

    @property
    def first(self) -> int | None:
        """The first timestamp's token; None if the model has none."""
        known = self.prompt.settings.no_timestamps
        return None if known is None else known + 1

    @property
    def tokens(self) -> list[int]:
        """The decoder's prompt for each window."""
        return self.prompt.tokens(self.found)

    @property
    def language(self) -> str | None:
        """The code of its language."""
        return self.prompt.language_of(self.tokens)

    @property
    def unfinished(self) -> bool:
        """Whether there are further windows."""
        return self.seek < int(self.features.shape[1])

    def text_of(self, ids: Sequence[int]) -> list[int]:
        """The tokens of `ids` that are text."""
        return text_tokens(ids, self.first, self.sound.side.ends)


class _HeldRows:
    """Some rows of held adapters, renumbered from 0."""

    def __init__(self, held: HeldAdapters, rows: Sequence[int]) -> None:
        self._held, self._rows = held, rows
        held.take_rows(rows)

    def take_rows(self, rows: Sequence[int], /) -> None:
        self._held.take_rows([self._rows[row] for row in rows])

    def resident(self, number: int, /) -> Resident | None:
        return self._held.resident(self._rows[number])

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        feeds: Feeds,
        *,
        buffers: Mapping[str, onnxruntime.OrtValue] | None = None,
    ) -> list[onnxruntime.OrtValue]:
        return self._held.run_with_ort_values(output_names, feeds, buffers=buffers)


@dataclass(frozen=True, eq=False)
class Windows:
    """The arguments of a call. `given`: whether `options` include max_new_tokens."""

    graph: DecoderGraph
    features: FeatureSettings
    target: Target
    options: GenerationOptions
    given: bool
    budget: int | None
    languages: Sequence[str | None]
    task: str | None
    timestamps: bool | None
    seed: int

    def transcribe(
        self, batch: Sequence[ReadSound], held: HeldAdapters
    ) -> Iterator[SpeechProgress]:
        """Transcribe a batch; yield the results when all are complete.

        Raises:
            UsageError, BundleError, BudgetError, RunError: as `SpeechRecognizer.transcribe`.
        """
        batch_progress = [self._begun(sound) for sound in batch]
        while unfinished := [row for row, one in enumerate(batch_progress) if one.unfinished]:
            self._step(batch_progress, unfinished, held)
        yield from batch_progress

    def _begun(self, sound: ReadSound) -> SpeechProgress:
        features = self.features.of(sound.samples)
        long = features.shape[1] > self.features.chunk_frames
        own = sound.side.settings
        speech = own.speech or SpeechSettings()
        timestamps = speech.timestamps if self.timestamps is None else self.timestamps
        if long and self.timestamps is False:
            raise UsageError(
                f"{sound.what} lasts {len(sound.samples) / self.features.rate:.1f} s, more than the"
                f" {self.features.chunk} s of a window: windows follow timestamps, so leave out"
                " timestamps=False"
            )
        forced = own.forced_decoder_ids
        if not forced:
            path = self.graph.session.path
            forced = forced_tokens(model_config(path), str(path / CONFIG_NAME))
        (start,) = self.target.begin(own, sound.what)
        vocabulary = self.graph.session.limits.vocabulary
        where = f"{sound.what}: {GENERATION_NAME}"
        check_speech_tokens(speech, (start, *forced), vocabulary, where)
        prompt = SpeechPrompt.of(
            start,
            speech,
            forced,
            language=self.languages[sound.number],
            task=self.task,
            timestamps=timestamps or long,
            what=sound.what,
        )
        return SpeechProgress(sound, prompt, features)

    def _step(
        self, batch_progress: Sequence[SpeechProgress], rows: Sequence[int], held: HeldAdapters
    ) -> None:
        """Transcribe the next window of `rows`."""
        windows = np.stack([self._window(batch_progress[row]) for row in rows])
        adapters = _HeldRows(held, rows)
        source = EncodedSource.of_feeds(self.graph.session, adapters, {INPUT_FEATURES: windows}, {})
        if any(
            batch_progress[row].prompt.needs_language and batch_progress[row].found is None
            for row in rows
        ):
            self._find_languages([batch_progress[row] for row in rows], adapters, source)
        lengths = {row: len(batch_progress[row].tokens) for row in rows}
        for length in sorted(set(lengths.values())):
            alike = [at for at, row in enumerate(rows) if lengths[row] == length]
            part = EncodedSource(source.inputs)
            if len(alike) < len(rows):
                part.take_rows(alike)
            some = [rows[at] for at in alike]
            self._decode([batch_progress[row] for row in some], _HeldRows(held, some), part)

    def _window(self, one: SpeechProgress) -> NDArray[np.float32]:
        size = self.features.chunk_frames
        own = one.features[:, one.seek : one.seek + size]
        return np.pad(own, ((0, 0), (0, size - own.shape[1])))

    def _find_languages(
        self, batch_progress: Sequence[SpeechProgress], adapters: _HeldRows, source: EncodedSource
    ) -> None:
        """Detect the language of each audio without one, by its first window."""
        ids = np.array([[one.prompt.start] for one in batch_progress], np.int64)
        rows = CachedRows(self.graph, len(ids), 1, source)
        logits = rows.read(adapters, NewTokens.single(ids, np.ones_like(ids)))
        for one, values in zip(batch_progress, logits, strict=True):
            if one.prompt.needs_language and one.found is None:
                check_logits(values, one.sound.what)
                tokens = sorted(one.prompt.settings.languages.values())
                one.found = tokens[int(values[tokens].argmax())]

    def _decode(
        self, batch_progress: Sequence[SpeechProgress], adapters: _HeldRows, source: EncodedSource
    ) -> None:
        """Decode a window of each audio; their prompts have one length."""
        sequences = [self._sequences(one) for one in batch_progress]
        check_memory(
            self.graph.session,
            self.budget,
            [len(own.prompt) for own in sequences],
            [self.options.num_beams] * len(sequences),
            [own.limit for own in sequences],
        )
        for _ in DecodingBatch.of(self.graph, adapters, sequences, source).steps():
            pass
        for one, own in zip(batch_progress, sequences, strict=True):
            self._keep(one, own.result(0).ids)

    def _sequences(self, one: SpeechProgress) -> Samples | BeamSearch:
        prompt, side, own = one.tokens, one.sound.side, one.prompt.settings
        seed = self.seed
        if one.windows:  # each window has its own random numbers
            seed = int(np.random.SeedSequence([self.seed, one.windows]).generate_state(1)[0])
        rules = None
        if one.timestamps and own.no_timestamps is not None:
            end = min(side.ends, default=own.no_timestamps)
            rules = TimestampRules(own.no_timestamps, end, own.max_initial_timestamp)
        limit = self._limit(len(prompt), own, one.sound.what)
        return sequences_of(prompt, side, self.options, seed, limit, one.sound.what, rules)

    def _limit(self, first: int, own: SpeechSettings, what: str) -> int:
        """The maximum number of tokens of a window's text."""
        room = self.target.positions
        if room is not None and first >= room:
            raise UsageError(
                f"{what}: its first {first} tokens fill the decoder's {room} positions"
            )
        if self.given:
            return self.target.room(first, self.options.max_new_tokens)
        most = [size for size in (own.max_length, None if room is None else room - first) if size]
        return min(most, default=self.options.max_new_tokens)

    def _keep(self, one: SpeechProgress, ids: tuple[int, ...]) -> None:
        """Store the segments of a window, and set the start of the next one."""
        frames = min(self.features.chunk_frames, one.features.shape[1] - one.seek)
        parts, behind = parts_of(ids, one.first, frames // _STRIDE)
        begin, step = self._seconds(one.seek), self._seconds(_STRIDE)
        one.segments += [(begin + p.start * step, begin + p.end * step, p.ids) for p in parts]
        one.windows += 1
        # If the last pair is at 0 seconds, the same window would be transcribed forever.
        one.seek += frames if not behind else behind * _STRIDE

    def _seconds(self, frames: int) -> float:
        return frames * self.features.hop / self.features.rate
