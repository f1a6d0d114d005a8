"""Inputs and outputs of a graph, and its layers that adapters can change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from loradeploy.adapter.adapter import Kind
from loradeploy.bundle.names import (
    MANIFEST_NAME,
    lora_a_name,
    lora_b_name,
    offset_name,
    scale_name,
)
from loradeploy.errors import BundleError, shortened, shown

# The largest plausible number of values in a tensor.
_LARGEST_SHAPE: Final = 2**48


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: numpy's name of its dtype, symbols for its dynamic dimensions."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class StoredWeight:
    """The location of a weight in model.onnx.data; `dtype`: numpy's name of the stored dtype."""

    offset: int
    length: int
    dtype: str


@dataclass(frozen=True)
class LoraTarget:
    """A layer of the graph that takes low-rank side inputs.

    `lora_A`, `lora_B`: names of the side inputs, [adapters, in, rank] and [adapters, rank, out].
    `weight`: the initializer, [in, out], or [out, in] if `transposed`.
    `slice`: the module's range of outputs if the weight is fused from several modules.
    `found_by`: the evidence that identified the graph's node as this module.
    `kind`: "linear", "embedding" (`in_features` is the size of the vocabulary), or "experts", a
    parameter of `experts` experts, whose ranks are added up in the side inputs. ("conv2d" does not
    occur in bundles: convolutions are merged.)
    `stored`: location of the weight outside the graph, which DoRA needs.
    """

    module: str
    in_features: int
    out_features: int
    lora_A: str
    lora_B: str
    weight: str
    transposed: bool
    found_by: str
    slice: tuple[int, int] | None = None
    kind: Kind = "linear"
    stored: StoredWeight | None = None
    experts: int = 1

    @property
    def factors(self) -> tuple[str, str]:
        """The names of both side inputs."""
        return self.lora_A, self.lora_B

    def rank_from(self, least: int) -> int:
        """`least`, rounded up to a possible rank of the side inputs: a multiple of `experts`."""
        return -(-least // self.experts) * self.experts


@dataclass(frozen=True)
class SavedTarget:
    """A parameter that an adapter may replace (modules_to_save).

    `input`: the side input, [adapters, *shape]; with the last two axes swapped if `transposed`.
    `shape`: the parameter's shape in the checkpoint's orientation.
    `lacking`: the checkpoint has no values for it (an untrained head). Its default is zeros, and
    adapters without it are refused.
    """

    parameter: str
    input: str
    shape: tuple[int, ...]
    transposed: bool
    lacking: bool = False

    @property
    def slot_shape(self) -> tuple[int, ...]:
        """The shape of one slot of the side input."""
        if not self.transposed:
            return self.shape
        *outer, rows, columns = self.shape
        return (*outer, columns, rows)


@dataclass(frozen=True)
class OutputTarget:
    """A layer whose output y an adapter may change to scale ⊙ y + offset, separately for each row.

    `scale`, `offset`: names of the side inputs, [adapters, size]; None if the graph lacks them.
    Their defaults are ones and zeros. DoRA uses both, a trained bias only `offset`.
    """

    module: str
    size: int
    scale: str | None = None
    offset: str | None = None


@dataclass(frozen=True)
class AddedTokens:
    """Rows of a vocabulary after the base's, for tokens that adapters add.

    `base`: the number of the base's tokens. `count`: the number of rows after them. These are
    zeros; an adapter's added tokens are passed as trained rows. An adapter has the base's tokens
    and those of the following ones for which it has trained rows.
    `embedding`, `head`: the modules with one row per token; `head` is None without an output head.
    `output`: the graph output with one logit per token, which has an entry in `changed`: its offset
    hides the tokens that an adapter does not have. None if there is no such output.
    """

    base: int
    count: int
    embedding: str
    head: str | None = None
    output: str | None = None

    @property
    def size(self) -> int:
        """The rows of the embedding, and of the output head, in the graph."""
        return self.base + self.count


def sharing(own_weights: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The modules that share each weight of `Manifest.own_weights`, by parameter.

    Trained rows apply to all of these modules. Weights with equal digests are shared: if weights of
    a checkpoint are equal but not tied, only one of them is in `own_weights`.
    """
    users: dict[str, list[str]] = {}
    for parameter, digest in own_weights.items():
        if parameter.endswith(".weight"):
            users.setdefault(digest, []).append(parameter.removesuffix(".weight"))
    return {
        parameter: tuple(sorted(users[digest]))
        for parameter, digest in own_weights.items()
        if parameter.endswith(".weight")
    }


def takes_tokens(own_weights: Mapping[str, str], targets: Iterable[LoraTarget]) -> bool:
    """Whether trained rows are supported: all users of an embedding take factors."""
    kinds = {target.module: target.kind for target in targets}
    return any(
        all(module in kinds for module in users) and "embedding" in {kinds[m] for m in users}
        for users in sharing(own_weights).values()
    )


def check_specs(where: str, specs: Iterable[TensorSpec]) -> None:
    """Raise BundleError if `specs` is empty, or has duplicate names or an implausible size."""
    names = [spec.name for spec in specs]
    if not names or len(set(names)) != len(names):
        raise BundleError(f"{MANIFEST_NAME}: {where} is empty, or has a name twice")
    for spec in specs:
        if math.prod(d for d in spec.shape if isinstance(d, int) and d) > _LARGEST_SHAPE:
            raise BundleError(
                f"{MANIFEST_NAME}: {shortened(spec.name)} has the shape {shown(list(spec.shape))}"
            )


def check_slices(targets: Iterable[LoraTarget]) -> None:
    """Raise BundleError if a slice does not have its module's size, or two slices overlap."""
    sliced = [(t.weight, *t.slice, t) for t in targets if t.slice is not None]
    ends: dict[str, int] = {}
    for weight, begin, end, target in sorted(sliced, key=lambda entry: entry[:3]):
        if begin < ends.get(weight, 0) or end - begin != target.out_features:
            raise BundleError(
                f"{MANIFEST_NAME}: the slice of {target.module} has another size than the"
                " module, or overlaps another"
            )
        ends[weight] = end


def check_stored(target: LoraTarget, stored: StoredWeight) -> None:
    """Raise BundleError unless `stored` has the size of the target's weight."""
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2}
    length = target.in_features * target.out_features * sizes.get(stored.dtype, 0)
    if stored.offset < 0 or not length or stored.length != length:
        raise BundleError(
            f"{MANIFEST_NAME}: the stored weight of {target.module} has another size than the"
            " module"
        )


def check_names(
    targets: Iterable[LoraTarget], changed: Iterable[OutputTarget], saved: Iterable[SavedTarget]
) -> None:
    """Raise BundleError if a side input is not named after its module or parameter.

    If the names of two side inputs of equal shape were swapped by hand, each module would get the
    factors of the other one.
    """
    named: list[tuple[str, str | None, str]] = []
    for target in targets:
        named.append((target.module, target.lora_A, lora_a_name(target.module)))
        named.append((target.module, target.lora_B, lora_b_name(target.module)))
    for output in changed:
        named.append((output.module, output.scale, scale_name(output.module)))
        named.append((output.module, output.offset, offset_name(output.module)))
    named += [(each.parameter, each.input, each.parameter) for each in saved]
    for module, name, expected in named:
        if name not in (None, expected):
            raise BundleError(
                f"{MANIFEST_NAME}: {shortened(module)} has the side input {shown(name)}, which is"
                " not named after it: export again"
            )
