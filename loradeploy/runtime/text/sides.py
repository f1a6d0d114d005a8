"""Text settings of each adapter of a session: tokenizer, chat template, end tokens, pooling."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from loradeploy.adapter.tasks import FEATURE_EXTRACTION, SEQUENCE_CLASSIFICATION
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import CONFIG_NAME
from loradeploy.bundle.text.beside import (
    TEXT_NAMES,
    check_digests,
    describes_texts,
    text_directory,
    vocabulary_of,
)
from loradeploy.bundle.text.scoring import PairScoring, declared_in_config, read_scoring
from loradeploy.bundle.text.settings import GenerationSettings
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.bundle.text.tokenizer_files import TOKENIZER_NAME
from loradeploy.bundle.text.vectors.files import ENCODER_NAMES, PROMPTS_NAME, WEIGHTS_NAME
from loradeploy.bundle.text.vectors.recipe import (
    SentenceRecipe,
    default_recipe,
    read_recipe,
    recipe_directory,
)
from loradeploy.errors import (
    AdapterError,
    BundleError,
    LoraDeployError,
    UnknownAdapterError,
    UsageError,
    listed_names,
)
from loradeploy.files import inside
from loradeploy.names import MODULES_NAME
from loradeploy.printable import logger_of
from loradeploy.runtime.adapters.resident import AdapterSpec, weights_of
from loradeploy.runtime.lifetime import wait_until
from loradeploy.snapshot import Snapshot

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest

logger = logger_of(__name__)

_Result = TypeVar("_Result")
_FROM_BUNDLE: Final = Path()  # an adapter that came with the bundle


@dataclass(frozen=True, eq=False)
class TextSide:
    """The text settings of one adapter, or of the base.

    `recipe`: the pooling of an embedder. `scoring`: how pairs of texts are scored. `ends`: the
    tokens that end a text. `torn`: two members of a blend whose chat templates differ, or None.
    """

    tokenizer: Tokenizer
    recipe: SentenceRecipe
    ends: frozenset[int]
    settings: GenerationSettings
    scoring: PairScoring
    torn: tuple[str, str] | None = None

    def longest(self, own: int | None, full: int | None = None) -> int | None:
        """The maximum number of tokens of a text; None if there is none.

        `own`: the saved maximum, by default the tokenizer's; the model's positions limit it.
        `full`: the length of the graph's rows, if it is fixed.
        """
        limits = [self.tokenizer.max_length if own is None else own, self.tokenizer.positions, full]
        return min((limit for limit in limits if limit is not None), default=None)

    def check_chat(self) -> None:
        """Raise UsageError if the members of a blend have different chat templates."""
        if self.torn is not None:
            one, other = self.torn
            raise UsageError(
                f"the adapters {one!r} and {other!r} of the blend have different chat templates:"
                " give the text as a prompt, without a chat"
            )


class TextSides:
    """The text settings of a session's adapters by name, each read when it is first used.

    `check`: raises if the bundle's files, or those below a folder of it, changed since it was
    opened.

    Thread-safe. The bank stores factors, this class text settings, so each name has a count of its
    changes: a reader of both that finds the same count before and after, and no change in progress
    before, has the settings and factors of one adapter. Threads that wait for the end of a change
    hold no locks or adapters.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        check: Callable[[str | None], None],
    ) -> None:
        self._bundle = bundle
        self._manifest = manifest
        self._check = check
        self._lock = threading.Lock()
        self._moved = threading.Condition(self._lock)
        self._counts: dict[str, int] = {}  # of changes that began
        self._changing: set[str] = set()  # names whose change has not ended
        self._writers: dict[str, threading.Lock] = {}
        self._files: dict[str, Snapshot] = {}  # of adapters that are not in the bundle
        self._sources: dict[str, Path] = dict.fromkeys(manifest.adapters, _FROM_BUNDLE)
        self._sides: dict[str, TextSide] = {}

    def put(self, name: str, source: Path | None, files: Snapshot | None = None) -> None:
        """Set the adapter of `name` to that loaded from `source`; None is the one in the bundle.

        `files`: the state of its text files when its weights were read.
        """
        with self._lock:
            self._sources[name] = _FROM_BUNDLE if source is None else source
            self._sides.pop(name, None)
            self._files.pop(name, None)
            if files is not None:
                self._files[name] = files

    def knows(self, name: str) -> bool:
        """Whether the name is known."""
        with self._lock:
            return name in self._sources

    def writing(self, name: str) -> threading.Lock:
        """The lock of the adapter of `name` against other writers; readers do not wait."""
        with self._lock:
            return self._writers.setdefault(name, threading.Lock())

    def change(self, name: str, change: Callable[[], _Result]) -> _Result:
        """Call `change`: readers see its changes of factors and text settings of `name` as one."""
        try:
            with self._lock:
                self._counts[name] = self._counts.get(name, 0) + 1
                self._changing.add(name)
            return change()
        finally:
            self._changing.discard(name)  # first, see lifetime.py
            with self._lock:
                self._moved.notify_all()

    def counts(self, spec: AdapterSpec | None) -> tuple[int, ...]:
        """The counts of changes of the names in `spec`; waits for changes in progress.

        Must not be called by a thread that holds adapters which the change may wait for.
        """
        names = [] if spec is None else [name for name, _ in weights_of(spec)]
        with self._lock:
            wait_until(self._moved, lambda: self._changing.isdisjoint(names))
            return tuple(self._counts.get(name, 0) for name in names)

    def count(self, name: str) -> int:
        """As `counts`, for one name and without waiting."""
        with self._lock:
            return self._counts.get(name, 0)

    def have_moved(self, spec: AdapterSpec | None, counts: tuple[int, ...]) -> bool:
        """Whether names in `spec` changed, or are changing, since `counts`."""
        names = [] if spec is None else [name for name, _ in weights_of(spec)]
        with self._lock:
            return tuple(self._counts.get(name, 0) for name in names) != counts

    def has_same_texts_as(self, name: str, source: Path | None) -> bool:
        """Whether the text settings at `source` equal the current ones of `name`."""
        with self._lock:
            known = name in self._sources
        if not known or not (self._bundle / TOKENIZER_NAME).is_file():
            return True  # without a tokenizer there are no texts
        now, then = self._named(name), self._read(name, _FROM_BUNDLE if source is None else source)
        return (
            now.tokenizer.same_words(then.tokenizer)
            and now.tokenizer.template == then.tokenizer.template
            and (now.ends, now.settings) == (then.ends, then.settings)
            and now.recipe.same(then.recipe)
            and now.scoring == then.scoring
        )

    def remove(self, name: str, count: int) -> None:
        """Remove `name`, unless it changed since `count`, and so is another adapter."""
        with self._lock:
            if self._counts.get(name, 0) != count:
                return
            self._sources.pop(name, None)
            self._sides.pop(name, None)
            self._files.pop(name, None)
            self._counts[name] = count + 1

    @cached_property
    def base(self) -> TextSide:
        """The text settings of the base."""
        recipe = None
        if self._manifest.sentence:
            check_digests(self._bundle, self._manifest.sentence)
            if self._manifest.task == FEATURE_EXTRACTION:
                recipe = read_recipe(self._bundle)
        recipe = recipe or default_recipe()
        tokenizer = Tokenizer(self._bundle, lowercase=recipe.lowercase)
        vocabulary = self._vocabulary()
        if tokenizer.pad_id >= vocabulary and self._manifest.task == SEQUENCE_CLASSIFICATION:
            # The graph of a decoder finds the end of a text by the padding.
            raise BundleError(
                f"{self._bundle / CONFIG_NAME}: pad_token_id is {tokenizer.pad_id}, and the"
                f" vocabulary ends at {vocabulary - 1}: set it to the token that the model was"
                " trained with, and export again"
            )
        tokenizer.pad_within(vocabulary)
        self._check(None)
        return _side(tokenizer, recipe, self._scoring())

    def _scoring(self) -> PairScoring:
        """How pairs of texts are scored without an adapter's own files."""
        if self._manifest.task != SEQUENCE_CLASSIFICATION:
            return PairScoring()
        config = model_config(self._bundle)
        in_config = declared_in_config(config, self._bundle / CONFIG_NAME)
        own = read_scoring(self._bundle) if self._manifest.sentence else None
        if own is None:
            return in_config
        return own if own.declared or own.refusal else replace(own, declared=in_config.declared)

    def _vocabulary(self) -> int:
        return vocabulary_of(self._manifest, model_config(self._bundle))

    def of(self, spec: AdapterSpec | None) -> TextSide:
        """The text settings of an adapter, of a blend, or of the base.

        Raises:
            UnknownAdapterError: an adapter that was never loaded.
            UsageError: a blend of adapters with different tokenizers or poolings.
            BundleError: files that cannot be used, or changed since the export.
            AdapterMismatchError: tokens that the graph's vocabulary lacks.
        """
        if spec is None:
            return self.base
        if isinstance(spec, str):
            return self._named(spec)
        return _blend({name: self._named(name) for name, _ in weights_of(spec)})

    def _named(self, name: str) -> TextSide:
        with self._lock:
            source = self._sources.get(name)
            known_side = self._sides.get(name)
            files = self._files.get(name)
        if known_side is not None:
            return known_side
        if source is None:
            with self._lock:
                known = listed_names(sorted(self._sources))
            raise UnknownAdapterError(f"no adapter is loaded as {name!r}; loaded: {known}")
        try:
            side = self._read(name, source)
            if source is _FROM_BUNDLE:
                self._check_bundled(name)
            elif files is not None and (changed := files.changed()) is not None:
                raise AdapterError(
                    f"{files.directory / changed} has changed since its weights were read: load it"
                    " again with replace=True"
                )
        except LoraDeployError as problem:
            raise type(problem)(f"the adapter {name!r}: {problem}") from None
        with self._lock:
            if self._sources.get(name) is source:
                self._sides[name] = side
        return side

    def _check_bundled(self, name: str) -> None:
        entry = self._manifest.adapters[name]
        if entry.text is not None and entry.path is not None:
            self._check(entry.path)

    def _read(self, name: str, source: Path) -> TextSide:
        base = self.base
        if source is _FROM_BUNDLE:
            entry = self._manifest.adapters[name]
            if entry.text is None or entry.path is None:
                return base
            directory = inside(self._bundle, entry.path)
            check_digests(directory, entry.text.files)
        else:
            directory = text_directory(source)
        if not describes_texts(directory):
            return base
        recipe = None
        if self._manifest.task == FEATURE_EXTRACTION:
            found = recipe_directory(directory)
            recipe = None if found is None else read_recipe(found)
        recipe = recipe or base.recipe
        scoring = None
        if self._manifest.task == SEQUENCE_CLASSIFICATION:
            scoring = read_scoring(directory)
        tokenizer = Tokenizer(directory, base.tokenizer, lowercase=recipe.lowercase)
        added = self._manifest.added_tokens
        tokenizer.check_words(self._vocabulary() if added is None else added.size)
        if (
            source is not _FROM_BUNDLE and tokenizer.settings.ignored
        ):  # those in the bundle were reported by the export
            logger.warning(
                "the adapter %r has generation settings that are not applied: %s",
                name,
                listed_names(tokenizer.settings.ignored),
            )
        return _side(tokenizer, recipe, scoring or base.scoring)


