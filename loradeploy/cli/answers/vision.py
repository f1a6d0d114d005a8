"""The images of prompts, as `loradeploy run` reads them for a vision-language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.cli.answers.generating import Shown
from loradeploy.errors import DataError, UsageError, shown

if TYPE_CHECKING:
    from loradeploy.runtime.prompts import InputPrompt
    from loradeploy.runtime.session import AdapterSession

_FIELDS: Final = ("image", "images")  # of an object; the others have videos, or no paths
# Keys of a part of a message by which other programs name its image.
_OWN: Final = ("image", "image_url", "input_image", "path", "url", "base64", "data")


def shown_images(
    decoder: AdapterSession,
    tower: AdapterSession,
    requests: Sequence[InputPrompt],
    images: Sequence[str],
    beside: Path,
) -> Shown:
    """The images of each prompt: `images` for a single prompt, or those of the rows of a file.

    `beside`: the directory to which paths in a file are relative.

    Raises:
        UsageError: there are no images, or the bundles are not the two of one model.
        DataError: a prompt has images in another form, or within a message.
    """
    from loradeploy.runtime.tasks.image_text import ImageTextGenerator

    generator = ImageTextGenerator(decoder, tower)
    found = [
        [beside / path for path in _paths(request, f"prompt {number}")]
        for number, request in enumerate(requests, start=1)
    ]
    if images:
        found = [[Path(image) for image in images]]
    if not any(found):
        raise UsageError("--vision: there are no images, give --image, or leave out --vision")
    return Shown(generator, found)


def _paths(request: InputPrompt, what: str) -> Sequence[str]:
    if not isinstance(request.prompt, str):
        _check_messages(request.prompt, what)
    names = list(request.images)
    if len(names) > 1 or not set(names) <= set(_FIELDS):
        other = next((name for name in names if name not in _FIELDS), names[-1])
        raise DataError(f"{what}: {other} is not read: give the paths of images, as images")
    if not names:
        return ()
    given = request.images[names[0]]
    paths = [given] if isinstance(given, str) else given
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise DataError(f"{what}: {names[0]} is {shown(given)}: give the paths of image files")
    return paths


def _check_messages(messages: Sequence[Any], what: str) -> None:
    """Raise DataError if a part of a message names an image, which would not be read."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping) and (own := [key for key in _OWN if part.get(key)]):
                raise DataError(
                    f"{what}: a message has an image of its own, as {own[0]}: give all paths as"
                    ' images beside messages, and {"type": "image"} in the place of each'
                )
