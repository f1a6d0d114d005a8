"""The supported modules of sentence-transformers that are applied to pooled vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.text.vectors.files import RecipeReader, join
from loradeploy.errors import BundleError, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    # From vectors [batch, size] to vectors [batch, other size].
    Step = Callable[[Floats], Floats]

_VECTOR: Final = "sentence_embedding"
_LEAST: Final = 1e-12  # keeps a vector of zeros at zero


@dataclass(frozen=True, eq=False)
class Dense:
    """activation(x Wᵀ + b), plus x or x Rᵀ if it is `residual`; R is `beside`.

    `W` float32 [out, in]; `bias` [out] and `beside` [out, in], or None. `where`: for messages.
    """

    W: Floats
    bias: Floats | None
    activation: str
    residual: bool
    beside: Floats | None
    where: Path

    def size_after(self, size: int | None) -> int:
        """`out`, for inputs of `size`; raises BundleError if that is known and not `in`."""
        if size is not None:
            check_size(size, self.W.shape[1], self.where)
        return int(self.W.shape[0])

    def __call__(self, x: Floats) -> Floats:
        """Map vectors [batch, in] to vectors [batch, out]."""
        check_size(x.shape[1], self.W.shape[1], self.where)
        bias = 0 if self.bias is None else self.bias
        y: Floats = ACTIVATIONS[self.activation](x @ self.W.T + bias)
        if self.residual:
            y = y + (x if self.beside is None else x @ self.beside.T)
        return y


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """Layer normalization. `weight` and `bias` are float32 [size]. `where`: for messages."""

    weight: Floats
    bias: Floats
    where: Path

    def size_after(self, size: int | None) -> int:
        """The size; raises BundleError if the `size` of the inputs is known and differs."""
        if size is not None:
            check_size(size, self.weight.size, self.where)
        return int(self.weight.size)

    def __call__(self, x: Floats) -> Floats:
        """Normalize vectors [batch, size]."""
        check_size(x.shape[1], self.weight.size, self.where)
        centered = x - x.mean(axis=1, keepdims=True)
        deviation = np.sqrt((centered**2).mean(axis=1, keepdims=True) + np.float32(1e-5))
        scaled: Floats = centered / deviation * self.weight + self.bias
        return scaled


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
    name = str(given).rpartition(".")[2]
    if name not in ACTIVATIONS or not str(given).startswith("torch.nn."):
        raise BundleError(
            f"{where}: the activation {shown(given)} is not supported; there are"
            f" {', '.join(ACTIVATIONS)}"
        )
    bias, beside = weights.get("linear.bias"), weights.get("residual.weight")
    return Dense(weights["linear.weight"], bias, name, residual, beside, where)


def _layer_norm(reader: RecipeReader, path: str) -> Step:
    reader.object(join(path, "config.json"))
    weights = reader.weights(path, {"norm.weight": True, "norm.bias": True})
    return LayerNorm(weights["norm.weight"], weights["norm.bias"], reader.directory / path)


def _normalizing(reader: RecipeReader, path: str) -> Step:
    # The older form of the module has neither files nor a folder.
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
ACTIVATIONS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "GELU": lambda x: 0.5 * x * (1 + np.vectorize(math.erf, otypes=[np.float32])(x / math.sqrt(2))),
    "Sigmoid": lambda x: _sigmoid(x),
    "SiLU": lambda x: x * _sigmoid(x),
}


def _sigmoid(x: Any) -> Any:
    return 0.5 * (1 + np.tanh(0.5 * x))  # does not overflow


def _only_on_vectors(values: Mapping[str, Any], where: Path) -> None:
    for name in ("module_input_name", "module_output_name"):
        if values.get(name) not in (None, _VECTOR):
            raise BundleError(
                f"{where}: {name} is {shown(values[name])}, only {_VECTOR!r} is supported"
            )


def check_size(given: int, size: int, where: Path) -> None:
    """Raise BundleError unless the `given` size of vectors is that of the step at `where`."""
    if given != size:
        raise BundleError(
            f"{where} takes vectors of size {size}, the step before it returns size {given}"
        )
