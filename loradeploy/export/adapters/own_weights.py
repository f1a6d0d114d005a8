"""Compare the base's embeddings and output head with copies of them in adapters' files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loradeploy.adapter.fitting.fit import MOST_ROWS
from loradeploy.adapter.fitting.settle import same_numbers, values_digest, with_rows, without_copies
from loradeploy.adapter.fitting.vocabulary import token_tables
from loradeploy.export.adapters.given import named
from loradeploy.export.graph.edit import constant_of
from loradeploy.export.match.linears import Linear

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Adapter
    from loradeploy.export.match.parts import Part


def settled(
    model: torch.nn.Module, adapters: Mapping[str, Adapter], *, merge: bool
) -> dict[str, Adapter]:
    """The adapters without copies of weights of `model`, the base in float32.

    As side inputs, weights that differ from the model's in few rows are these rows.

    For a merge, the base weights and rows in the adapter overwrite those of `model` before it is
    traced, for all modules that share them.

    Raises:
        AdapterMismatchError: two weights of the adapter are tied in the model, and differ; or it
            has rows of an embedding whose head is tied by config.json alone.
    """
    from loradeploy.lora.base.vocabulary import refuse_rows_of_tied, vocabulary_of
    from loradeploy.lora.parameters import overwrite

    for name, adapter in adapters.items():
        with named(name):
            refuse_rows_of_tied(model, adapter)
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def is_own(name: str, values: NDArray[Any]) -> bool:
        return same_numbers(parameters[name].detach().numpy(), values)

    found = {name: without_copies(adapter, is_own) for name, adapter in adapters.items()}
    if not merge:
        tokens = vocabulary_of(model)
        for name, each in found.items():
            tables = () if tokens is None else token_tables(each, tokens)
            with named(name):
                found[name] = with_rows(
                    each, lambda weight: parameters[weight].detach().numpy(), MOST_ROWS, tables
                )
        return found
    for name, adapter in found.items():
        overwrite(model, adapter)
        if adapter.factors or adapter.saved:
            found[name] = dataclasses.replace(adapter, carried={}, rows={})
    return found


def model_digests(model: torch.nn.Module) -> dict[str, str]:
    """`Manifest.own_weights` of a model in PyTorch.

    Of weights that are equal and not tied only the first is there: who reads the manifest takes
    equal ones for one weight.
    """
    from loradeploy.lora.base.vocabulary import TABLES, table_of

    embeddings = {table_of(model, getter) for getter in TABLES} - {None}
    found: dict[str, str] = {}
    owners: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module not in embeddings:
            continue
        for part, values in module.named_parameters(recurse=False):
            digest = values_digest(values.detach().numpy())
            if part != "weight" or owners.setdefault(digest, values) is values:
                found[f"{name}.{part}"] = digest
    return found


def graph_digests(
    linears: Mapping[str, Linear], parts: Mapping[str, Part], head: str | None
) -> dict[str, str]:
    """`Manifest.own_weights` of a graph with the output head `head`, without quantized weights."""
    return {name: values_digest(values) for name, values in _own(linears, parts, head)}


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
