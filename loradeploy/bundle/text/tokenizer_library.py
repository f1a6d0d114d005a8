"""Open a tokenizer with the `tokenizers` library, and convert its failures to typed errors."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer as FastTokenizer

from loradeploy.errors import BundleError, LoraDeployError, first_line, shown
from loradeploy.files import check_file

_MAX_TOKENIZER_BYTES: Final = 512 << 20
_LARGEST_ID: Final = 2**24  # of a word; vocabularies have about 2**18 words
_STDERR: Final = 2
_TEST_TEXT: Final = "a"


def open_tokenizer(file: Path) -> FastTokenizer:
    """The library's tokenizer in `file`, tested with a text.

    Raises:
        BundleError: the file does not exist, or is not a valid tokenizer.
    """
    if not file.exists():
        raise BundleError(f"{file} does not exist: without it text cannot be read or written")
    check_file(file, error=BundleError, limit=_MAX_TOKENIZER_BYTES)
    with _without_panics(), library_errors(f"{file} is not a valid tokenizer"):
        tokenizer = FastTokenizer.from_file(os.fspath(file))
        # loradeploy truncates and pads; settings in the file would do it silently.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Some errors in a file only show when it is used.
        tokenizer.decode(tokenizer.encode(_TEST_TEXT).ids)
        words: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    if max(words.values(), default=0) > _LARGEST_ID:
        word = max(words, key=words.__getitem__)
        # The library iterates up to the largest id when it writes or compares.
        raise BundleError(f"{file} is not a valid tokenizer: {shown(word)} is token {words[word]}")
    return tokenizer


@contextmanager
def _without_panics() -> Iterator[None]:
    """Suppress the lines that a panic of the library writes to standard error.

    If other threads are running, nothing is suppressed, because they may write there, too.
    """
    if threading.active_count() > 1:
        yield
        return
    try:
        sys.stderr.flush()
        own = os.dup(_STDERR)
    except (AttributeError, OSError, ValueError):  # there is no standard error
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, _STDERR)
        os.close(nowhere)
        yield
    finally:
        os.dup2(own, _STDERR)
        os.close(own)


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Convert failures of the tokenizers library to a BundleError that begins with `what`.

    The library raises plain Exceptions and, if its Rust code panics, a BaseException that no module
    exports.
    """
    try:
        yield
    except LoraDeployError:  # raised by the code within the context
        raise
    except Exception as problem:
        raise BundleError(f"{what}: {first_line(problem)}") from None
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":
            raise
        raise BundleError(f"{what}: {first_line(problem)}") from None
