"""Whether the files beside the graph mean what the model's files mean: numbers do not show those.

The files of the base are written again as an export writes them, and compared by their meaning:

tokenizer          the words, the tokens of texts, and the side on which long texts are cut
chat template      its source
start token        the one that an encoder-decoder's text begins with
end tokens         those that end a generated text
positions          the maximum number of tokens of a text
pooling            how an embedder's states become a vector
scores of pairs    the activation and the prompts of a cross-encoder
generation         penalties, suppressed and forced tokens, and others that change the chosen text
labels             the names of a classifier's outputs
problem type       how a classifier's outputs become scores
image processor    the size and the normalization of images
audio features     the window and the bands of a sound's spectrum
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.heads import (
    SINGLE_LABEL,
    config_labels,
    placeholders,
    problem_of,
    stated_problem,
    usual_problem,
)
from loradeploy.adapter.tasks import (
    CLASSIFICATIONS,
    FEATURE_EXTRACTION,
    GENERATING,
    SEQ2SEQ_LM,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)
from loradeploy.bundle.audio.features import feature_settings
from loradeploy.bundle.fitting.labels import output_count
from loradeploy.bundle.image.pixels import processor_values
from loradeploy.bundle.model_config import context_length, model_config, rotary_limit
from loradeploy.bundle.names import (
    CONFIG_NAME,
    INPUT_FEATURES,
    INPUT_IDS,
)
from loradeploy.bundle.text.beside import vocabulary_of
from loradeploy.bundle.text.scoring import read_scoring
from loradeploy.bundle.text.settings import GenerationSettings
from loradeploy.bundle.text.speech import SpeechSettings
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.bundle.text.tokenizer_files import TOKENIZER_NAME
from loradeploy.bundle.text.vectors.recipe import read_recipe
from loradeploy.disk import scratch_directory
from loradeploy.errors import BundleError, LoraDeployError, ModelError, first_line, shown
from loradeploy.export.assets import AssetSources, write_assets
from loradeploy.export.building.config import with_positions
from loradeploy.export.tokenizers import first_difference
from loradeploy.files import write_json
from loradeploy.lora.quiet import quiet_loradeploy
from loradeploy.parity.checks.adapters import differing_adapters
from loradeploy.parity.checks.manifest import differing_manifest
from loradeploy.parity.checks.required import differing_required
from loradeploy.parity.inputs.prompts import PROMPTS
from loradeploy.parity.report.results import Result
from loradeploy.runtime.decoding.caches.source import Target

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest
    from loradeploy.parity.context import CheckContext

BACKEND: Final = "files"
_TITLE: Final = "files of the bundle"
_BESIDE: Final = "put the model's files beside the ONNX file and export again"
# Settings of generation that another aspect compares, that only sampling reads, or that the
# runtime does not apply.
_NOT_GREEDY: Final = ("decoder_start_token_id", "top_k", "top_p", "min_p", "ignored")


def differing_files(context: CheckContext) -> list[Result]:
    """Return a failed result for each meaning in which the bundle's files differ from the model's.

    A bundle of an ONNX file has the files beside it. Those that it lacks, and without which the
    runtime refuses a text, are not a difference.
    """
    found = [
        *differing_manifest(context),
        *differing_required(context),
        *differing_adapters(context),
    ]
    with scratch_directory() as expected:
        try:
            with quiet_loradeploy():
                write_expected(context, expected)
        except LoraDeployError as problem:
            message = f"they cannot be compared with those of {context.model}: {problem}"
            found.append(("all", message))
        else:
            found += _differences(context, expected)
    return [failed(aspect, message) for aspect, message in found]


def failed(aspect: str, message: str) -> Result:
    """The result for an aspect of the bundle's files that is not the model's."""
    return Result(BACKEND, _TITLE, None, None, "failed", message, aspect=aspect)


def write_expected(context: CheckContext, directory: Path) -> None:
    """Write the files of the base, or of the merged adapter, as an export writes them."""
    config = model_config(context.model, error=ModelError)
    merged = {a.name: a.path for a in context.adapters} if context.merged else {}
    own = model_config(context.bundle)
    size = own.get("vocab_size")
    changed = merged and type(size) is int and size != config.get("vocab_size")
    if changed:
        config["vocab_size"] = size
    if (limit := rotary_limit(config)) is not None:
        config = with_positions(config, limit)
    sources = AssetSources(context.model, (context.model,), merged, size if changed else None)
    _, config = write_assets(directory, context.manifest, config, sources)
    write_json(directory / CONFIG_NAME, config)


@dataclass(frozen=True)
class _Pair:
    """The directories of the two sides, and what the check knows about them."""

    bundle: Path
    expected: Path
    context: CheckContext

    @property
    def manifest(self) -> Manifest:
        return self.context.manifest

    @property
    def traced(self) -> bool:
        """Whether the bundle's files were written from the model's, not from others."""
        return self.manifest.traced

    @cached_property
    def tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """Those of the bundle and of the expected files, which several aspects compare."""
        return Tokenizer(self.bundle), Tokenizer(self.expected)

    def both(self, read: Callable[[Path], Any]) -> tuple[Any, Any]:
        """What `read` returns for the bundle and for the expected files."""
        return read(self.bundle), read(self.expected)


def _differences(context: CheckContext, expected: Path) -> Iterator[tuple[str, str]]:
    pair = _Pair(context.bundle, expected, context)
    for aspect, compare in _ASPECTS.items():
        try:
            message = compare(pair)
        except LoraDeployError as problem:
            message = first_line(problem)
        if message is not None:
            again = "export again" if pair.traced else _BESIDE
            yield aspect, f"{message}: {again}, or check with the model that it was made from"


def _tokenizer(pair: _Pair) -> str | None:
    if not (pair.expected / TOKENIZER_NAME).is_file():
        return None
    if not (pair.bundle / TOKENIZER_NAME).is_file():
        if not pair.traced:
            return None
        return f"the bundle has no {TOKENIZER_NAME}, and the model has a tokenizer"
    ours, theirs = pair.tokenizers
    with ours.library() as own, theirs.library() as other:
        words = _first_word(own.get_vocab(), other.get_vocab())
        if words is not None:
            return f"the tokenizer has another vocabulary than the model's: {words}"
        size = vocabulary_of(pair.manifest, model_config(pair.bundle))
        text = first_difference(own, other, size, PROMPTS)
    if text is not None:
        return f"the tokenizer makes other tokens of {shown(text)} than the model's"
    if ours.special_tokens != theirs.special_tokens:
        return _values("the special tokens are", ours.special_tokens, theirs.special_tokens)
    if ours.truncation_side != theirs.truncation_side:
        return _values("texts are cut on the", ours.truncation_side, theirs.truncation_side)
    if ours.token_types != theirs.token_types and (pair.traced or ours.token_types is not None):
        return _values("token types of pairs:", ours.token_types, theirs.token_types)
    return None


def _first_word(own: Mapping[str, int], other: Mapping[str, int]) -> str | None:
    for word in sorted({*own, *other}):
        if own.get(word) != other.get(word):
            return f"{shown(word)} is {own.get(word)}, expected {other.get(word)}"
    return None


def _chat_template(pair: _Pair) -> str | None:
    if not _has_tokenizers(pair):
        return None
    ours, theirs = (tokenizer.template for tokenizer in pair.tokenizers)
    if ours == theirs or (ours is None and not pair.traced):
        return None
    return "the chat template is not the model's"


def _start_token(pair: _Pair) -> str | None:
    if pair.manifest.task != SEQ2SEQ_LM or not _has_tokenizers(pair):
        return None
    ours, theirs = pair.both(lambda place: Target.of(place).first(Tokenizer(place).settings))
    return None if ours == theirs else _values("the token that begins a text is", ours, theirs)


def _end_tokens(pair: _Pair) -> str | None:
    if pair.manifest.task not in GENERATING or not _has_tokenizers(pair):
        return None
    ours, theirs = (sorted(tokenizer.eos_ids) for tokenizer in pair.tokenizers)
    return None if ours == theirs else _values("the tokens that end a text are", ours, theirs)


def _has_tokenizers(pair: _Pair) -> bool:
    return all(pair.both(lambda place: (place / TOKENIZER_NAME).is_file()))


def _positions(pair: _Pair) -> str | None:
    """An image has none, but the config of a model with two towers has those of its texts."""
    if all(spec.name != INPUT_IDS for spec in pair.manifest.inputs):
        return None
    ours, theirs = pair.both(lambda place: context_length(model_config(place)))
    if ours != theirs and (pair.traced or ours is not None):
        return _values("the number of positions is", ours, theirs)
    if not _has_tokenizers(pair):
        return None
    ours, theirs = (tokenizer.max_length for tokenizer in pair.tokenizers)
    if ours == theirs or (ours is None and not pair.traced):
        return None
    return _values("the tokens of a text are at most", ours, theirs)


def _pooling(pair: _Pair) -> str | None:
    if pair.manifest.task != FEATURE_EXTRACTION or pair.manifest.tower is not None:
        return None
    ours, theirs = pair.both(read_recipe)
    if ours is None and theirs is None:
        return None
    same = ours is not None and theirs is not None and ours.same(theirs)
    return None if same else "the files of an embedding's pooling are not the model's"


def _scores_of_pairs(pair: _Pair) -> str | None:
    if pair.manifest.task != SEQUENCE_CLASSIFICATION:
        return None
    ours, theirs = pair.both(read_scoring)
    return None if ours == theirs else "the files of a cross-encoder's scores are not the model's"


def _labels(pair: _Pair) -> str | None:
    """The names may be those of the model or of an adapter's head."""
    if pair.manifest.task not in CLASSIFICATIONS:
        return None
    ours, theirs = pair.both(lambda place: _names(pair.manifest, model_config(place)))
    usual = placeholders(len(ours or theirs))
    if not ours and (not theirs or theirs == usual):
        return None
    known = [a.adapter.labels for a in pair.context.adapters if a.adapter.labels is not None]
    if len(theirs) == len(ours):
        known.append(theirs)
    if ours in map(tuple, known) or (ours == usual and len(theirs) != len(ours)):
        return None
    return _values("the labels are", ours, known[-1] if known else usual)


