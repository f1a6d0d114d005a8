"""A product's modules by the numbers of its weight: the rows that a checkpoint has too.

Names may differ, and a packed weight be made of several tensors. Of each tensor the first, the
middle and the last row are held against those of the product, so that nothing large is read. What
quantisation does to a row turns it by little; rows of different tensors are as good as orthogonal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.adapter.base_files import weight_files
from loradeploy.adapter.tensors import StoredTensor, map_tensors
from loradeploy.errors import ModelError
from loradeploy.export.naming import Named, Namer
from loradeploy.export.products import Product

if TYPE_CHECKING:
    from numpy.typing import NDArray

FOUND_BY: Final = "weight identity"
# 1 − cosine of two rows: 11 bits of a number are kept in fp16, 3 or 4 at int4.
_FLOAT: Final = 1e-3
_QUANTISED: Final = 0.2
# Embeddings are no linear layers, but an output head may be tied to them.
_EMBEDDINGS: Final = re.compile(r"(.*\.)?(wte|wpe|[a-z_]*embed(dings|_tokens|_positions|_in)?)")
_HEAD: Final = "lm_head"


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A matrix of the checkpoint; `turned` where it is read as [in, out]."""

    module: str
    stored: StoredTensor
    turned: bool

    @property
    def outputs(self) -> int:
        return self.stored.shape[1 if self.turned else 0]

    @property
    def inputs(self) -> int:
        return self.stored.shape[0 if self.turned else 1]

    def picks(self) -> list[int]:
        return [0, self.outputs // 2, self.outputs - 1]

    def rows(self) -> NDArray[np.float32]:
        values = self.stored.array()
        rows = values[:, self.picks()].T if self.turned else values[self.picks()]
        return np.ascontiguousarray(rows, dtype=np.float32)


class CheckpointWeights:
    """The matrices of the checkpoint in a directory, to be found again in a graph.

    Raises:
        ModelError: the directory holds no readable safetensors.
    """

    def __init__(self, directory: Path) -> None:
        files = weight_files(directory)
        self._by_inputs: dict[int, list[_Tensor]] = {}
        self._rows: dict[int, NDArray[np.float32]] = {}
        self._modules: set[str] = set()
        self._found: set[str] = set()
        for file in files:
            for name, stored in map_tensors(file, error=ModelError)[0].items():
                if name.endswith(".weight") and len(stored.shape) == 2:
                    self._add(name.removesuffix(".weight"), stored)

    def _add(self, module: str, stored: StoredTensor) -> None:
        self._modules.add(module)
        # transformers' Conv1D holds [in, out].
        for turned in (False, True):
            tensor = _Tensor(module, stored, turned)
            self._by_inputs.setdefault(tensor.inputs, []).append(tensor)

    def checked(self, namer: Namer) -> Namer:
        """What `namer` says, where the checkpoint has these numbers by these names."""

        def name(product: Product) -> Named | None:
            named = namer(product)
            if named is None:
                return None
            reached = 0
            for module, outputs in named.modules:
                found = (t.module == module for t in self._at(product, reached))
                if not any(found):
                    return None
                reached += outputs
            self._found.update(module for module, _ in named.modules)
            return named

        return name

    def __call__(self, product: Product) -> Named | None:
        """The modules whose tensors the product's weight consists of."""
        modules: list[tuple[str, int]] = []
        reached = 0
        while reached < product.out_features:
            tensor = next(self._at(product, reached), None)
            if tensor is None:
                return None
            modules.append((tensor.module, tensor.outputs))
            reached += tensor.outputs
        if len(modules) == 1 and _is_embedding(modules[0][0]):
            return Named(((_HEAD, product.out_features),), f"{FOUND_BY}, tied")
        self._found.update(module for module, _ in modules)
        return Named(tuple(modules), FOUND_BY)

    def missing(self) -> tuple[str, ...]:
        """The modules with a matrix that no product was found to have, embeddings left out."""
        return tuple(
            sorted(m for m in self._modules if m not in self._found and not _is_embedding(m))
        )

    def _at(self, product: Product, first: int) -> Iterator[_Tensor]:
        """The tensors that the product's outputs from `first` on are of."""
        fitting = self._by_inputs.get(product.in_features, [])
        if not fitting:
            return
        limit = _QUANTISED if product.quantised else _FLOAT
        begin = product.rows([first])
        if begin is None:
            return
        near = np.flatnonzero(_distance(self._first_rows(product.in_features), begin) < limit)
        for tensor in (fitting[index] for index in near):
            if first + tensor.outputs > product.out_features:
                continue
            rows = product.rows([first + pick for pick in tensor.picks()])
            if rows is not None and (_distance(rows, tensor.rows()) < limit).all():
                yield tensor

    def _first_rows(self, inputs: int) -> NDArray[np.float32]:
        if inputs not in self._rows:
            self._rows[inputs] = np.stack([t.rows()[0] for t in self._by_inputs[inputs]])
        return self._rows[inputs]


def _distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 − cosine, row by row; rows of zeros are like no other."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = (a * b).sum(axis=1) / lengths
    distance: NDArray[np.float32] = 1 - np.where(lengths > 0, cosine, 0)
    return distance


def _is_embedding(module: str) -> bool:
    return _EMBEDDINGS.fullmatch(module) is not None
