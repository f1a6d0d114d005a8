"""Load the base model in PyTorch, with the quantized weights of the graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loradeploy.adapter.tasks import CLASSIFICATIONS
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import MissingDependencyError, prefixing_errors
from loradeploy.parity.context import CheckContext
from loradeploy.parity.reference.quantized import (
    QUANTIZED,
    QuantizedWeight,
    dequantize_into,
    layers_of,
    quantized_weights,
    weight_of,
)
from loradeploy.parity.reference.requantized import with_roundings

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Adapter


@dataclass(frozen=True, eq=False)
class Base:
    """The base model in PyTorch, float32, and the quantized weights of the graph.

    `notes`: remarks on these weights for the report.
    """

    model: torch.nn.Module
    quantized: Mapping[str, QuantizedWeight]
    notes: tuple[str, ...] = ()


def load_model(context: CheckContext) -> torch.nn.Module:
    """Load the base model of `context` with the bundle's head, in float32.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
        ModelError: transformers cannot load the model.
        AdapterMismatchError: an adapter does not have parameters that the model lacks.
    """
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as problem:
        raise MissingDependencyError(
            f"parity's reference is the PyTorch model, and {problem.name} is not installed:"
            " pip install 'loradeploy[export]'"
        ) from None
    from loradeploy.export import trace
    from loradeploy.export.adapters.given import check_brought
    from loradeploy.lora.base.vocabulary import resize_for, resize_to

    manifest = context.manifest
    labels = None
    if manifest.task in CLASSIFICATIONS:
        shapes = [spec.shape for spec in manifest.outputs if spec.name == output_of(manifest)]
        labels = shapes[0][-1] if shapes and isinstance(shapes[0][-1], int) else None
    brought = {saved.parameter for saved in manifest.saved}
    brought.update(name for tested in context.adapters for name in tested.adapter.saved)
    model, lacking = trace.load_model(context.model, manifest.task, labels=labels, brought=brought)
    for tested in context.adapters:
        check_brought(tested.name, tested.adapter, lacking)
        if context.merged:
            with prefixing_errors(tested.name):
                resize_for(model, tested.adapter)
    if manifest.added_tokens is not None:
        resize_to(model, manifest.added_tokens.size)
    return model


def size_of(model: torch.nn.Module) -> int:
    """Return the size of the model's parameters in bytes."""
    return sum(parameter.nbytes for parameter in model.parameters())


def take_weights(context: CheckContext, model: torch.nn.Module) -> Base:
    """Return `model` as the base, with the graph's quantized weights where it has them.

    Raises:
        BundleError: the graph's quantized weights cannot be read, or are not the base's.
    """
    if context.manifest.precision not in QUANTIZED:
        return Base(model, {})
    quantized = quantized_weights(context.bundle, context.manifest)
    if not context.merged:
        dequantize_into(model, quantized, context.manifest)
    elif context.manifest.requantized:
        return _requantized(context, model, quantized)
    return Base(model, quantized)


def _requantized(
    context: CheckContext, model: torch.nn.Module, quantized: Mapping[str, QuantizedWeight]
) -> Base:
    """Return the base with the rounding errors of a merged graph, if they are nothing else."""

    def weights() -> dict[str, NDArray[np.float32]]:
        return {name: weight_of(layer).copy() for name, layer in layers_of(model, quantized)}

    (tested,) = context.adapters
    base = weights()
    with merged(model, tested.adapter):
        merged_weights = weights()
    found, problems = with_roundings(quantized, base.get, merged_weights.get)
    notes = (f"not rounding alone: {problem}" for problem in problems)
    return Base(model, found, tuple(notes))


def load_base(context: CheckContext) -> Base:
    """Load the base model of `context`, with the graph's quantized weights where it has them.

    Raises: as `load_model` and `take_weights`.
    """
    return take_weights(context, load_model(context))


@contextmanager
def merged(model: torch.nn.Module, adapter: Adapter) -> Iterator[None]:
    """Merge `adapter` into the weights of `model` while the block lasts."""
    from loradeploy.lora.inject import load

    injection = load(model, adapter)
    try:
        injection.merge()
        yield
    finally:
        injection.remove()
