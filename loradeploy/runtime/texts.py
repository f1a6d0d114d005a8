"""What each adapter of a session brings for texts: its tokenizer, chat template, end, pooling."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loradeploy.bundle.beside import check_digests, tells_of_texts, text_directory, vocabulary_of
from loradeploy.bundle.names import FEATURE_EXTRACTION, SEQUENCE_CLASSIFICATION
from loradeploy.bundle.sentence import (
    SentenceRecipe,
    default_recipe,
    read_recipe,
    recipe_directory,
)
from loradeploy.bundle.settings import GenerationSettings
from loradeploy.bundle.tokenizer import CONFIG_NAME, TOKENIZER_NAME, Tokenizer
from loradeploy.errors import (
    BundleError,
    LoraDeployError,
    UnknownAdapterError,
    UsageError,
    listed_names,
)
from loradeploy.files import inside, read_json
from loradeploy.printable import logger_of
from loradeploy.runtime.resident import AdapterSpec, weights_of

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest

logger = logger_of(__name__)

_OWN: Final = Path()  # an adapter that came with the bundle


@dataclass(frozen=True, eq=False)
class TextSide:
    """How the rows of one adapter, or of the base, are read and written.

    `recipe`: of an embedder. `ends`: the tokens that end a text. `torn`: of a blend, the names of
    two members whose chat templates differ.
    """

    tokenizer: Tokenizer
    recipe: SentenceRecipe
    ends: frozenset[int]
    settings: GenerationSettings
    torn: tuple[str, str] | None = None

    def check_chat(self) -> None:
        """Raise UsageError where no chat template is the blend's."""
        if self.torn is not None:
            one, other = self.torn
            raise UsageError(
                f"the adapters {one!r} and {other!r} of the blend have different chat templates:"
                " give the text as a plain prompt"
            )


class TextSides:
    """The text sides of a session's adapters by name, each read when it is first used.

    Safe from several threads.
    """

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self._bundle = bundle
        self._manifest = manifest
        self._lock = threading.Lock()
        self._places: dict[str, Path] = dict.fromkeys(manifest.adapters, _OWN)
        self._sides: dict[str, TextSide] = {}

    def put(self, name: str, place: Path | None) -> None:
        """Let `name` stand for the adapter loaded from `place`; None is the bundle's own."""
        with self._lock:
            self._places[name] = _OWN if place is None else place
            self._sides.pop(name, None)

    def is_told_by(self, name: str, place: Path | None) -> bool:
        """Whether what lies at `place` makes the texts of `name` as they are made now."""
        with self._lock:
            known = name in self._places
        if not known or not (self._bundle / TOKENIZER_NAME).is_file():
            return True  # without a tokenizer there are no texts
        now, then = self._named(name), self._read(name, _OWN if place is None else place)
        return (
            now.tokenizer.same_words(then.tokenizer)
            and now.tokenizer.template == then.tokenizer.template
            and (now.ends, now.settings) == (then.ends, then.settings)
            and now.recipe.same(then.recipe)
        )

    def remove(self, name: str) -> None:
        """Forget `name`."""
        with self._lock:
            self._places.pop(name, None)
            self._sides.pop(name, None)

    @cached_property
    def base(self) -> TextSide:
        """The base's."""
        recipe = None
        if self._manifest.task == FEATURE_EXTRACTION and self._manifest.sentence:
            check_digests(self._bundle, self._manifest.sentence)
            recipe = read_recipe(self._bundle)
        recipe = recipe or default_recipe()
        tokenizer = Tokenizer(self._bundle, lowercase=recipe.lowercase)
        vocabulary = self._vocabulary()
        if tokenizer.pad_id >= vocabulary and self._manifest.task == SEQUENCE_CLASSIFICATION:
            # The graph of a decoder finds the end of a text by it.
            raise BundleError(
                f"{self._bundle / CONFIG_NAME}: pad_token_id is {tokenizer.pad_id}, and the"
                f" vocabulary ends at {vocabulary - 1}: set it to the token that the model was"
                " trained with, and export again"
            )
        tokenizer.pad_within(vocabulary)
        return _side(tokenizer, recipe)

    def _vocabulary(self) -> int:
        file = self._bundle / CONFIG_NAME
        known = read_json(file, error=BundleError) if file.is_file() else {}
        return vocabulary_of(self._manifest, known)

    def of(self, spec: AdapterSpec | None) -> TextSide:
        """The side of an adapter, of a blend, or of the base.

        Raises:
            UnknownAdapterError: an adapter that was never loaded.
            UsageError: a blend of adapters with different tokenizers or poolings.
            BundleError: files that cannot be used, or are not those that came with the bundle.
            AdapterMismatchError: words that the graph's vocabulary has not.
        """
        if spec is None:
            return self.base
        if isinstance(spec, str):
            return self._named(spec)
        return _blend({name: self._named(name) for name, _ in weights_of(spec)})

    def _named(self, name: str) -> TextSide:
        with self._lock:
            place = self._places.get(name)
            there = self._sides.get(name)
        if there is not None:
            return there
        if place is None:
            known = listed_names(sorted(self._places))
            raise UnknownAdapterError(f"no adapter is loaded as {name!r}; there are: {known}")
        try:
            side = self._read(name, place)
        except LoraDeployError as problem:
            raise type(problem)(f"the adapter {name!r}: {problem}") from None
        with self._lock:
            if self._places.get(name) is place:
                self._sides[name] = side
        return side

    def _read(self, name: str, place: Path) -> TextSide:
        base = self.base
        if place is _OWN:
            entry = self._manifest.adapters[name]
            if entry.text is None or entry.path is None:
                return base
            directory = inside(self._bundle, entry.path)
            check_digests(directory, entry.text.files)
        else:
            directory = text_directory(place)
        if not tells_of_texts(directory):
            return base
        recipe = None
        if self._manifest.task == FEATURE_EXTRACTION:
            found = recipe_directory(directory)
            recipe = None if found is None else read_recipe(found)
        recipe = recipe or base.recipe
        tokenizer = Tokenizer(directory, base.tokenizer, lowercase=recipe.lowercase)
        tokenizer.check_words(self._vocabulary())
        if place is not _OWN and tokenizer.settings.ignored:  # of its own, the export said so
            logger.warning(
                "the adapter %r has settings of generation that are not applied: %s",
                *(name, listed_names(tokenizer.settings.ignored)),
            )
        return _side(tokenizer, recipe)


def _side(tokenizer: Tokenizer, recipe: SentenceRecipe) -> TextSide:
    return TextSide(tokenizer, recipe, tokenizer.eos_ids, tokenizer.settings)


def _blend(members: Mapping[str, TextSide]) -> TextSide:
    """One side for several: what they agree on, and every end."""
    (first, side), *others = members.items()
    for name, other in others:
        if not side.tokenizer.same_words(other.tokenizer):
            raise UsageError(
                f"the adapters {first!r} and {name!r} of the blend have different tokenizers: give"
                " token ids"
            )
        if not side.recipe.same(other.recipe):
            raise UsageError(
                f"the adapters {first!r} and {name!r} of the blend make vectors in different ways:"
                " use AdapterSession.run"
            )
        if other.settings != side.settings:
            raise UsageError(
                f"the adapters {first!r} and {name!r} of the blend have different settings of"
                " generation: use AdapterSession.run, or give them the same generation_config.json"
            )
    torn = [n for n, other in others if other.tokenizer.template != side.tokenizer.template]
    ends = frozenset().union(*(member.ends for member in members.values()))
    return replace(
        side,
        ends=ends,
        torn=(first, torn[0]) if torn else None,
    )
