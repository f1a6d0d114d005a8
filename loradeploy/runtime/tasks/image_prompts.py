"""Images that a processor writes into a prompt's text, before that is split into tokens.

    "A <boi> b"   →   "A \\n\\n<boi>, all of the image's tokens, <eoi>\\n\\n b"

Newlines join with those of the text beside them into other tokens, so that tokens alone cannot tell
where an image is to be put in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from loradeploy.errors import BundleError


@dataclass(frozen=True)
class _Form:
    """How an image is written: `beside`, its first token, its own ones, its last, `beside`.

    `begin`, `token`, `end`: names of the tokens in config.json. The first stands for an image in a
    prompt.
    """

    begin: str
    token: str
    end: str
    beside: str


# By model type.
_FORMS: Final[Mapping[str, _Form]] = {
    "gemma3": _Form("boi_token_index", "image_token_index", "eoi_token_index", "\n\n"),
}


@dataclass(frozen=True)
class WrittenImage:
    """An image in a text: `placeholder` stands for it, `token` is one of its tokens.

    `whole`: what is written in the placeholder's place.
    """

    placeholder: str
    token: str
    whole: str

    @classmethod
    def of(
        cls, config: Mapping[str, Any], vocabulary: Mapping[str, int], count: int
    ) -> WrittenImage | None:
        """That of a model by its config.json, for images of `count` tokens.

        None where images are written by tokens alone.

        Raises:
            BundleError: the configuration or the vocabulary lacks a token of it.
        """
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

    def write(self, text: str) -> str:
        """`text` with each image in its place; one that has the images' tokens is left as it is."""
        return text if self.token in text else text.replace(self.placeholder, self.whole)
