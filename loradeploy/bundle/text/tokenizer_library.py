"""The `tokenizers` library, opened on a file, and its failures as errors of this project."""

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
_LARGEST_WORD: Final = 2**24  # of a word that is in a tokenizer; vocabularies have some 2**18
_STDERR: Final = 2
_TRIED: Final = "a"  # a text that a new tokenizer is tried on


def open_tokenizer(file: Path) -> FastTokenizer:
    """The library's tokenizer in `file`, tried on a text.

    Raises:
        BundleError: there is none, or it is no valid one.
    """
    if not file.exists():
        raise BundleError(f"{file} does not exist: without it text cannot be read or written")
    check_file(file, error=BundleError, limit=_MAX_TOKENIZER_BYTES)
    with _without_panics(), library_errors(f"{file} is not a valid tokenizer"):
        tokenizer = FastTokenizer.from_file(os.fspath(file))
        # Lengths are this project's business; a setting in the file would cut or pad in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Some of what is wrong with a file shows only when it is used.
        tokenizer.decode(tokenizer.encode(_TRIED).ids)
        words: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    if max(words.values(), default=0) > _LARGEST_WORD:
        word = max(words, key=words.__getitem__)
        # The library counts up to it when it writes or compares.
        raise BundleError(f"{file} is not a valid tokenizer: {shown(word)} is token {words[word]}")
    return tokenizer


@contextmanager
def _without_panics() -> Iterator[None]:
    """Without the lines that a panic of the library writes to standard error by itself.

    Where other threads run they may have something to say there: then nothing is held back.
    """
    if threading.active_count() > 1:
        yield
        return
    try:
        sys.stderr.flush()
        own = os.dup(_STDERR)
    except (AttributeError, OSError, ValueError):  # there is none
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
    """Raise BundleError, which begins with `what`, where the tokenizers library fails.

    It raises bare Exceptions; and where its own code panics, an error that is no Exception and
    that no module exports.
    """
    try:
        yield
    except LoraDeployError:  # of whoever uses it
        raise
    except Exception as problem:
        raise BundleError(f"{what}: {first_line(problem)}") from None
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":
            raise
        raise BundleError(f"{what}: {first_line(problem)}") from None
