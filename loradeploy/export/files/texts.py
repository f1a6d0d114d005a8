"""Copy the text files of adapters into the bundle, and report how they differ from the base's.

A trainer writes its tokenizer beside the adapter: the chat template of the training, the token that
ends a turn, words in spare rows of the embedding. sentence-transformers writes its modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

from loradeploy.adapter.tasks import CAUSAL_LM, FEATURE_EXTRACTION, SEQUENCE_CLASSIFICATION
from loradeploy.bundle.manifest import AdapterText, Manifest
from loradeploy.bundle.text.beside import (
    copy_recipe,
    digests_of,
    text_directory,
    text_files,
    vocabulary_of,
)
from loradeploy.bundle.text.scoring import read_scoring
from loradeploy.bundle.text.settings import GenerationSettings
from loradeploy.bundle.text.speech import SpeechSettings
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.bundle.text.tokenizer_files import (
    ADDED_NAME,
    GENERATION_NAME,
    SETTINGS_NAME,
    SPECIAL_NAME,
    TEMPLATE_NAME,
    TOKENIZER_NAME,
    special_tokens_of,
)
from loradeploy.bundle.text.vectors.recipe import read_recipe, recipe_directory
from loradeploy.disk import scratch_directory
from loradeploy.errors import (
    AdapterMismatchError,
    BundleError,
    LoraDeployError,
    listed_names,
    prefixing_errors,
)
from loradeploy.export.files.tokenizers import OLDER_TOKENIZERS, corrected_tokenizer, make_tokenizer
from loradeploy.files import copy_file, optional_json, write_json
from loradeploy.printable import logger_of

logger = logger_of(__name__)

_MORE_TEMPLATES: Final = "additional_chat_templates"
_LISTED: Final = 6
_SPECIAL: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
# What sentence-transformers' files specify, by task.
_SENTENCE_FILES: Final = {
    FEATURE_EXTRACTION: "pooling and prompts",
    SEQUENCE_CLASSIFICATION: "activation and prompts of pairs",
}


def is_embedding_model(directory: Path) -> bool:
    """Whether sentence-transformers' files declare the checkpoint an embedding model."""
    try:
        found = recipe_directory(directory)
        return found is not None and read_recipe(found) is not None
    except BundleError:
        return False


def check_recipe(directories: Sequence[Path], task: str) -> None:
    """Raise BundleError if `write_recipe` would, before anything is traced."""
    if task == FEATURE_EXTRACTION:
        for directory in directories:
            found = recipe_directory(text_directory(directory))
            if found is not None:
                read_recipe(found)


def write_recipe(directories: Sequence[Path], output: Path, task: str) -> dict[str, str]:
    """Copy the files of an embedder's vectors or a cross-encoder's scores; return their digests.

    The first of `directories` that has such files is used. If none has, an embedder's default is
    logged.

    Raises:
        BundleError: the files of vectors have a module of an unsupported kind.
    """
    for directory in directories:
        found, files = _sentence_files(text_directory(directory), task)
        if found is not None:
            return digests_of(output, copy_recipe(found, files, output))
    if task != FEATURE_EXTRACTION:
        return {}
    logger.warning(
        "%s has no modules.json with the pooling: a text's vector is the mean of its tokens'"
        " states, scaled to length 1",
        directories[-1],
    )
    return {}


def _sentence_files(directory: Path, task: str) -> tuple[Path | None, tuple[str, ...]]:
    """The directory of sentence-transformers' files for `task`, and their names, if there are any.

    Raises:
        BundleError: the files of vectors have a module of an unsupported kind.
    """
    found = recipe_directory(directory) if task in _SENTENCE_FILES else None
    if found is None:
        return None, ()
    own = read_recipe(found) if task == FEATURE_EXTRACTION else read_scoring(found)
    return (None, ()) if own is None else (found, own.files)


def write_texts(
    name: str,
    directory: Path,
    output: Path,
    base: Tokenizer | None,
    manifest: Manifest,
    vocabulary: int,
) -> AdapterText | None:
    """Copy the text files of the adapter in `directory`; None if they do not differ from the base.

    Differences are logged in one line. `vocabulary`: the number of tokens with the adapter.

    Raises:
        AdapterMismatchError: the tokenizer has words for which the graph has no row.
        BundleError: a file is invalid.
    """
    differences, files = [], []
    with (
        prefixing_errors(name, LoraDeployError),
        _with_tokenizer(text_directory(directory), vocabulary) as source,
    ):
        own = _own_tokenizer(source, base, manifest, vocabulary)
        if own is not None and (changes := _differences(own, base)):
            differences += changes
            files += _copy_text(source, output)
        found, own_files = _sentence_files(text_directory(directory), manifest.task)
        if found is not None:
            copied = copy_recipe(found, own_files, output)
            if digests_of(output, copied) != manifest.sentence:
                differences.append(_SENTENCE_FILES[manifest.task])
            files += copied
    if not differences:
        for file in files:
            (output / file).unlink()
            if (output / file).parent != output and not any((output / file).parent.iterdir()):
                (output / file).parent.rmdir()
        return None
    _log_differences(name, differences)
    return AdapterText(
        files=digests_of(output, files),
        chat_template=None if own is None else own.template,
        eos_token_ids=() if own is None else tuple(sorted(own.eos_ids)),
        generation={} if own is None else _declared(own.settings),
    )


