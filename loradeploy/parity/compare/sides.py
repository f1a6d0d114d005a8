"""One side of a comparison: a model that maps arrays by name to arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.manifest import TensorSpec
from loradeploy.bundle.names import PRESENT
from loradeploy.bundle.proof.provider import ProviderFacts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Feeds = Mapping[str, NDArray[Any]]
    # By name, or without names in the order of the other side's outputs.
    Given = dict[str, NDArray[Any]] | list[NDArray[Any]]

_NUMBERS: Final = "biuf"  # numpy's dtype kinds of numbers


@dataclass(frozen=True, eq=False)
class Side:
    """One of two models that are compared.

    `title`: as the user gave it; `name`: a short name for tables.
    `inputs`: the declared inputs, None if unknown. `precision`: that of its weights; None if it can
    only be inferred from its outputs. `vocabulary`: number of token ids; `labels`: label names by
    number; `tokenizer`: its tokenizer file; each is None if unknown. `provider`: the execution
    provider, None if this onnxruntime does not run it. `hint`: likely cause, appended to the
    message if two runs differ.
    """

    title: str
    name: str
    run: Callable[[Feeds], Given]
    inputs: tuple[TensorSpec, ...] | None = None
    precision: str | None = None
    digest: str | None = None
    data_digest: str | None = None
    vocabulary: int | None = None
    labels: Mapping[str, str] | None = None
    tokenizer: Path | None = None
    provider: ProviderFacts | None = None
    hint: str = ""


def arrays_of(result: Any) -> Given:
    """Convert the return value of a callable or module to numpy arrays.

    A mapping, such as a transformers output, becomes arrays by name (its cache `present.{i}.key`
    and `present.{i}.value`), a sequence a list without names, a single array a list of one.

    Raises:
        TypeError: a value is not an array of numbers.
    """
    if isinstance(result, Mapping):
        named: dict[str, NDArray[Any]] = {}
        for name, value in result.items():
            if value is not None:
                named.update(_flat(str(name), value))
        return named
    if isinstance(result, list | tuple):
        return [_array(f"output {number}", value) for number, value in enumerate(result)]
    return [_array("output 0", result)]


def labels_of(given: Any) -> dict[str, str] | None:
    """Return label names by number; None if they are unknown or transformers' placeholders."""
    if not isinstance(given, Mapping):
        return None
    labels = {str(number): str(name) for number, name in given.items()}
    placeholders = all(name == f"LABEL_{number}" for number, name in labels.items())
    return None if placeholders else labels


def _flat(name: str, value: Any) -> dict[str, NDArray[Any]]:
    """Return the arrays of one entry: an array, a cache, or a tuple of arrays (hidden states)."""
    if hasattr(value, "layers") and hasattr(value, "get_seq_length"):
        return {
            f"{PRESENT}{number}.{part}": _array(name, tensor)
            for number, layer in enumerate(value.layers)
            for part, tensor in (("key", layer.keys), ("value", layer.values))
        }
    if isinstance(value, list | tuple) and any(hasattr(part, "shape") for part in value):
        return {f"{name}.{n}": _array(f"{name}.{n}", part) for n, part in enumerate(value)}
    return {name: _array(name, value)}


def _array(name: str, value: Any) -> NDArray[Any]:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in _NUMBERS:
        raise TypeError(f"{name} is not an array of numbers: it is a {type(value).__name__}")
    return array
