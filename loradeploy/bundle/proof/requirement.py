"""What a user asks of a certificate beyond that it passed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from loradeploy.errors import UsageError, listed_names, shown

_PROVIDER: Final = "ExecutionProvider"


@dataclass(frozen=True)
class Coverage:
    """How much a check that passed has run of the bundle.

    `phases`, `providers`, `optimization`: what ran, by name. `prompts`: rows of its inputs (those
    made up included), `prompt_tokens` of all together, `generated`: tokens decoded for each.
    """

    phases: frozenset[str] = frozenset()
    providers: frozenset[str] = frozenset()
    optimization: frozenset[str] = frozenset()
    prompts: int = 0
    prompt_tokens: int = 0
    generated: int = 0


@dataclass(frozen=True)
class CertificateMinimum:
    """The least that a certificate must stand for.

    `phases`: what must have been run, such as "decode" and "padded batch". `providers`: on which
    execution providers. `prompts`, `prompt_tokens`, `generated`: how many at least.
    `precision`: the bundle's. `public_key`: a PEM file; its owner must have signed the certificate.

    Raises:
        UsageError: a number below 0.
    """

    phases: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    prompts: int = 0
    prompt_tokens: int = 0
    generated: int = 0
    precision: str | None = None
    public_key: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name in ("phases", "providers"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, (value,))
        for name in _NUMBERS:
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}: give 0 or more")

    @classmethod
    def parse(cls, text: str) -> CertificateMinimum:
        """The minimum in `text`, such as "prompts=16,generated=8,phases=decode+prefill".

        Raises:
            UsageError: an unknown name, or no number where one is needed.
        """
        fields = {field.name for field in dataclasses.fields(cls)} - {"public_key"}
        values: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in fields or not value:
                raise UsageError(
                    f"{shown(part)} is no minimum of a certificate: give NAME=VALUE, of"
                    f" {listed_names(sorted(fields))}"
                )
            if name in _NUMBERS:
                if not value.isdecimal() or len(value) > _DIGITS:
                    raise UsageError(f"{name} is {shown(value)}: a number is needed")
                values[name] = int(value)
            elif name == "precision":
                values[name] = value
            else:
                values[name] = tuple(piece.strip() for piece in value.split("+"))
        return cls(**values)

    def lacking(self, coverage: Coverage, precision: str) -> str | None:
        """What a check of `coverage` does not reach; None where it is enough."""
        for name in _NUMBERS:
            found, least = getattr(coverage, name), getattr(self, name)
            if found < least:
                return f"it was checked with {found} {name}, {least} are required"
        if missing := _missing(self.phases, coverage.phases):
            return f"the phase {shown(missing)} was not checked, it is required"
        if missing := _missing(
            map(_short, self.providers), {_short(name) for name in coverage.providers}
        ):
            return f"it was not checked on {missing}, which is required"
        if self.precision not in (None, precision):
            return f"its precision is {precision}, {self.precision} is required"
        return None


_NUMBERS: Final = ("prompts", "prompt_tokens", "generated")
_DIGITS: Final = 12


def _short(provider: str) -> str:
    return provider.removesuffix(_PROVIDER).lower()


def _missing(wanted: Any, found: Collection[str]) -> str | None:
    return next((name for name in wanted if name not in found), None)
