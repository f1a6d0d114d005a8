"""Insert the tokens of images into prompts, as the model's processor does.

Most models have one token for an image, which is repeated, between other tokens:

    <image>          ->   <fake_token_around_image><global-img><image><image>…<fake_token…>

For Gemma 3 and for images that are split into tiles this is done in the text, because newlines
merge with adjacent ones into other tokens, so that it cannot be done with tokens:

    "A <boi> b"      ->   "A \\n\\n<boi>, all of the image's tokens, <eoi>\\n\\n b"
    "A <image> b"    ->   "A <fake…><row_1_col_1><image>…\\n\\n<fake…><global-img><image>…<fake…> b"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loradeploy.errors import BundleError, UsageError

Surround = tuple[tuple[str, ...], tuple[str, ...]]
Tiles = tuple[int, int]  # rows and columns of an image's tiles; (0, 0) if it is not split

_FAKE: Final = "<fake_token_around_image>"
_AROUND: Final = ((_FAKE, "<global-img>"), (_FAKE,))
# Tokens before and after those of an image that is not split, by model type.
_SURROUNDS: Final[Mapping[str, Surround]] = {
    "llava": ((), ()),
    "smolvlm": _AROUND,
    "idefics3": _AROUND,
    "qwen2_vl": ((), ()),
    "qwen2_5_vl": ((), ()),
}


@dataclass(frozen=True)
class _Form:
    """The text of an image: `beside`, its first token, its own tokens, its last token, `beside`.

    `begin`, `token`, `end`: names of the tokens' ids in config.json. The first token is the
    placeholder of an image in a prompt.
    """

    begin: str
    token: str
    end: str
    beside: str


# By model type; models whose images are inserted in the text.
_FORMS: Final[Mapping[str, _Form]] = {
    "gemma3": _Form("boi_token_index", "image_token_index", "eoi_token_index", "\n\n"),
}


@dataclass(frozen=True)
class _Written:
    """An image in a text: its placeholder, and one of its tokens.

    `whole`: the text that replaces the placeholder.
    """

    placeholder: str
    token: str
    whole: str

    @classmethod
    def of(
        cls, config: Mapping[str, Any], vocabulary: Mapping[str, int], count: int
    ) -> _Written | None:
        form = _FORMS.get(str(config.get("model_type")))
        if form is None:
            return None
        words = {index: word for word, index in vocabulary.items()}
        found = []
        for name in (form.begin, form.token, form.end):
            index = config.get(name)
            if index not in words:
                raise BundleError(
                    f"config.json has the {name} {index}, which the tokenizer does not have"
                )
            found.append(words[index])
        begin, token, end = found
        return cls(begin, token, f"{form.beside}{begin}{token * count}{end}{form.beside}")


@dataclass(frozen=True)
class ImagePrompts:
    """How images are inserted into a decoder's prompts.

    `token`: the token of an image. `vocabulary`: the tokenizer's. `count`: tokens per image or
    tile, if fixed, otherwise 0. `where`: the decoder's path, for messages.
    """

    token: int
    vocabulary: Mapping[str, int]
    count: int
    where: Path
    _written: _Written | None
    _surround: Surround | None

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        token: int,
        vocabulary: Mapping[str, int],
        count: int,
        where: Path,
    ) -> ImagePrompts:
        """The rules of a model, by its config.json; `count`: tokens per image or tile, if fixed.

        Raises:
            BundleError: the configuration or the vocabulary lacks a required token.
        """
        written = _Written.of(config, vocabulary, count)
        surround = _SURROUNDS.get(str(config.get("model_type")))
        return cls(token, vocabulary, count, where, written, surround)

    @property
    def placeholder(self) -> str:
        """The text that marks the place of an image in a prompt."""
        if self._written is not None:
            return self._written.placeholder
        return next((word for word, index in self.vocabulary.items() if index == self.token), "")

    def write(self, text: str, images: Sequence[Tiles] = ()) -> str:
        """Replace each image's placeholder in `text`, unless it already has the images' tokens.

        `images`: the tiles of each image. Images that are not split are inserted by `expanded`, for
        models with one token for an image.
        """
        written = self._written
        if written is not None:
            if written.token in text:
                return text
            return text.replace(written.placeholder, written.whole)
        if not any(map(any, images)) or text.count(self.placeholder) != len(images):
            return text
        first, *others = text.split(self.placeholder)
        pairs = zip(images, others, strict=True)
        return first + "".join(self._tiled(*tiles) + after for tiles, after in pairs)

    def _tiled(self, rows: int, columns: int) -> str:
        """The text of an image with `rows` × `columns` tiles."""
        before, after = self._surround or ((), ())
        tokens = self.placeholder * self.count
        whole = "".join((*before, tokens, *after))
        if not rows:
            return whole
        tiles = [
            f"{_FAKE}<row_{row + 1}_col_{column + 1}>{tokens}" + "\n" * (column + 1 == columns)
            for row in range(rows)
            for column in range(columns)
        ]
        return "".join(tiles) + f"\n{whole}"

    def expanded(self, ids: list[int], features: Sequence[int], what: str) -> list[int]:
        """Repeat the image tokens of the prompt `what`, as many as its images have `features`.

        Images that are split into tiles were inserted by `write`.

        Raises:
            UsageError: the number of image tokens is neither that of the images nor of their
                features, or the tokens around an image are unknown.
        """
        count, needed = ids.count(self.token), sum(features)
        if count == needed:
            return ids
        if count != len(features):
            raise UsageError(
                f"{what} has {count} image tokens, and {len(features)} images of together {needed}"
                f" features: give {self.placeholder} once for each image (`chat` adds it), or one"
                " token for each feature"
            )
        before, after = self._around()
        made: list[int] = []
        waiting = iter(features)
        for each in ids:
            own = [each]
            if each == self.token:
                own = [*before, *[self.token] * next(waiting), *after]
            made += own
        return made

    def _around(self) -> tuple[list[int], list[int]]:
        """The tokens before and after those of an image."""
        if self._written is not None:
            raise UsageError(
                "the processor inserts images into the text: give a text with"
                f" {self._written.placeholder} for each image, or one image token for each feature"
            )
        if self._surround is None:
            raise UsageError(
                f"the tokens around an image of {self.where} are not known: give one image token"
                " for each feature"
            )
        known = self.vocabulary
        if lacking := [word for words in self._surround for word in words if word not in known]:
            raise UsageError(
                f"the tokenizer of {self.where} has no {lacking[0]}, which is needed around an"
                " image: give one image token for each feature, and those around them"
            )
        before, after = ([known[word] for word in words] for words in self._surround)
        return before, after