def files_for_texts(source: Path) -> Snapshot:
    """The state of the text files of an adapter whose weights are loaded from `source`."""
    directory = text_directory(source)
    names = {*TEXT_NAMES, MODULES_NAME, PROMPTS_NAME, *ENCODER_NAMES}
    if directory.is_dir():
        for name in (CONFIG_NAME, WEIGHTS_NAME):  # of the pooling and the layers behind it
            inner = directory.glob(f"*/{name}")
            names.update(file.relative_to(directory).as_posix() for file in inner)
    return Snapshot.of(directory, names)


def _side(tokenizer: Tokenizer, recipe: SentenceRecipe, scoring: PairScoring) -> TextSide:
    return TextSide(tokenizer, recipe, tokenizer.eos_ids, tokenizer.settings, scoring)


def _blend(members: Mapping[str, TextSide]) -> TextSide:
    """Text settings of a blend: those that all members share, and the end tokens of all."""
    (first, side), *others = members.items()
    for name, other in others:
        if not side.tokenizer.same_words(other.tokenizer):
            raise UsageError(
                f"the adapters {first!r} and {name!r} of the blend have different tokenizers: give"
                " token ids"
            )
        if not side.recipe.same(other.recipe):
            raise UsageError(
                f"the adapters {first!r} and {name!r} of the blend have different poolings:"
                " use AdapterSession.run"
            )
        if other.scoring != side.scoring:
            raise UsageError(
                f"the adapters {first!r} and {name!r} of the blend have different files of"
                " cross-encoders (activation, prompts, maximum length): use AdapterSession.run"
            )
        if other.settings != side.settings:
            raise UsageError(
                f"the adapters {first!r} and {name!r} of the blend have different generation"
                " settings: use AdapterSession.run, or give them the same generation_config.json"
            )
    torn = [n for n, other in others if other.tokenizer.template != side.tokenizer.template]
    ends = frozenset().union(*(member.ends for member in members.values()))
    return replace(
        side,
        ends=ends,
        torn=(first, torn[0]) if torn else None,
    )
