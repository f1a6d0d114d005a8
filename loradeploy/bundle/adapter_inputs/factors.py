"""Convert adapters to the side inputs of a bundle, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.algebra.experts import with_targets
from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.files.formats import OLIVE, form_of_tensors
from loradeploy.adapter.fitting.fit import refuse
from loradeploy.adapter.fitting.vocabulary import with_factors_for
from loradeploy.adapter.heads import UNDECLARED
from loradeploy.adapter.scaling import with_ranks
from loradeploy.adapter.tasks import PEFT_TASKS
from loradeploy.bundle.adapter_inputs.changes import output_changes, recover_changes
from loradeploy.bundle.adapter_inputs.tokens import joined, token_factors
from loradeploy.bundle.fitting.added_tokens import tokens_in, vocabulary_of_base, with_all_tokens
from loradeploy.bundle.fitting.fit import THIS_BUNDLE, fit_to
from loradeploy.bundle.fitting.labels import may_replace_head, with_all_labels, without_padding
from loradeploy.bundle.manifest import ADAPTERS, RANK, LoraTarget, Manifest
from loradeploy.bundle.names import ADAPTER_MODE
from loradeploy.errors import AdapterMismatchError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.adapter_inputs.base import BaseValues

# About the square root of float32's maximum; float16's maximum is smaller.
_OVERFLOWS: Final = 1e18
# The range of a factor's maximum in which float16 has full precision down to 1/64 of the maximum.
_LEAST_PRECISE: Final = 2.0**-8
_MOST_PRECISE: Final = 2.0**15
# The limit of A, so that x A fits into float16: x may have 4096 features of up to about 1000.
_MOST_A: Final = 2.0


def side_inputs(
    adapter: Adapter, manifest: Manifest, base: BaseValues | None = None
) -> dict[str, NDArray[Any]]:
    """The side inputs of `adapter` alone (one slot), by name, in `manifest.factor_dtype`.

    `M.lora_A` [1, in, rank] = Aᵀ and `M.lora_B` [1, rank, out] = s · Bᵀ, computed in float32 with
    one final cast; saved parameters [1, …]; `M.scale` and `M.offset` [1, out] of DoRA and of
    trained biases, and factors of trained rows (tokens.py), which need `base`. Modules that the
    adapter does not change are omitted: the graph has defaults for them.

    Raises:
        AdapterMismatchError: the adapter does not fit; the message lists the mismatches.
    """
    return side_inputs_of_fitted(fit_to(adapter, manifest), manifest, base)


def side_inputs_of_fitted(
    adapter: Adapter, manifest: Manifest, base: BaseValues | None
) -> dict[str, NDArray[Any]]:
    """`side_inputs` of an adapter that `fit_to` returned for the same manifest."""
    adapter = with_all_tokens(with_all_labels(adapter, manifest.saved_shapes()), manifest)
    dtype = np.dtype(manifest.factor_dtype)
    arrays: dict[str, NDArray[Any]] = {}
    tokens = token_factors(adapter, manifest, base)
    for target in manifest.targets:
        pair = adapter.factors.get(target.module)
        own = None
        if pair is not None:
            s = np.float32(adapter.scaling(target.module))
            with np.errstate(over="ignore"):  # overflows are refused below
                own = pair.A.astype(np.float32).T, pair.B.astype(np.float32).T * s
        if (factors := joined(own, tokens.get(target.module))) is not None:
            if dtype == np.float16:
                factors = _balanced(*factors)
            arrays[target.lora_A] = _slot(factors[0], dtype, target.lora_A)
            arrays[target.lora_B] = _slot(factors[1], dtype, target.lora_B)
    for replaced in manifest.saved:
        values = adapter.saved.get(replaced.parameter)
        if values is not None:
            oriented = np.swapaxes(values, -1, -2) if replaced.transposed else values
            arrays[replaced.input] = _slot(oriented, dtype, replaced.input)
    for name, change in output_changes(adapter, manifest, base).items():
        arrays[name] = _slot(change, dtype, name)
    return arrays


def branch_choice(manifest: Manifest) -> dict[str, NDArray[np.int64]]:
    """The feed that selects the graph's branch with adapters; empty if it has no branches."""
    return {ADAPTER_MODE: np.ones(1, np.int64)} if manifest.branches else {}


def check_side_inputs(arrays: Mapping[str, NDArray[Any]], manifest: Manifest) -> None:
    """Raise AdapterMismatchError unless `arrays` are one slot of the bundle's side inputs."""
    if form_of_tensors({name: values.shape for name, values in arrays.items()}) is OLIVE:
        raise AdapterMismatchError(f"it {OLIVE.message}")
    expected = {spec.name: spec for spec in manifest.side_inputs() if ADAPTERS in spec.shape}
    problems = []
    for target in manifest.targets:
        if (target.lora_A in arrays) != (target.lora_B in arrays):
            problems.append(f"{target.module} has one factor without the other")
        elif (_rank(target, arrays) or 0) % target.experts:
            problems.append(f"{target.module} has a rank not divisible by {target.experts} experts")
    problems += [
        f"{saved.parameter} is missing, which the base lacks too"
        for saved in manifest.saved
        if saved.lacking and saved.input not in arrays
    ]
    ranks = {name: _rank(target, arrays) for target in manifest.targets for name in target.factors}
    for name, values in sorted(arrays.items()):
        spec = expected.get(name)
        if spec is None:
            problems.append(f"{name} is not a side input of this bundle")
            continue
        sizes = {ADAPTERS: 1, RANK: ranks.get(name)}
        shape = [sizes.get(d) if isinstance(d, str) else d for d in spec.shape]
        if list(values.shape) != shape or values.dtype != spec.dtype:
            problems.append(
                f"{name} is {values.dtype} {list(values.shape)}, the bundle expects {spec.dtype}"
                f" {shape}"
            )
    refuse(problems, THIS_BUNDLE)


