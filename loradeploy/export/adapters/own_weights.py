"""Compare the base's embeddings and output head with copies of them in adapters' files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loradeploy.adapter.fitting.fit import MOST_ROWS
from loradeploy.adapter.fitting.settle import same_numbers, values_digest, with_rows, without_copies
from loradeploy.adapter.fitting.vocabulary import tied_head_refusal, token_tables
from loradeploy.bundle.targets import sharing
from loradeploy.errors import AdapterMismatchError, prefixing_errors
from loradeploy.export.graph.edit import constant_of
from loradeploy.export.match.linears import Linear

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Adapter
    from loradeploy.adapter.fitting.vocabulary import Vocabulary
    from loradeploy.export.match.whole.parts import Part


class QuantizedTieError(AdapterMismatchError):
    """The adapter has values for two tied weights, one of which is quantized in the graph.

    Side inputs can add to rows of a quantized weight, but a merge cannot replace them.
    """


def without_copies_of_model(
    model: torch.nn.Module, adapters: Mapping[str, Adapter], *, merge: bool
) -> dict[str, Adapter]:
    """Return the adapters without copies of weights of `model`, the base in float32.

    For side inputs, an embedding or output head that differs from the model's in few rows is
    replaced by those rows.

    For a merge, the base weights and rows in the adapter overwrite those of `model` before it is
    traced, for all modules that share them.

    Raises:
        AdapterMismatchError: two weights that are tied in the model differ in the adapter; or the
            adapter has rows of an embedding whose head is tied by config.json alone.
    """
    from loradeploy.lora.base.vocabulary import (
        TABLES,
        refuse_rows_of_tied,
        table_of,
        vocabulary_of,
    )
    from loradeploy.lora.parameters import overwrite

    for name, adapter in adapters.items():
        with prefixing_errors(name):
            refuse_rows_of_tied(model, adapter)
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def is_own(name: str, values: NDArray[Any]) -> bool:
        return same_numbers(parameters[name].detach().numpy(), values)

    found = {name: without_copies(adapter, is_own) for name, adapter in adapters.items()}
    if not merge:
        tokens = vocabulary_of(model)
        weights = [getattr(table_of(model, getter), "weight", None) for getter in TABLES]

        def own_table(name: str) -> NDArray[Any] | None:
            values = parameters[name]
            is_table = any(values is weight for weight in weights)
            return values.detach().numpy() if is_table else None

        for name, each in found.items():
            tables = () if tokens is None else token_tables(each, tokens)
            with prefixing_errors(name):
                found[name] = with_rows(each, own_table, MOST_ROWS, tables)
        return found
    for name, adapter in found.items():
        overwrite(model, adapter)
        if adapter.factors or adapter.saved:
            found[name] = dataclasses.replace(adapter, carried={}, rows={})
    return found


def model_digests(model: torch.nn.Module, tokens: int | None = None) -> dict[str, str]:
    """`Manifest.own_weights` of a PyTorch model: digests of its embeddings and output head.

    `tokens`: the number of the base's tokens, if rows were added to `model`.

    Of equal weights that are not tied only the first is listed, because equal digests in the
    manifest mean one weight. An embedding that is tied by config.json alone is omitted, because
    PEFT writes its trained rows into another weight too.
    """
    from loradeploy.lora.base.vocabulary import TABLES, table_of, tied_by_config_alone

    embeddings = {table_of(model, getter) for getter in TABLES} - {None}
    apart = tied_by_config_alone(model)
    found: dict[str, str] = {}
    owners: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module not in embeddings:
            continue
        for part, values in module.named_parameters(recurse=False):
            if apart is not None and f"{name}.{part}" == apart[0]:
                continue
            digest = values_digest(values.detach().numpy()[:tokens])
            if part != "weight" or owners.setdefault(digest, values) is values:
                found[f"{name}.{part}"] = digest
    return found


def graph_digests(
    linears: Mapping[str, Linear],
    parts: Mapping[str, Part],
    vocabulary: Vocabulary | None,
    head: str | None,
    ties_head: bool | None,
) -> dict[str, str]:
    """`Manifest.own_weights` of a graph with the output head `head`.

    A quantized head gets the digest of the embedding that it is tied to, or none. As in
    `model_digests`, an embedding that is tied by config.json alone is omitted.

    `vocabulary`: of the graph, None if it is not known. `ties_head`: as in `Base`.
    """
    found = {name: values_digest(values) for name, values in _own(linears, parts, head)}
    if vocabulary is None or vocabulary.head is None or vocabulary.tied or ties_head is False:
        return found
    embedding, other = vocabulary.weights
    if other not in found and embedding in found:
        found[other] = found[embedding]
    elif ties_head:
        found.pop(embedding, None)
    return found


def without_copies_of_graph(
    adapter: Adapter,
    own_weights: Mapping[str, str],
    linears: Mapping[str, Linear],
    vocabulary: Vocabulary | None,
    *,
    proven: bool,
    ties_head: bool | None,
) -> Adapter:
    """Return the adapter without copies of the base's weights, for a merge into a graph.

    Its values for an embedding also become those of the output head that is tied to it, if the
    graph stores the head as a separate constant.

    `own_weights`: as in the manifest. `proven`: equal weights are tied in the checkpoint.
    `vocabulary`: of the graph, None if it is not known. `ties_head`: as in `Base`.

    Raises:
        AdapterMismatchError: the adapter has values for a weight that is, or may be, tied to
            another one, and the graph has that one quantized, fused, or with other values.
    """
    adapter = without_copies(adapter, lambda n, values: own_weights.get(n) == values_digest(values))
    users, brought = sharing(own_weights), {*adapter.rows, *adapter.carried, *adapter.saved}
    if vocabulary is not None and vocabulary.head is not None:
        embedding, head = vocabulary.weights
        if embedding in adapter.rows and embedding not in own_weights and head not in brought:
            raise AdapterMismatchError(
                f"rows of {embedding} were trained (trainable_token_indices), which PEFT puts into"
                f" {head} too, because the base's config.json has tie_word_embeddings; but the"
                " graph has another weight there: merge it into the checkpoint that it was trained"
                " on"
            )
    rows, carried = dict(adapter.rows), dict(adapter.carried)
    for name in sorted({*rows, *carried}):
        for module in users.get(name, ()):
            linear = linears.get(module)
            if f"{module}.weight" in brought:
                continue
            if name in adapter.rows and name.removesuffix(".weight") in linears and linear is None:
                raise AdapterMismatchError(tied_head_refusal(f"{module}.weight", name))
            if linear is None:
                continue
            if linear.quantized and not proven and ties_head is None:
                raise AdapterMismatchError(
                    f"{name} is in the adapter, and it is not known whether {module}, which is"
                    " quantized in the graph, is tied to it: export the ONNX model with"
                    " `checkpoint`, the directory of the model that it was made from"
                )
            if linear.quantized or linear.slice is not None:
                refusal = QuantizedTieError if linear.quantized else AdapterMismatchError
                raise refusal(
                    f"{name} is in the adapter, and {module}, which is tied to it in the base, is"
                    f" {'quantized' if linear.quantized else 'fused with others'} in the graph:"
                    " merge it into the unquantized checkpoint"
                )
            if proven and name in adapter.rows:
                rows[f"{module}.weight"] = adapter.rows[name]
            elif proven:
                carried[f"{module}.weight"] = adapter.carried[name]
    return dataclasses.replace(adapter, rows=rows, carried=carried)


def _own(
    linears: Mapping[str, Linear], parts: Mapping[str, Part], head: str | None
) -> Iterator[tuple[str, NDArray[Any]]]:
    for module, part in parts.items():
        if part.kind == "embedding":
            yield f"{module}.weight", constant_of(part.weight)
    linear = None if head is None else linears.get(head)
    if linear is not None and not linear.quantized and linear.slice is None:
        weight = constant_of(linear.weight)
        yield f"{head}.weight", weight if linear.transposed else weight.T