def _names(manifest: Manifest, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names as classifiers read them; empty if there are none."""
    count = output_count(manifest, config)
    return config_labels(config, CONFIG_NAME, error=BundleError, outputs=count) or ()


def _problem_type(pair: _Pair) -> str | None:
    """Whether the scores are a softmax, sigmoids or the outputs themselves."""
    shown_by_graph = pair.manifest.probabilities is not None
    if shown_by_graph and pair.traced:
        return f"the graph ends in {shown(pair.manifest.probabilities)}, which are no probabilities"
    ours = pair.manifest.problem_type
    if pair.manifest.task == TOKEN_CLASSIFICATION and ours is not None and pair.traced:
        return None if ours == SINGLE_LABEL else _values("the problem_type is", ours, SINGLE_LABEL)
    if pair.manifest.task != SEQUENCE_CLASSIFICATION:
        return None
    config = model_config(pair.expected)
    count = output_count(pair.manifest, config)
    stated = stated_problem(config, CONFIG_NAME, error=BundleError)
    if shown_by_graph and stated is None:
        return None  # what the operator shows, see the export
    expected = stated or usual_problem(count)
    if pair.context.merged:
        (tested,) = pair.context.adapters
        expected = problem_of(tested.adapter, stated, count)
    return None if ours == expected else _values("the problem_type is", ours, expected)


def _generation(pair: _Pair) -> str | None:
    """Those that the runtime applies without being asked; a sampled text may differ anyway."""
    if pair.manifest.task not in GENERATING or not _has_tokenizers(pair):
        return None
    ours, theirs = (tokenizer.settings for tokenizer in pair.tokenizers)
    for field in fields(GenerationSettings):
        own, expected = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name not in _NOT_GREEDY and own != expected:
            if isinstance(own, SpeechSettings) and isinstance(expected, SpeechSettings):
                return _first_field(own, expected)
            return _values(f"generation setting {field.name}:", own, expected)
    return None


def _first_field(own: SpeechSettings, expected: SpeechSettings) -> str | None:
    """Name the first of the settings of speech that differs."""
    for field in fields(SpeechSettings):
        values = getattr(own, field.name), getattr(expected, field.name)
        if values[0] != values[1]:
            return _values(f"generation setting {field.name} of speech:", *values)
    return None


def _image_processor(pair: _Pair) -> str | None:
    if _hears(pair):  # the file has the settings of a sound's features
        return None
    ours, theirs = ({} if found is None else found[0] for found in pair.both(processor_values))
    if not theirs:
        return None
    keys = [key for key in dict.fromkeys([*theirs, *ours]) if ours.get(key) != theirs.get(key)]
    if not keys:
        return None
    return _values(f"the image processor's {keys[0]} is", ours.get(keys[0]), theirs.get(keys[0]))


def _audio_features(pair: _Pair) -> str | None:
    if not _hears(pair):
        return None
    ours, theirs = feature_settings(pair.bundle), feature_settings(pair.context.model)
    return None if ours == theirs else _values("the features of audio are", ours, theirs)


def _hears(pair: _Pair) -> bool:
    return any(spec.name == INPUT_FEATURES for spec in pair.manifest.inputs)


def _values(what: str, own: object, expected: object) -> str:
    return f"{what} {shown(own)}, expected {shown(expected)}"


_ASPECTS: Final[Mapping[str, Callable[[_Pair], str | None]]] = {
    "tokenizer": _tokenizer,
    "chat template": _chat_template,
    "start token": _start_token,
    "end tokens": _end_tokens,
    "positions": _positions,
    "pooling": _pooling,
    "scores of pairs": _scores_of_pairs,
    "generation": _generation,
    "labels": _labels,
    "problem type": _problem_type,
    "image processor": _image_processor,
    "audio features": _audio_features,
}
