"""The variants in which onnxruntime runs the graphs: each provider at each optimization level."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loradeploy.bundle.proof.provider import CAPTURED, OPERATOR
from loradeploy.errors import UsageError
from loradeploy.parity.names import LEVELS
from loradeploy.parity.report.results import Variant
from loradeploy.runtime.devices.providers import Resolved
from loradeploy.runtime.devices.table import CPU

if TYPE_CHECKING:
    import onnxruntime

    from loradeploy.bundle.proof.provider import ProviderFacts
    from loradeploy.runtime.devices.providers import Provider

DEFAULT: Final = Variant("cpu", "all")
ON_CPU: Final[list[Resolved]] = [(CPU, {})]
_LISTED: Final = 4


@dataclass(frozen=True)
class Variants:
    """The variants in which onnxruntime runs the graphs.

    `chains`: the providers to open sessions with, by a variant's `provider`. `captured`: the keys
    of `chains` whose runs are captured. `operated`: the keys of `chains` whose sessions have the
    operators' library `operator`.
    """

    each: tuple[Variant, ...] = (DEFAULT,)
    chains: Mapping[str, list[Resolved]] = field(default_factory=lambda: {"cpu": ON_CPU})
    captured: frozenset[str] = frozenset()
    operated: frozenset[str] = frozenset()
    operator: Path | None = None


DEFAULTS: Final = Variants()


def choose_variants(
    providers: Sequence[Provider] | None,
    optimization: Sequence[str] | None,
    *,
    capture_graphs: bool = False,
    operator: Path | None = None,
) -> Variants:
    """Return every provider at every level; by default the CPU at "all".

    `capture_graphs`: add each provider that can capture runs a second time, with captured runs.
    `operator`: add the CPU a second time, with this library of operators.

    A provider is resolved as a session resolves it, so that it has the same fallback providers.

    Raises:
        UsageError: a provider that this onnxruntime does not have, an unknown level, or
            `capture_graphs` without a provider that can capture runs, or `operator` without the
            CPU.
    """
    from loradeploy.runtime.devices.facts import label_of
    from loradeploy.runtime.devices.providers import recording, resolve
    from loradeploy.runtime.devices.table import known

    given: Sequence[Provider] = ["cpu"] if providers is None else providers
    levels = [DEFAULT.optimization] if optimization is None else list(optimization)
    if not given or not levels:
        raise UsageError("no provider or no level of optimization is given: nothing would be run")
    chains: dict[str, list[Resolved]] = {}
    captured, operated = {}, {}
    for provider in given:
        chain = resolve([provider])
        options = "" if isinstance(provider, str) else _shown(provider[1])
        label = label_of([name for name, _ in chain], chain[0][1]) + options
        chains[label] = chain
        if capture_graphs and known(chain[0][0]).recording:
            captured[label + CAPTURED] = chain
        if operator is not None and chain[0][0] == CPU:
            operated[label + OPERATOR] = chain
    if capture_graphs and not captured:
        recording(next(iter(chains.values())))  # raises an error that names the provider
    if operator is not None and not operated:
        raise UsageError("`operator`: its library computes on the CPU, which is not checked here")
    chains |= captured | operated
    if unknown := [level for level in levels if level not in LEVELS]:
        raise UsageError(
            f"{unknown[0]!r} is not a level of optimization: there are {', '.join(LEVELS)}"
        )
    each = dict.fromkeys(Variant(name, level) for name in chains for level in levels)
    return Variants(tuple(each), chains, frozenset(captured), frozenset(operated), operator)


def _shown(options: Mapping[str, object]) -> str:
    return "".join(f" {name}={value}" for name, value in sorted(options.items()))


def session_options(variant: Variant) -> onnxruntime.SessionOptions:
    """Return new session options for `variant`."""
    import onnxruntime

    from loradeploy.runtime.reading.weights import MAPPED

    options = onnxruntime.SessionOptions()
    level = LEVELS[variant.optimization]
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    # A check is soon done, and its sessions refuse to run if the mapped file changes.
    options.add_session_config_entry(MAPPED, "1")
    return options


@dataclass(frozen=True)
class Started:
    """The results of opening the bundle on every provider: facts of each provider, and notes.

    `crashed`: how the trial process ended, by a variant's `provider`; only those that crashed.
    """

    providers: tuple[ProviderFacts, ...]
    notes: tuple[str, ...]
    crashed: Mapping[str, str]


def start(bundle: Path, variants: Variants) -> Started:
    """Open the bundle once in every variant, and note which nodes fall back to the CPU.

    A provider whose numbers are not trusted as the CPU's are (`like_cpu`) first runs the bundle in
    another process (see `trial`).

    Raises:
        UsageError: a provider does not start.
        BundleError: onnxruntime cannot open the graph.
    """
    from loradeploy.parity.trial import crash_of
    from loradeploy.runtime.devices.facts import facts_of_chain
    from loradeploy.runtime.devices.table import known
    from loradeploy.runtime.session import AdapterSession

    facts: dict[str, ProviderFacts] = {}
    notes = []
    crashed: dict[str, str] = {}
    for provider, chain in variants.chains.items():
        captured = provider in variants.captured
        named = dataclasses.replace(
            facts_of_chain(chain),
            provider=provider,
            captured=captured,
            operator=provider in variants.operated,
        )
        facts[provider] = named
        if not all(known(name).like_cpu for name, _ in chain):
            crash = crash_of(bundle, chain, captured=captured)
            if crash is not None:
                crashed[provider] = f"{provider}: {crash} when it ran the bundle ({named})"
    for variant in variants.each:
        chain = variants.chains[variant.provider]
        captured = variant.provider in variants.captured
        operator = variants.operator if variant.provider in variants.operated else None
        on_cpu_alone = [name for name, _ in chain] == [CPU] and not captured and not operator
        if variant.provider in crashed or on_cpu_alone:
            continue
        # onnxruntime itself appends the CPU provider, as a fallback for single nodes.
        session = AdapterSession(
            bundle,
            chain,
            session_options=session_options(variant),
            check_device=False,
            capture_graphs=captured,
            operator=operator,
        )
        facts[variant.provider] = dataclasses.replace(session.provider, provider=variant.provider)
        placement = session.placement
        on_cpu = placement.get(CPU, {})
        if on_cpu and operator is None:
            count = sum(on_cpu.values())
            total = sum(sum(counts.values()) for counts in placement.values())
            operators = [f"{times} {op}" for op, times in list(on_cpu.items())[:_LISTED]]
            operators += ["…"] if len(on_cpu) > _LISTED else []
            notes.append(
                f"{variant}: {count} of {total} nodes run on the CPU ({', '.join(operators)})"
            )
        session.close()
    return Started(tuple(facts.values()), tuple(notes), crashed)
