"""Requirements for a certificate, in addition to a passed check."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, Final

from loradeploy.bundle.proof.provider import ProviderFacts
from loradeploy.errors import UsageError, listed_names, shown
from loradeploy.given_numbers import checked_count


@dataclass(frozen=True)
class Coverage:
    """The scope of the passed runs of a check.

    `phases`, `optimization`: the phases and optimization levels that ran, by name; `providers`: the
    providers that they ran on. `prompts`: the number of input rows, random ones included;
    `prompt_tokens`: their total number of tokens; `generated`: the number of tokens decoded for
    each.
    """

    phases: frozenset[str]
    providers: tuple[ProviderFacts, ...]
    optimization: frozenset[str]
    prompts: int
    prompt_tokens: int
    generated: int


@dataclass(frozen=True)
class CertificateMinimum:
    """The minimum scope of a certificate.

    `phases`: phases that must have run, such as "decode" and "padded batch". `providers`: execution
    providers on each of which the check must have run; if empty, the session's provider, with the
    same kind of device and the same options. Names are those of the command line or ONNX Runtime's;
    device numbers are ignored. `prompts`, `prompt_tokens`, `generated`: minimum numbers.
    `precision`: the bundle's. `public_key`: a PEM file; the certificate must be signed with its
    private key.

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
            object.__setattr__(self, name, checked_count(name, getattr(self, name), 0))

    @classmethod
    def parse(cls, text: str) -> CertificateMinimum:
        """The minimum in `text`, such as "prompts=16,generated=8,phases=decode+prefill".

        Raises:
            UsageError: an unknown name, or a value that is not a number.
        """
        fields = {field.name for field in dataclasses.fields(cls)} - {"public_key"}
        values: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in fields or not value:
                raise UsageError(
                    f"{shown(part)} is not a minimum of a certificate: give NAME=VALUE, of"
                    f" {listed_names(sorted(fields))}"
                )
            if name in _NUMBERS:
                if not value.isdecimal() or len(value) > _DIGITS:
                    raise UsageError(f"{name} is {shown(value)}: expected a number")
                values[name] = int(value)
            elif name == "precision":
                values[name] = value
            elif name == "phases":  # also spelled as `loradeploy parity --phases` does
                values[name] = tuple(each.strip().replace("-", " ") for each in value.split("+"))
            else:
                values[name] = tuple(piece.strip() for piece in value.split("+"))
        return cls(**values)

    def lacking(self, coverage: Coverage, precision: str) -> str | None:
        """What a check of `coverage` lacks; None if it is sufficient."""
        for name in _NUMBERS:
            found, least = getattr(coverage, name), getattr(self, name)
            if found < least:
                return f"it was checked with {found} {name}, {least} are required"
        missing = [phase for phase in self.phases if phase not in coverage.phases]
        if missing:
            return f"the phase {shown(missing[0])} was not checked, it is required"
        for name in self.providers:
            if not any(checked.is_named(name) for checked in coverage.providers):
                return f"it was not checked on {shown(name)}, which is required"
        if self.precision not in (None, precision):
            return f"its precision is {precision}, {self.precision} is required"
        return None


_NUMBERS: Final = ("prompts", "prompt_tokens", "generated")
_DIGITS: Final = 12
