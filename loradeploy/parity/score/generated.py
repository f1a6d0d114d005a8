"""Held-out data of an encoder-decoder: scores of generated texts against target texts.

Both sides generate greedily. Texts generated from texts are scored by chrF (sacrebleu) and ROUGE-L,
averaged over examples; transcripts by the word error rate (jiwer), all errors divided by all target
words.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.audio.features import feature_settings
from loradeploy.bundle.audio.wav import read_wav
from loradeploy.bundle.text.beside import describes_texts, text_directory
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.bundle.text.tokenizer_files import GENERATION_NAME
from loradeploy.errors import MissingDependencyError, UsageError
from loradeploy.parity.score.measures import TRANSCRIPTION, TRANSLATION, rouge_l

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.runtime.session import AdapterSession
    from loradeploy.train.data.examples import SpokenText, Translation

# The libraries of the metrics.
_LIBRARIES: Final = {TRANSLATION: "sacrebleu", TRANSCRIPTION: "jiwer"}
# By how many tokens a generated text may exceed the longest target.
_ROOM: Final = 8


@dataclass(frozen=True)
class GeneratedTexts:
    """The sources, with their target texts. `most`: the largest number of generated tokens."""

    kind: str
    examples: tuple[Translation | SpokenText, ...]
    most: int

    @property
    def targets(self) -> list[str]:
        """The expected text of each example."""
        return [example.target for example in self.examples]

    def counts(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return chrF and ROUGE-L of `texts`, or their errors and words, [examples, 2]."""
        library: Any = import_module(_LIBRARIES[self.kind])
        pairs = zip(texts, self.targets, strict=True)
        if self.kind == TRANSLATION:
            chrf = library.metrics.CHRF()
            scores = [
                (chrf.sentence_score(text, [target]).score / 100, rouge_l(text, target))
                for text, target in pairs
            ]
            return np.array(scores, np.float64)
        rows = []
        for text, target in pairs:
            found = library.process_words(target, text)
            errors = found.substitutions + found.deletions + found.insertions
            rows.append((errors, found.hits + found.substitutions + found.deletions))
        return np.array(rows, np.float64)


def generated_texts(
    drawn: Sequence[Translation | SpokenText], features: Sequence[dict[str, Any]], *, audio: bool
) -> GeneratedTexts:
    """Make held-out data of the sampled examples `drawn`; `features`: their tokens.

    Raises:
        MissingDependencyError: the library of the metric is not installed.
    """
    kind = TRANSCRIPTION if audio else TRANSLATION
    try:
        import_module(_LIBRARIES[kind])
    except ImportError:
        raise MissingDependencyError(
            f"{kind}s are scored by {_LIBRARIES[kind]}, which is not installed: pip install"
            f" {_LIBRARIES[kind]}"
        ) from None
    most = _ROOM + max(len(feature["labels"]) for feature in features)
    return GeneratedTexts(kind, tuple(drawn), most)


def of_session(session: AdapterSession, data: GeneratedTexts, adapter: str | None) -> list[str]:
    """Return the texts that a bundle generates with an adapter."""
    from loradeploy.runtime.tasks.generation import TextGenerator
    from loradeploy.runtime.tasks.speech import SpeechRecognizer

    examples: Any = data.examples
    if session.manifest.mode == "merged":
        adapter = None
    if data.kind == TRANSLATION:
        sources = [example.source for example in examples]
        made = TextGenerator(session).generate(
            sources, adapter, max_new_tokens=data.most, batch_size=8
        )
        return [one.text for one in made]
    recognizer = SpeechRecognizer(session)
    texts: list[str] = []
    for example in examples:
        (transcript,) = recognizer.transcribe(
            example.audio,
            adapter,
            language=example.language,
            task=example.task,
            max_new_tokens=_within(data.most, session.path),
        )
        texts.append(transcript.text)
    return texts


def of_torch(model: Any, data: GeneratedTexts, bundle: Path, adapter: Path | None) -> list[str]:
    """Return the texts that transformers generates with the PyTorch model and its current adapter.

    The tokenizer and the generation_config.json are those beside `adapter`, if there are any, else
    the bundle's, as in a session.
    """
    import torch
    from transformers import GenerationConfig

    tokenizer, generation = Tokenizer(bundle), bundle
    if adapter is not None and describes_texts(beside := text_directory(adapter)):
        tokenizer = Tokenizer(beside, tokenizer)
        generation = beside if (beside / GENERATION_NAME).is_file() else bundle
    audio = data.kind == TRANSCRIPTION
    settings = copy.deepcopy(model.generation_config)
    if (generation / GENERATION_NAME).is_file():
        settings = GenerationConfig.from_pretrained(generation)
    most = _within(data.most, bundle) if audio else data.most
    settings.update(max_new_tokens=most, do_sample=False, num_beams=1)
    examples: Any = data.examples
    texts = []
    with torch.inference_mode():
        for example in examples:
            if not audio:
                ids = torch.tensor([tokenizer.encode(example.source)])
                mask = torch.ones_like(ids)
                found = model.generate(
                    input_ids=ids, attention_mask=mask, generation_config=settings
                )
                texts.append(tokenizer.decode(found[0].tolist()[1:]))  # without the start token
                continue
            features = feature_settings(bundle)
            if features is None:
                raise UsageError(f"{bundle} does not specify how to compute features from audio")
            sound = features.of(read_wav(example.audio, features.rate).samples)
            given = {"language": example.language, "task": example.task}
            found = model.generate(
                input_features=torch.from_numpy(sound)[None],
                generation_config=settings,
                **{name: value for name, value in given.items() if value is not None},
            )
            speech = tokenizer.settings.speech
            first = None if speech is None else speech.no_timestamps
            spoken = [t for t in found[0].tolist() if first is None or t <= first]
            texts.append(tokenizer.decode(spoken))
    return texts


def _within(most: int, bundle: Path) -> int:
    """Return `most`, limited to the positions that the decoder has after its first tokens."""
    from loradeploy.bundle.model_config import model_config

    positions = model_config(bundle).get("max_target_positions")
    return min(most, positions - _ROOM) if isinstance(positions, int) else most
