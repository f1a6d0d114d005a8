"""Identify a product's modules by comparing its weight with the matrices of a checkpoint.

Names may differ, and a fused weight can be several matrices side by side. A product is identified
only if its whole weight is the checkpoint's (see weights.py), and its bias too, if the graph adds
one. A weight that fits two modules identifies neither unless a name decides; a name that the weight
contradicts is an error.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.files.base_files import weight_files
from loradeploy.adapter.files.tensors import StoredTensor, map_tensors
from loradeploy.adapter.tasks import LM_HEAD
from loradeploy.errors import ExportError, ModelError, listed_names
from loradeploy.export.match.modules.mapping import FOUND_BY as GIVEN
from loradeploy.export.match.modules.naming import Named, Namer
from loradeploy.export.match.modules.weights import (
    Matrix,
    Sample,
    bias_difference,
    difference,
    is_stored,
)
from loradeploy.export.match.products import Product, describe, products
from loradeploy.export.match.whole.biases import bias_numbers

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

FOUND_BY: Final = "weight identity"
# Embeddings are not linear layers, but an output head may be tied to them.
_EMBEDDINGS: Final = re.compile(r"(.*\.)?(wte|wpe|[a-z_]*embed(dings|_tokens|_positions|_in)?)")

# The matrices of a product's outputs, in order.
_Matrices = tuple[Matrix, ...]


@dataclass(frozen=True)
class _Reason:
    """Why a product that resembles `modules` is not identified as them, and what to do.

    `padded`: the product has their outputs, followed by others.
    """

    modules: tuple[str, ...]
    text: str
    remedy: str = "export the graph from the checkpoint as it is, or merge the adapter before"
    padded: bool = False


class CheckpointWeights:
    """The matrices of the checkpoint in a directory, to be found in a graph.

    `needed`: the modules that adapters change, which have to be found or refused.

    Raises:
        ModelError: the directory has no readable safetensors.
    """

    def __init__(self, directory: Path, needed: Iterable[str]) -> None:
        files = weight_files(directory)
        self._directory = directory
        self._needed = frozenset(needed)
        self._by_inputs: dict[int, list[Matrix]] = {}
        self._modules: dict[str, StoredTensor] = {}
        self._found: set[str] = set()
        self._conv1d: dict[str, bool] = {}
        self._reasons: list[str] = []
        stored: dict[str, StoredTensor] = {}
        for file in files:
            stored |= map_tensors(file, error=ModelError)[0]
        self._by_shape: dict[tuple[int, ...], list[tuple[str, StoredTensor]]] = {}
        for name, tensor in stored.items():
            module = name.removesuffix(".weight")
            if name != module:
                self._by_shape.setdefault(tensor.shape, []).append((module, tensor))
            if name != module and len(tensor.shape) == 2:
                self._add(module, tensor, stored.get(f"{module}.bias"))
        modules = (module for alike in self._by_shape.values() for module, _ in alike)
        self._prefix = _prefix(self._needed, modules)

    def _add(self, module: str, stored: StoredTensor, bias: StoredTensor | None) -> None:
        self._modules[module] = stored
        # transformers' Conv1D stores [in, out].
        for transposed in (False, True):
            matrix = Matrix(module, stored, transposed, bias)
            self._by_inputs.setdefault(matrix.inputs, []).append(matrix)

    def namer(self, names: Namer) -> Namer:
        """A namer by weights, which uses `names` if a weight fits more than one module.

        It raises ExportError if a product is named after a module of the checkpoint but does not
        have its weight, or if its weight resembles that of a `needed` module without being equal.
        """

        calls_of: Counter[ir.Value] = Counter()

        def name(product: Product) -> Named | None:
            fitting, reasons = self._fitting(product)
            named = names(product)
            known = named is not None and all(
                self._stored(module) in self._modules for module, _ in named.modules
            )
            if named is not None and known:
                # A graph may have the checkpoint's names, and the adapters those with a prefix.
                modules = tuple((self._name(self._stored(m)), size) for m, size in named.modules)
                chosen = [one for one in fitting if self._called(one) == modules]
                padded = [
                    reason
                    for reason in reasons
                    if reason.padded
                    and tuple(map(self._name, reason.modules)) == tuple(m for m, _ in modules)
                ]
                if not chosen and padded:
                    self._note(product, padded)
                    return None
                if not chosen:
                    raise self._contradiction(product, named, fitting, reasons)
                return self._proved(product, chosen[0], named.found_by)
            if named is not None and named.found_by == GIVEN:
                return named  # the checkpoint has no matrix for the module
            if product.weight not in calls_of and product.node.graph is not None:
                calls_of.update(each.weight for each in products(product.node.graph))
            calls = calls_of[product.weight]
            if len(fitting) == 1 and calls == 1:
                return self._proved(product, fitting[0], FOUND_BY)
            if len(fitting) > 1 and named is not None:
                fitting = self._ending(fitting, named) or fitting
                if len(fitting) == 1 and calls == 1:
                    return self._proved(product, fitting[0], named.found_by)
            if len(fitting) == 1:
                # Tied modules are stored once, like one module that is called several times.
                alike = tuple(matrix.module for matrix in fitting[0])
                text = (
                    f"its weight, that of {listed_names(alike)}, is also that of"
                    f" {calls - 1} more, and no name says whether they are one module"
                )
                reasons = [_Reason(alike, text, "identify it in `module_map`")]
            elif fitting:
                alike = tuple(m.module for one in fitting for m in one)
                text = f"its weight is that of {listed_names(alike)}, and no name says which"
                reasons = [_Reason(alike, text, "identify it in `module_map`")]
            self._note(product, reasons)
            return None

        return name

    def _ending(self, fitting: list[_Matrices], named: Named) -> list[_Matrices]:
        """Those of `fitting` whose paths end the named ones: a wrapper's names are longer."""
        return [
            matrices
            for matrices in fitting
            if len(matrices) == len(named.modules)
            and all(
                module.endswith(f".{matrix.module}") and outputs == matrix.outputs
                for (module, outputs), matrix in zip(named.modules, matrices, strict=True)
            )
        ]

    def module_with(self, numbers: NDArray[Any]) -> str | None:
        """The only module whose weight is the constant `numbers`; None if several have it."""
        found = [
            module
            for module, stored in self._by_shape.get(numbers.shape, ())
            if is_stored(numbers, stored)
        ]
        return self._name(found[0]) if len(found) == 1 else None

    def contradicts(self, module: str, numbers: NDArray[Any]) -> bool:
        """Whether the checkpoint has another weight of the shape of `numbers` for `module`.

        Its path may have or lack the prefix of a wrapper.
        """
        own = f".{self._stored(module)}"
        stored = [
            tensor
            for name, tensor in self._by_shape.get(numbers.shape, ())
            if own.endswith(f".{name}") or f".{name}".endswith(own)
        ]
        return bool(stored) and not any(is_stored(numbers, tensor) for tensor in stored)

    def missing(self) -> tuple[str, ...]:
        """The modules whose matrix was not found in any product, except embeddings."""
        return tuple(
            sorted(m for m in self._modules if m not in self._found and not _is_embedding(m))
        )

    @property
    def conv1d(self) -> dict[str, bool]:
        """Of the modules that products alone compute, whether their matrix is stored [in, out].

        Only those whose layout their sizes do not show: of square matrices that are not symmetric,
        and of all that are stored [in, out].
        """
        return self._conv1d

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why products that resemble modules were not identified as them."""
        return tuple(self._reasons)

    def _proved(self, product: Product, matrices: _Matrices, found_by: str) -> Named:
        self._found.update(matrix.module for matrix in matrices)
        if len(matrices) == 1 and _is_embedding(matrices[0].module):
            return Named(((LM_HEAD, product.out_features),), f"{found_by}, tied")
        if len(matrices) == 1:
            self._note_layout(product, matrices[0])
        unseen: frozenset[str] = frozenset()
        if bias_numbers(product.node, product.out_features) is None:
            # Exporters drop biases of zeros.
            unseen = frozenset(
                m.module for m in matrices if m.bias is not None and m.bias.array().any()
            )
        return Named(self._called(matrices), found_by, frozenset(map(self._name, unseen)))

    def _note_layout(self, product: Product, matrix: Matrix) -> None:
        turned = dataclasses.replace(matrix, transposed=not matrix.transposed)
        square = matrix.inputs == matrix.outputs
        if square and Sample(product).resembles(0, turned):
            return  # symmetric, or close to it: both layouts may fit
        if square or matrix.transposed:
            self._conv1d[self._name(matrix.module)] = matrix.transposed

    def _called(self, matrices: _Matrices) -> tuple[tuple[str, int], ...]:
        return tuple((self._name(matrix.module), matrix.outputs) for matrix in matrices)

    def _name(self, stored: str) -> str:
        """The adapters' name of a module of the checkpoint."""
        strip, add = self._prefix
        return add + stored.removeprefix(strip)

    def _stored(self, module: str) -> str:
        """The checkpoint's name of a module of adapters and graphs."""
        strip, add = self._prefix
        return strip + module.removeprefix(add) if module.startswith(add) else module

    def _fitting(self, product: Product) -> tuple[list[_Matrices], list[_Reason]]:
        """Every sequence of matrices that is the product's weight, and how similar ones differ."""
        reasons: list[_Reason] = []
        found: list[_Matrices] = []
        partial: list[tuple[int, _Matrices]] = [(0, ())]
        sample = Sample(product)
        while partial:
            first, matrices = partial.pop()
            before = len(partial) + len(found)
            for matrix in self._by_inputs.get(product.in_features, ()):
                if not sample.resembles(first, matrix):
                    continue
                reason = difference(product, first, matrix)
                if reason is not None:
                    reasons.append(_Reason((matrix.module,), reason))
                    continue
                longer, reached = (*matrices, matrix), first + matrix.outputs
                if reached < product.out_features:
                    partial.append((reached, longer))
                else:
                    found.append(longer)
            if len(matrices) == 1 and len(partial) + len(found) == before:
                (matrix,) = matrices
                more = product.out_features - first
                text = f"it has the rows of {matrix.name} and {more} more, as a padded vocabulary"
                reasons.append(_Reason((matrix.module,), text, padded=True))
        return self._with_biases(product, _distinct(found), reasons)

    def _with_biases(
        self, product: Product, found: list[_Matrices], reasons: list[_Reason]
    ) -> tuple[list[_Matrices], list[_Reason]]:
        numbers = bias_numbers(product.node, product.out_features)
        if numbers is None:
            return found, reasons
        bias = numbers.astype("float32")
        fitting = []
        for matrices in found:
            begin, problem = 0, None
            for matrix in matrices:
                part = bias[begin : begin + matrix.outputs]
                problem = problem or bias_difference(matrix, part)
                begin += matrix.outputs
            if problem is None:
                fitting.append(matrices)
            else:
                modules = tuple(matrix.module for matrix in matrices)
                text = f"it has the weight of {listed_names(modules)}, but {problem}"
                reasons.append(_Reason(modules, text))
        return fitting, reasons

    def _contradiction(
        self, product: Product, named: Named, fitting: list[_Matrices], reasons: list[_Reason]
    ) -> ExportError:
        modules = listed_names(module for module, _ in named.modules)
        if fitting:
            seen = f"its weight is that of {listed_names(m.module for m in fitting[0])}"
        else:
            seen = reasons[0].text if reasons else f"its numbers are not those of {modules}.weight"
        return ExportError(
            f"{describe(product)} is named after {modules} ({named.found_by}), but {seen}: give the"
            f" checkpoint that the graph was made from in place of {self._directory}"
        )

    def _note(self, product: Product, reasons: list[_Reason]) -> None:
        """Record why the product is not identified; raise if it resembles a needed module."""
        if not reasons:
            return
        self._reasons.append(f"{describe(product)}: {reasons[0].text}")
        for reason in reasons:
            if self._needed.intersection(map(self._name, reason.modules)):
                raise ExportError(
                    f"{describe(product)} cannot take adapters: {reason.text}; {reason.remedy}"
                )


