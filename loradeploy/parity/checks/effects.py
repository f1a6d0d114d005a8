"""The effect of each adapter in the reference, without which nothing is proved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loradeploy.parity.context import AdapterUnderTest, CheckContext
from loradeploy.parity.report.results import AdapterFacts

if TYPE_CHECKING:
    from loradeploy.parity.reference.pytorch import Reference


def adapter_facts(context: CheckContext, reference: Reference) -> tuple[AdapterFacts, ...]:
    """Return each adapter's effect in the reference; one without an effect must be untrained."""
    facts = []
    for tested in context.adapters:
        effect = reference.effect[tested.name]
        failed, message = False, None
        if effect.largest == 0.0:
            failed, message = _without_effect(context, tested)
        facts.append(
            AdapterFacts(
                tested.name,
                tested.digest,
                effect.largest,
                effect.mean,
                failed,
                message,
            )
        )
    return tuple(facts)


def _without_effect(context: CheckContext, tested: AdapterUnderTest) -> tuple[bool, str]:
    """For an adapter without an effect: whether that is a failure, and the explanation."""
    adapter, added = tested.adapter, context.manifest.added_tokens
    if any(pair.has_update for pair in adapter.factors.values()):
        return True, "the adapter has factors other than zero, yet it changes nothing in PyTorch"
    if added is not None and any(
        token >= added.base and values.any()
        for rows in adapter.rows.values()
        for token, values in zip(rows.indices, rows.values, strict=True)
    ):
        return False, "its only effect is on tokens that the base does not have"
    if adapter.rows:
        return False, "no effect: all of its updates are zero, and its tokens' rows change nothing"
    return False, "no effect: it is untrained, all of its updates are zero"
