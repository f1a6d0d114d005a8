"""Whether the patterns of an adapter's config are regular expressions where they stand.

They stand inside of larger ones (PEFT 0.21 matches the end of a name, a part of a path, a layer's
number), where a flag, or a group of the same name, is an error that it is not by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from loradeploy.errors import first_line, shown

if TYPE_CHECKING:
    from loradeploy.adapter.config import AdapterConfig

_AT_THE_END: Final = r"(.*\.)?({})$"
_IN_A_PATH: Final = r"(^|.*\.){}($|\..*)"
_BEFORE_A_NUMBER: Final = r"(?:^|.*?\.){}\.(?P<index>\d+)\."


def pattern_problem(config: AdapterConfig) -> str | None:
    """The first pattern of `config` that cannot be matched with, and why; None where all can."""
    for name, pattern, around in _patterns(config):
        try:
            re.compile(around.replace("{}", pattern))
        except (re.error, OverflowError, RecursionError) as problem:
            return (
                f"{name} has the pattern {shown(pattern)}, which is no regular expression:"
                f" {first_line(problem)}"
            )
    return None


def _patterns(config: AdapterConfig) -> Iterator[tuple[str, str, str]]:
    layers = config.layers_pattern or ()
    places: tuple[tuple[str, Iterable[str], str], ...] = (
        ("rank_pattern", config.rank_pattern, _AT_THE_END),
        ("alpha_pattern", config.alpha_pattern, _AT_THE_END),
        ("modules_to_save", config.modules_to_save, _IN_A_PATH),
        ("layers_pattern", (layers,) if isinstance(layers, str) else layers, _BEFORE_A_NUMBER),
    )
    for name, names in (("target", config.target_modules), ("exclude", config.exclude_modules)):
        if isinstance(names, str):
            yield f"{name}_modules", names, "{}"
    for name, patterns, around in places:
        for pattern in patterns:
            yield name, pattern, around