def _prefix(needed: Iterable[str], modules: Iterable[str]) -> tuple[str, str]:
    """The prefixes to remove from and to add to the checkpoint's names, to get the adapters'.

    A checkpoint may be saved from the bare model (h.0.attn) while adapters are for the one with a
    head (transformer.h.0.attn), or the reverse. All modules of the adapters have to agree.
    """
    known = set(modules)
    unknown = [name for name in needed if name not in known and name != LM_HEAD]
    found: set[tuple[str, str]] = set()
    for name in unknown:
        longer = [m.removesuffix(name) for m in known if m.endswith(f".{name}")]
        shorter = [name.removesuffix(m) for m in known if name.endswith(f".{m}")]
        ways = [(prefix, "") for prefix in longer] + [("", prefix) for prefix in shorter]
        if len(ways) != 1:
            return "", ""
        found.add(ways[0])
    return found.pop() if len(found) == 1 else ("", "")


def _distinct(found: list[_Matrices]) -> list[_Matrices]:
    """`found` without duplicates, and without embeddings if a linear layer has the same weight.

    A square matrix is compared as stored and transposed; if it is symmetric, both fit.
    """
    ways = list({tuple(matrix.module for matrix in one): one for one in found}.values())
    layers = [one for one in ways if not any(_is_embedding(m.module) for m in one)]
    return layers or ways


def _is_embedding(module: str) -> bool:
    return _EMBEDDINGS.fullmatch(module) is not None
