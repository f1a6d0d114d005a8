"""Whether a bundle's texts are read and written as the model's.

tokenizer          the words, the tokens of texts, and the side on which long texts are cut
chat template      its source
start token        the one that an encoder-decoder's text begins with
end tokens         those that end a generated text
positions          the maximum number of tokens of a text
generation         penalties, suppressed and forced tokens, and others that change the chosen text
genai config       the tokens and the graph's names for onnxruntime-genai
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Final

from loradeploy.adapter.tasks import CAUSAL_LM, GENERATING, SEQ2SEQ_LM
from loradeploy.bundle.model_config import context_length, model_config
from loradeploy.bundle.names import GENAI_CONFIG_NAME, INPUT_IDS
from loradeploy.bundle.text.beside import vocabulary_of
from loradeploy.bundle.text.settings import GenerationSettings
from loradeploy.bundle.text.speech import SpeechSettings
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.bundle.text.tokenizer_files import GENERATION_NAME, TOKENIZER_NAME
from loradeploy.errors import BundleError, shown
from loradeploy.export.files.genai import genai_config, whisper_config
from loradeploy.export.files.tokenizers import first_difference
from loradeploy.files import optional_json, read_json
from loradeploy.parity.checks.files.pair import Pair, differ
from loradeploy.parity.inputs.prompts import PROMPTS
from loradeploy.runtime.decoding.caches.source import Target

# Settings of generation that another aspect compares, that only sampling reads, or that the
# runtime does not apply.
_NOT_GREEDY: Final = ("decoder_start_token_id", "top_k", "top_p", "min_p", "ignored")
# Parts of tokenizer.json that the runtime does not use.
_NOT_RULES: Final = ("version", "truncation", "padding")


def _tokenizer(pair: Pair) -> str | None:
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
        rules = _rules(own), _rules(other)
    if text is not None:
        return f"the tokenizer makes other tokens of {shown(text)} than the model's"
    if pair.traced and rules[0] != rules[1]:
        name, *values = _first_rule(*rules)
        return differ(f"{TOKENIZER_NAME}: {name} is", *values)
    if ours.special_tokens != theirs.special_tokens:
        return differ("the special tokens are", ours.special_tokens, theirs.special_tokens)
    if ours.truncation_side != theirs.truncation_side:
        return differ("texts are cut on the", ours.truncation_side, theirs.truncation_side)
    if ours.token_types != theirs.token_types and (pair.traced or ours.token_types is not None):
        return differ("token types of pairs:", ours.token_types, theirs.token_types)
    return None


def _rules(tokenizer: Any) -> Mapping[str, Any]:
    """The rules of a tokenizer, which texts other than those tried may show."""
    rules: dict[str, Any] = json.loads(tokenizer.to_str())
    return {name: rules[name] for name in rules if name not in _NOT_RULES}


def _first_rule(own: Any, expected: Any, where: str = "") -> tuple[str, Any, Any]:
    """The first value in which two different rules differ, with its name."""
    steps: Iterable[Any] = ()
    if isinstance(own, dict) and isinstance(expected, dict):
        steps = {**expected, **own}
        sides = own, expected
    elif isinstance(own, list) and isinstance(expected, list):
        steps = range(max(len(own), len(expected)))
        sides = dict(enumerate(own)), dict(enumerate(expected))
    for step in steps:
        mine, theirs = (side.get(step) for side in sides)
        if mine != theirs:
            return _first_rule(mine, theirs, f"{where}.{step}" if where else str(step))
    return where, own, expected


def _first_word(own: Mapping[str, int], other: Mapping[str, int]) -> str | None:
    for word in sorted({*own, *other}):
        if own.get(word) != other.get(word):
            return f"{shown(word)} is {own.get(word)}, expected {other.get(word)}"
    return None


def _chat_template(pair: Pair) -> str | None:
    if not _has_tokenizers(pair):
        return None
    ours, theirs = (tokenizer.template for tokenizer in pair.tokenizers)
    if ours == theirs or (ours is None and not pair.traced):
        return None
    return "the chat template is not the model's"


def _start_token(pair: Pair) -> str | None:
    if pair.manifest.task != SEQ2SEQ_LM or not _has_tokenizers(pair):
        return None
    ours, theirs = pair.both(lambda place: Target.of(place).first(Tokenizer(place).settings))
    return None if ours == theirs else differ("the token that begins a text is", ours, theirs)


def _end_tokens(pair: Pair) -> str | None:
    if pair.manifest.task not in GENERATING or not _has_tokenizers(pair):
        return None
    ours, theirs = (sorted(tokenizer.eos_ids) for tokenizer in pair.tokenizers)
    return None if ours == theirs else differ("the tokens that end a text are", ours, theirs)


def _has_tokenizers(pair: Pair) -> bool:
    return all(pair.both(lambda place: (place / TOKENIZER_NAME).is_file()))


def _positions(pair: Pair) -> str | None:
    """An image has none, but the config of a model with two towers has those of its texts."""
    if all(spec.name != INPUT_IDS for spec in pair.manifest.inputs):
        return None
    ours, theirs = pair.both(lambda place: context_length(model_config(place)))
    if ours != theirs and (pair.traced or ours is not None):
        return differ("the number of positions is", ours, theirs)
    if not _has_tokenizers(pair):
        return None
    ours, theirs = (tokenizer.max_length for tokenizer in pair.tokenizers)
    if ours == theirs or (ours is None and not pair.traced):
        return None
    return differ("the tokens of a text are at most", ours, theirs)


def _generation(pair: Pair) -> str | None:
    """Those that the runtime applies without being asked; a sampled text may differ anyway."""
    if pair.manifest.task not in GENERATING or not _has_tokenizers(pair):
        return None
    ours, theirs = (tokenizer.settings for tokenizer in pair.tokenizers)
    for field in fields(GenerationSettings):
        own, expected = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name not in _NOT_GREEDY and own != expected:
            if isinstance(own, SpeechSettings) and isinstance(expected, SpeechSettings):
                return _first_field(own, expected)
            return differ(f"generation setting {field.name}:", own, expected)
    return None


def _first_field(own: SpeechSettings, expected: SpeechSettings) -> str | None:
    """Name the first of the settings of speech that differs."""
    for field in fields(SpeechSettings):
        values = getattr(own, field.name), getattr(expected, field.name)
        if values[0] != values[1]:
            return differ(f"generation setting {field.name} of speech:", *values)
    return None


def _genai_config(pair: Pair) -> str | None:
    """The section `model`: how onnxruntime-genai searches and opens a session is up to its user."""
    file = pair.bundle / GENAI_CONFIG_NAME
    if not (pair.traced and file.is_file()):
        return None
    make = genai_config if pair.manifest.task == CAUSAL_LM else whisper_config
    values = optional_json(pair.expected / GENERATION_NAME, error=BundleError)
    made = make(pair.manifest, model_config(pair.expected), values) or {}
    own = read_json(file, error=BundleError)
    name, *found = _first_value(_genai_model(own), _genai_model(made))
    return None if name is None else differ(f"{file.name}: {name} is", *found)


def _genai_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    model = config.get("model")
    return model if isinstance(model, Mapping) else {}


def _first_value(
    own: Mapping[str, Any], expected: Mapping[str, Any], where: str = ""
) -> tuple[str | None, object, object]:
    """The first value of `expected` that `own` has otherwise, with its name; None if there is none.

    Earlier versions wrote fewer values.
    """
    for name, value in expected.items():
        mine = own.get(name, value)
        if name == "session_options" or mine == value:
            continue
        if isinstance(value, Mapping) and isinstance(mine, Mapping):
            found = _first_value(mine, value, f"{where}{name}.")
            if found[0] is None:
                continue
            return found
        return f"{where}{name}", mine, value
    return None, None, None


TEXTS: Final[Mapping[str, Callable[[Pair], str | None]]] = {
    "tokenizer": _tokenizer,
    "chat template": _chat_template,
    "start token": _start_token,
    "end tokens": _end_tokens,
    "positions": _positions,
    "generation": _generation,
    "genai config": _genai_config,
}
