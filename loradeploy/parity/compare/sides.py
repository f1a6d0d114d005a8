"""What is compared with something else: a model that takes arrays by name and gives arrays."""

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
    # By name, or without names in the order that the other side gives them.
    Given = dict[str, NDArray[Any]] | list[NDArray[Any]]

_NUMBERS: Final = "biuf"  # numpy's kinds of them


@dataclass(frozen=True, eq=False)
class Side:
    """One of two models that are compared.

    `title`: as it was given; `name`: short, for tables.
    `inputs`: what it takes, None where it does not tell. `precision`: of its weights, None where it
    is only seen by what it gives. `vocabulary`: the number of ids that it knows, `labels` their
    names by number, `tokenizer` the file of its tokenizer: None where that is unknown. `provider`:
    what runs it, None where that is not onnxruntime here. `hint`: what to think of first where it
    differs from itself.
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
    """What a callable or module returned, as numpy arrays.

    A mapping stays one by name (a transformers output is one; its cache becomes `present.{i}.key`
    and `present.{i}.value`), a sequence stays without names, a single array is a sequence of one.

    Raises:
        TypeError: something in it is no array of numbers.
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
    """Names of labels by number; None where they are transformers' placeholders."""
    if not isinstance(given, Mapping):
        return None
    labels = {str(number): str(name) for number, name in given.items()}
    made_up = all(name == f"LABEL_{number}" for number, name in labels.items())
    return None if made_up else labels


def _flat(name: str, value: Any) -> dict[str, NDArray[Any]]:
    """One entry of a mapping: an array, a cache, or a tuple of arrays (all hidden states)."""
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