def replace_texts(
    name: str, directory: Path, bundle: Path, manifest: Manifest, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Replace the base's text files by those of the merged adapter in `directory`.

    Returns the changes to config.json: the tokens that end a text and that pad rows.

    Raises:
        AdapterMismatchError: the tokenizer has words for which the graph has no row.
        BundleError: a file is invalid.
    """
    vocabulary = vocabulary_of(manifest, config)
    with (
        prefixing_errors(name, LoraDeployError),
        _with_tokenizer(text_directory(directory), vocabulary) as source,
    ):
        base = base_tokenizer(bundle)
        own = _own_tokenizer(source, base, manifest, vocabulary)
        if own is None or not (changes := _differences(own, base)):
            return {}
        if (source / TOKENIZER_NAME).is_file():
            for older in (*OLDER_TOKENIZERS, "merges.txt", ADDED_NAME):
                (bundle / older).unlink(missing_ok=True)
        before = optional_json(bundle / GENERATION_NAME, error=BundleError)
        _copy_text(source, bundle)
        _settle(bundle, own, before)
    _log_differences(name, changes)
    return _special_ids(own, manifest, vocabulary)


def _special_ids(own: Tokenizer, manifest: Manifest, vocabulary: int) -> dict[str, Any]:
    """The ids of special tokens for a decoder's config.json, by the tokenizer `own`."""
    if manifest.task != CAUSAL_LM:
        return {}  # a classifier's graph finds the end of a text by the base's padding token
    ends = sorted(own.eos_ids)
    found: dict[str, Any] = (
        {} if not ends else {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    )
    pad = own.vocabulary.get(own.special_tokens.get("pad_token", ""))
    if pad is not None and pad < vocabulary:
        found["pad_token_id"] = pad
    return found


def without_lost_ids(
    bundle: Path, config: Mapping[str, Any], vocabulary: int, task: str
) -> dict[str, Any]:
    """`config` without the ids of special tokens that are beyond the smaller `vocabulary`.

    They are removed from generation_config.json too, with a warning.

    Raises:
        AdapterMismatchError: no token that ends a text is left, or a classifier's padding token is
            removed.
    """
    generation = optional_json(bundle / GENERATION_NAME, error=BundleError)
    inner = config.get("text_config")
    found = {**config, **({} if not isinstance(inner, Mapping) else {"text_config": {**inner}})}
    objects = [found, generation, *([found["text_config"]] if "text_config" in found else [])]
    lost: dict[str, list[int]] = {}
    for role in _SPECIAL:
        left = 0
        for each in objects:
            ids = each.get(role)
            known = ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else []
            kept = [token for token in known if token < vocabulary]
            left += len(kept)
            if len(kept) < len(known):
                lost.setdefault(role, []).extend(t for t in known if t >= vocabulary)
                each[role] = kept if isinstance(ids, list) and kept else None
        ends = role == "eos_token_id" and task == CAUSAL_LM and not left
        if role in lost and (ends or (role == "pad_token_id" and task == SEQUENCE_CLASSIFICATION)):
            raise AdapterMismatchError(
                f"{role} of the base is {lost[role][0]}, and the adapter's vocabulary ends at"
                f" {vocabulary - 1}: give it in the adapter's tokenizer and generation_config.json"
            )
    if not lost:
        return found
    if generation:
        write_json(bundle / GENERATION_NAME, generation)
    listed = (f"{role} {', '.join(map(str, sorted(set(ids))))}" for role, ids in lost.items())
    logger.warning(
        "left out, the vocabulary of the merged bundle ends at %d: %s",
        vocabulary - 1,
        "; ".join(listed),
    )
    return found


def _declared(settings: GenerationSettings) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    usual = GenerationSettings()
    return {
        field.name: asdict(value) if isinstance(value, SpeechSettings) else value
        for field in fields(settings)
        if field.name != "ignored"
        and (value := getattr(settings, field.name)) != getattr(usual, field.name)
    }


def base_tokenizer(bundle: Path) -> Tokenizer | None:
    """The tokenizer in a bundle that is being written; None if it has none."""
    return Tokenizer(bundle) if (bundle / TOKENIZER_NAME).is_file() else None


@contextmanager
def _with_tokenizer(source: Path, vocabulary: int) -> Iterator[Path]:
    """`source`, or a copy with the tokenizer.json that transformers makes from its files.

    A copy is needed if the tokenizer is in older files only, or if other files change it.
    """
    has = (source / TOKENIZER_NAME).is_file()
    corrected = corrected_tokenizer(source, vocabulary) if has else None
    older = not has and any((source / name).is_file() for name in OLDER_TOKENIZERS)
    if corrected is None and not older:
        yield source
        return
    with scratch_directory() as made:
        _copy_text(source, made)
        if corrected is None:
            make_tokenizer(source, made)
        else:
            corrected.save(str(made / TOKENIZER_NAME))
        yield made


def _own_tokenizer(
    source: Path, base: Tokenizer | None, manifest: Manifest, vocabulary: int
) -> Tokenizer | None:
    """The adapter's tokenizer, checked against the graph; None if the adapter has none."""
    names = text_files(source)
    if not names or (base is None and TOKENIZER_NAME not in names):
        return None
    own = Tokenizer(source, base)
    own.check_words(vocabulary)
    if manifest.task == CAUSAL_LM and (base is None or own.settings != base.settings):
        warn_of_ignored(source.name, own.settings)
    return own


def _differences(own: Tokenizer, base: Tokenizer | None) -> list[str]:
    if base is None:
        return ["tokenizer"]
    found = []
    if own.template != base.template:
        found.append("chat template")
    if own.own_words:
        new = own.vocabulary.items() - base.vocabulary.items()
        words = (repr(word) for word, _ in sorted(new, key=lambda item: item[1]))
        words_listed = listed_names(words, _LISTED)
        found.append(f"tokenizer (new words: {words_listed})" if new else "tokenizer")
    elif own.special_tokens != base.special_tokens:
        found.append("special tokens")
    if own.eos_ids != base.eos_ids:
        found.append(f"end tokens ({', '.join(map(str, sorted(own.eos_ids)[:_LISTED]))})")
    if own.settings != base.settings:
        found.append("generation settings")
    return found


def _copy_text(source: Path, output: Path) -> list[str]:
    """Copy the adapter's text files; return their names."""
    more = sorted((source / _MORE_TEMPLATES).glob("*.jinja"))
    names = [*text_files(source), *(f"{_MORE_TEMPLATES}/{file.name}" for file in more)]
    for name in names:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source / name, output / name, error=BundleError)
    return names


def _settle(bundle: Path, own: Tokenizer, before: Mapping[str, Any]) -> None:
    """Write the settings that result from the adapter's files and the base's.

    `before`: the base's generation_config.json.
    """
    settings = optional_json(bundle / SETTINGS_NAME, error=BundleError)
    for role, token in own.special_tokens.items():
        declared = settings.get(role)
        if token != (declared.get("content") if isinstance(declared, Mapping) else declared):
            settings[role] = token
    # The base's special_tokens_map.json stays: null removes roles that the adapter lacks.
    named = special_tokens_of(optional_json(bundle / SPECIAL_NAME, error=BundleError) | settings)
    settings |= dict.fromkeys(sorted(named.keys() - own.special_tokens.keys()))
    settings.pop("chat_template", None)
    write_json(bundle / SETTINGS_NAME, settings)
    (bundle / "chat_template.json").unlink(missing_ok=True)
    if own.template is not None:
        (bundle / TEMPLATE_NAME).write_text(own.template, encoding="utf-8")
    generation = optional_json(bundle / GENERATION_NAME, error=BundleError)
    kept = {name: before[name] for name in ("bos_token_id", "pad_token_id") if name in before}
    generation = {**kept, **generation}
    if ends := sorted(own.eos_ids):
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    write_json(bundle / GENERATION_NAME, generation)


def warn_of_ignored(name: str, settings: GenerationSettings) -> None:
    """Warn of settings of `name` that would change a text and are not applied."""
    if settings.ignored:
        logger.warning(
            "%s: %s asks for %s, which is not applied",
            name,
            GENERATION_NAME,
            ", ".join(settings.ignored),
        )


def _log_differences(name: str, differences: Sequence[str]) -> None:
    *first, last = differences
    changed = f"{', '.join(first)} and {last}" if first else last
    logger.warning("%s: with its own %s in place of the base's", name, changed)
