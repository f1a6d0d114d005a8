"""What a check runs, chosen from the options before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loradeploy.errors import UsageError
from loradeploy.parity.backends.genai import find_interpreter
from loradeploy.parity.backends.table import Backend, choose_backends
from loradeploy.parity.names import ONNX_GENAI
from loradeploy.parity.phases.choice import choose_phases
from loradeploy.parity.variants import Variants, choose_variants

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest
    from loradeploy.runtime.devices.providers import Provider, Resolved


@dataclass(frozen=True, eq=False)
class Plan:
    """What a check runs.

    `requested`: names of backends that run although they only do by request.
    `genai_python`: the interpreter that has onnxruntime-genai.
    """

    backends: tuple[Backend, ...]
    requested: frozenset[str]
    phases: tuple[str, ...]
    variants: Variants
    genai_python: Path | None

    @property
    def providers(self) -> Sequence[Resolved]:
        """The providers of the first variant."""
        return self.variants.chains[self.variants.each[0].provider]


def make_plan(
    bundle: Path,
    manifest: Manifest,
    *,
    backends: Sequence[str] | None,
    phases: Sequence[str] | None,
    providers: Sequence[Provider] | None,
    optimization: Sequence[str] | None,
    capture_graphs: bool,
    operator: str | os.PathLike[str] | None,
    genai_python: str | os.PathLike[str] | None,
) -> Plan:
    """Choose what the check of `bundle` runs; the options are those of `loradeploy.parity`.

    Raises:
        UsageError: unknown names, nothing to compare, a provider that is not installed, or options
            that do not apply to this bundle.
        OperatorError: the operators' library cannot be used.
    """
    chosen = choose_backends(manifest.mode, backends)
    if not chosen:
        raise UsageError("no backends are given: there is nothing to compare")
    shown = choose_phases(manifest.task, phases, embeds=bool(manifest.embeds))
    variants = choose_variants(
        providers,
        optimization,
        capture_graphs=capture_graphs,
        operator=None if operator is None else Path(operator),
    )
    if operator is not None and not manifest.operators:
        raise UsageError(
            f"`operator`: {bundle} has no calls of operators: export it again with"
            " `loradeploy export --operator`"
        )
    interpreter = find_interpreter(genai_python)
    requested = {*(backends or ()), *(() if interpreter is None else (ONNX_GENAI,))}
    return Plan(chosen, frozenset(requested), shown, variants, interpreter)
