"""A bundle beside the files that its model would give it: the two sides of the check of files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.errors import shown

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest
    from loradeploy.parity.context import CheckContext


@dataclass(frozen=True)
class Pair:
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


def differ(what: str, own: object, expected: object) -> str:
    """A message about two values."""
    return f"{what} {shown(own)}, expected {shown(expected)}"
