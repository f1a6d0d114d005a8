"""How onnxruntime runs the graphs of a check: each provider at each level of optimization."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loradeploy.errors import UsageError
from loradeploy.parity.names import LEVELS
from loradeploy.parity.report.results import Variant
from loradeploy.runtime.devices.table import CPU

if TYPE_CHECKING:
    import onnxruntime


DEFAULT: Final = Variant(CPU, "all")
_LISTED: Final = 4


def choose_variants(
    providers: Sequence[str] | None, optimization: Sequence[str] | None
) -> tuple[Variant, ...]:
    """Every provider at every level; on the CPU and at "all" where none is given.

    A provider is named as `runtime.devices.providers` reads names: "cuda", "cuda:1".

    Raises:
        UsageError: a provider that this onnxruntime does not have, or an unknown level.
    """
    from loradeploy.runtime.devices.providers import full_name, resolve

    names = [CPU] if providers is None else [full_name(name) for name in providers]
    levels = [DEFAULT.optimization] if optimization is None else list(optimization)
    if not names or not levels:
        raise UsageError("no provider or no level of optimization is given: nothing would be run")
    for name in names:
        resolve([name])
    if unknown := [level for level in levels if level not in LEVELS]:
        raise UsageError(
            f"{unknown[0]!r} is no level of optimization: there are {', '.join(LEVELS)}"
        )
    return tuple(dict.fromkeys(Variant(name, level) for name in names for level in levels))


def session_options(variant: Variant) -> onnxruntime.SessionOptions:
    """New options for a session of `variant`."""
    import onnxruntime

    from loradeploy.runtime.reading.weights import MAPPED

    options = onnxruntime.SessionOptions()
    level = LEVELS[variant.optimization]
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    # A check ends with a look at whether the files have changed: a copy for each is not needed.
    options.add_session_config_entry(MAPPED, "1")
    return options


def start(bundle: Path, variants: Sequence[Variant]) -> list[str]:
    """Open the bundle's graph once on every provider but the CPU's; say which nodes that one runs.

    Raises:
        UsageError: a provider does not start.
        BundleError: onnxruntime cannot open the graph.
    """
    from loradeploy.runtime.reading.graph import open_graph, placement_of

    notes = []
    for variant in variants:
        if variant.provider == CPU:
            continue
        try:
            # onnxruntime puts the CPU's provider behind by itself, for nodes and not for the whole.
            session = open_graph(bundle, [variant.provider], session_options(variant))
        except UsageError:
            raise UsageError(
                f"{variant.provider} is installed but does not start here (no device, driver or"
                " library): mend that, or leave it out"
            ) from None
        placed = placement_of(session)
        there = placed.get(CPU, {})
        if there:
            count, total = sum(there.values()), sum(sum(ops.values()) for ops in placed.values())
            named = [f"{times} {op}" for op, times in list(there.items())[:_LISTED]]
            named += ["…"] if len(there) > _LISTED else []
            notes.append(f"{variant}: {count} of {total} nodes run on the CPU ({', '.join(named)})")
    return notes