def _rank(target: LoraTarget, arrays: Mapping[str, NDArray[Any]]) -> int | None:
    """The rank of the factors of `target`: the last dimension of A, which B must match."""
    A = arrays.get(target.lora_A)
    return A.shape[-1] if A is not None and A.ndim else None


def adapter_from_side_inputs(
    arrays: Mapping[str, NDArray[Any]], manifest: Manifest, base: BaseValues | None
) -> Adapter:
    """The adapter whose side inputs are `arrays`. The scaling stays in B, so that alpha = rank.

    Scales and offsets are converted to DoRA's magnitudes and trained biases with `base`. The arrays
    do not declare what the outputs of a classifier's head mean: its problem type is UNDECLARED.

    Raises:
        AdapterMismatchError: the arrays are not side inputs of the bundle, or `base` lacks weights,
            or they add tokens.
    """
    check_side_inputs(arrays, manifest)
    added = manifest.added_tokens
    if added is not None and tokens_in(arrays, manifest) != added.base:
        raise AdapterMismatchError(
            "it adds tokens to the base's, and their factors would depend on the values that PEFT"
            " writes into the added rows: use the PEFT directory that it was made from"
        )
    factors: dict[str, Factors] = {}
    for target in manifest.targets:
        if target.lora_A in arrays:
            A, B = (arrays[name][0].T for name in (target.lora_A, target.lora_B))
            factors[target.module] = Factors(
                np.ascontiguousarray(A),
                np.ascontiguousarray(B),
                kind=target.kind,
                experts=target.experts,
            )
    factors, biases = recover_changes(arrays, factors, manifest, base)
    saved = {}
    for replaced in manifest.saved:
        if replaced.input in arrays:
            values = arrays[replaced.input][0]
            oriented = np.swapaxes(values, -1, -2) if replaced.transposed else values
            saved[replaced.parameter] = np.ascontiguousarray(oriented)
    modules_to_save = tuple(sorted({name.rpartition(".")[0] for name in saved}))
    saved.update(biases)
    blank = AdapterConfig(
        r=1,
        lora_alpha=1,
        modules_to_save=modules_to_save,
        bias="all" if biases else "none",
        use_dora=any(pair.magnitude is not None for pair in factors.values()),
        lora_bias=any(pair.bias is not None for pair in factors.values()),
        base_model_name_or_path=manifest.base.name,
        task_type=PEFT_TASKS.get(manifest.task),
    )
    ranks = {module: pair.rank for module, pair in factors.items()}
    blank = with_targets(blank, factors)
    config = with_ranks(blank, ranks, dict.fromkeys(ranks, 1.0))
    known = manifest.base.digest if manifest.base.kind == "checkpoint" else None
    problem = UNDECLARED if may_replace_head(arrays, manifest) else None
    adapter = Adapter(config, factors, saved, base_digest=known, problem_type=problem)
    if added is not None:
        adapter = with_factors_for(adapter, vocabulary_of_base(manifest, added), added.base)
    return without_padding(adapter)


def _balanced(
    A: NDArray[np.float32], B: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rescale A [in, rank] and B [rank, out] for float16, without a change of their product.

    B starts at zero. After a short training, or with a low learning rate, its values are below the
    range in which float16 has full precision, while those of A are not. If the product is large,
    B gets the larger values, so that x A overflows only if x A B does. Powers of two are exact.
    """
    top_A, top_B = np.abs(A).max(axis=0), np.abs(B).max(axis=1)  # [rank]
    precise = (np.minimum(top_A, top_B) >= _LEAST_PRECISE) & (top_B <= _MOST_PRECISE)
    precise &= top_A <= _MOST_A
    usable = (top_A > 0) & (top_B > 0) & np.isfinite(top_A) & np.isfinite(top_B)
    if (precise | ~usable).all():
        return A, B
    moved = usable & ~precise
    log_A, log_B = (np.log2(top, out=np.zeros_like(top), where=moved) for top in (top_A, top_B))
    # Halves are rounded up, as Math.round does in the JavaScript client.
    equal = np.floor((log_B - log_A) / 2 + 0.5)
    most = np.floor(np.log2(_MOST_A) - log_A)  # so that A is at most _MOST_A
    least = np.ceil(log_B - np.log2(_MOST_PRECISE))  # so that B is at most _MOST_PRECISE
    exponents = np.where(moved, np.maximum(np.minimum(equal, most), least), 0)
    powers = np.exp2(exponents).astype(np.float32)
    return A * powers, B / powers[:, np.newaxis]


def _slot(values: NDArray[Any], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        slot = np.ascontiguousarray(values, dtype=dtype)[np.newaxis]
    if not computable(slot):
        raise AdapterMismatchError(f"{name} does not fit into {dtype}: its values overflow")
    return slot


def computable(values: NDArray[Any]) -> bool:
    """Whether `values` are finite and small enough that products with activations are finite."""
    most = min(_OVERFLOWS, float(np.finfo(values.dtype).max))
    return bool((np.abs(values) <= most).all())  # False for NaN
