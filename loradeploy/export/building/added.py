"""Add rows to a base graph for the tokens that adapters add, and remove them again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loradeploy.adapter.fitting.fit import MOST_ROWS
from loradeploy.adapter.fitting.settle import with_rows
from loradeploy.adapter.fitting.vocabulary import (
    Vocabulary,
    added_tokens,
    refuse_resized,
    token_tables,
)
from loradeploy.adapter.tasks import CAUSAL_LM
from loradeploy.bundle.manifest import AddedTokens
from loradeploy.bundle.names import ROWS
from loradeploy.bundle.outputs import main_output
from loradeploy.errors import AdapterMismatchError, ExportError, UsageError, prefixing_errors
from loradeploy.export.bases.base import Base, Options
from loradeploy.export.graph.file import outputs
from loradeploy.export.match.linears import Findings
from loradeploy.export.passes.tokens.vocabulary import resize_vocabulary, tables_in, vocabulary_in
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Adapter

logger = logger_of(__name__)


def with_added_tokens(
    base: Base, findings: Findings, options: Options
) -> tuple[Findings, Options, AddedTokens | None]:
    """Add rows to the graph for the tokens that the adapters of the options add.

    Their number is the largest that an adapter adds, or that the bundle had before. Whole
    embeddings and heads of the adapters become trained rows.

    Raises:
        AdapterMismatchError: an adapter adds too many tokens, or changes too many of the base's
            rows; or the graph's output head is unknown.
        ExportError: the output head is quantized or fused, so that no rows can be added.
        UsageError: tokens are added, and `layout="rows"` is requested.
    """
    before = None if base.before is None else base.before.added_tokens
    vocabulary = _vocabulary_of_base(base, findings)
    if vocabulary is None:
        return findings, options, None
    if base.other_part or base.tower is not None:  # the other graph would lack the tokens
        for name, adapter in options.adapters.items():
            with prefixing_errors(name):
                refuse_resized(adapter, vocabulary)
        return findings, options, None
    counts = {}
    for name, adapter in options.adapters.items():
        with prefixing_errors(name):
            counts[name] = added_tokens(adapter, vocabulary, MOST_ROWS)
    adapters = _with_rows(base, findings, vocabulary, options.adapters, counts)
    count = max([*counts.values(), 0 if before is None else before.count])
    if not count:
        return findings, options, None
    if options.layout == ROWS:
        adding = [name for name, own in counts.items() if own]
        raise UsageError(
            f"{f'{adding[0]} adds tokens' if adding else 'this bundle has rows for added tokens'},"
            " which are factors of the embedding, and these need slot numbers: export with"
            ' `layout="slots"`'
        )
    output = None
    if vocabulary.head is not None or base.task == CAUSAL_LM:
        ranks = {spec.name: len(spec.shape) for spec in outputs(base.graph)}
        output = main_output(base.task, ranks)
    if vocabulary.head is None and output is not None:
        name = max(counts, key=lambda name: counts[name])
        raise AdapterMismatchError(
            f"{name}: it adds tokens, and the graph's output head is not known as one with a row"
            " for each token: merge it instead, `merge=True`"
        )
    logger.info("rows for %d tokens that adapters add to the base's %d", count, vocabulary.size)
    findings = resize_vocabulary(
        base.graph,
        findings,
        vocabulary.size + count,
        f"adapters add {count} tokens, for which {_rows_of(before)}: export the unquantized"
        " checkpoint with them",
    )
    added = AddedTokens(vocabulary.size, count, vocabulary.embedding, vocabulary.head, output)
    return findings, dataclasses.replace(options, adapters=adapters), added


def _with_rows(
    base: Base,
    findings: Findings,
    vocabulary: Vocabulary,
    adapters: Mapping[str, Adapter],
    counts: Mapping[str, int],
) -> dict[str, Adapter]:
    """The adapters with trained rows in place of whole tables, if they add tokens, by `counts`.

    Raises:
        AdapterMismatchError: an adapter adds tokens to one of two tables only.
    """
    tables: Mapping[str, NDArray[Any]] = {}
    if any(counts.values()):
        found = tables_in(base.graph, findings)
        tables = {table: values[: vocabulary.size] for table, values in found.items()}
    made = dict(adapters)
    for name, adapter in adapters.items():
        with prefixing_errors(name):
            if counts[name]:
                changed = token_tables(adapter, vocabulary)
                made[name] = with_rows(adapter, tables.get, MOST_ROWS, changed)
            added_tokens(made[name], vocabulary, MOST_ROWS)
    return made


def without_added_tokens(base: Base, findings: Findings) -> Findings:
    """Remove a bundle's rows for added tokens from its graph, for a merge.

    Raises:
        ExportError: the graph's output head is quantized or fused.
    """
    added = None if base.before is None else base.before.added_tokens
    vocabulary = _vocabulary_of_base(base, findings)
    if added is None or vocabulary is None:
        return findings
    return resize_vocabulary(
        base.graph,
        findings,
        vocabulary.size,
        f"{_rows_of(added)}, which a merge takes out: merge the adapter into the unquantized"
        " checkpoint",
    )


def _vocabulary_of_base(base: Base, findings: Findings) -> Vocabulary | None:
    """The graph's vocabulary without the rows that a bundle has for added tokens."""
    found = vocabulary_in(base.graph, findings)
    added = None if base.before is None else base.before.added_tokens
    if added is None:
        return found
    if found is None or found.size != added.size or (found.head is None) != (added.head is None):
        raise ExportError(
            f"the graph has no embedding and output head of {added.size} tokens: it was changed"
        )
    return dataclasses.replace(found, size=added.base)


def _rows_of(added: AddedTokens | None) -> str:
    if added is None:
        return "the graph has no rows"
    return f"this bundle has {added.count} row{'s' * (added.count > 1)} for added tokens"
