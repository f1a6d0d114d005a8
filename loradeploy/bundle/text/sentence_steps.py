"""What is done to pooled vectors: the modules of sentence-transformers that are computed here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.text.sentence_files import RecipeReader, join
from loradeploy.errors import BundleError, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    # Of vectors [batch, size] to vectors [batch, another size].
    Step = Callable[[Floats], Floats]

_VECTOR: Final = "sentence_embedding"
_LEAST: Final = 1e-12  # a vector of zeros stays one


def _dense(reader: RecipeReader, path: str) -> Step:
    values = reader.object(join(path, "config.json"))
    where = reader.directory / path
    _only_on_vectors(values, where)
    residual = values.get("use_residual") is True
    weights = reader.weights(
        path,
        {
            "linear.weight": True,
            "linear.bias": values.get("bias", True) is not False,
            "residual.weight": residual and values.get("in_features") != values.get("out_features"),
        },
    )
    given = values.get("activation_function", "torch.nn.modules.activation.Tanh")
    activation = _ACTIVATIONS.get(str(given).rpartition(".")[2])
    if activation is None or not str(given).startswith("torch.nn."):
        raise BundleError(
            f"{where}: the activation {shown(given)} is not supported; there are"
            f" {', '.join(_ACTIVATIONS)}"
        )
    W, bias = weights["linear.weight"], weights.get("linear.bias")
    beside = weights.get("residual.weight")

    def step(x: Floats) -> Floats:
        _check_size(x, W.shape[1], where)
        y: Floats = activation(x @ W.T + (0 if bias is None else bias))
        if residual:
            y = y + (x if beside is None else x @ beside.T)
        return y

    return step


def _layer_norm(reader: RecipeReader, path: str) -> Step:
    reader.object(join(path, "config.json"))
    weights = reader.weights(path, {"norm.weight": True, "norm.bias": True})

    def step(x: Floats) -> Floats:
        _check_size(x, weights["norm.weight"].size, reader.directory / path)
        centered = x - x.mean(axis=1, keepdims=True)
        deviation = np.sqrt((centered**2).mean(axis=1, keepdims=True) + np.float32(1e-5))
        scaled: Floats = centered / deviation * weights["norm.weight"] + weights["norm.bias"]
        return scaled

    return step


def _normalizing(reader: RecipeReader, path: str) -> Step:
    # Its older form has no files, and not even a folder.
    values = reader.object(join(path, "config.json")) if path else {}
    _only_on_vectors(values, reader.directory / path)
    return normalize


def normalize(x: Floats) -> Floats:
    """Vectors [batch, size] at length 1; zeros stay zeros."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    scaled: Floats = x / np.maximum(length, _LEAST)
    return scaled


STEPS: Final[Mapping[str, Callable[[RecipeReader, str], Step]]] = {
    "Dense": _dense,
    "LayerNorm": _layer_norm,
    "Normalize": _normalizing,
}
_ACTIVATIONS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "GELU": lambda x: 0.5 * x * (1 + np.vectorize(math.erf, otypes=[np.float32])(x / math.sqrt(2))),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "SiLU": lambda x: x / (1 + np.exp(-x)),
}


def _only_on_vectors(values: Mapping[str, Any], where: Path) -> None:
    for name in ("module_input_name", "module_output_name"):
        if values.get(name) not in (None, _VECTOR):
            raise BundleError(
                f"{where}: {name} is {shown(values[name])}, only {_VECTOR!r} is supported"
            )


def _check_size(x: Floats, size: int, where: Path) -> None:
    if x.shape[1] != size:
        raise BundleError(f"{where} takes vectors of {size}, the pooling gives {x.shape[1]}")
