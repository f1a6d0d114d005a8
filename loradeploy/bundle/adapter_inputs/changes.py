"""DoRA and biases as side inputs: a layer's output y becomes scale ⊙ y + offset.

DoRA (Liu et al., 2024, arXiv:2402.09353) scales the product with the weight, without the bias. If y
includes the bias b, and b' is the bias of the adapter, offset = b' − scale ⊙ b. The same side
inputs serve DoRA, trained biases and both. A layer without a bias has b = 0. The bias of B
(`lora_bias`) is added to the base's or the trained one: b' + s · bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.algebra.dora import output_scale
from loradeploy.bundle.fitting.added_tokens import base_offset, tokens_of, visible_logits
from loradeploy.bundle.manifest import LoraTarget, Manifest
from loradeploy.errors import AdapterMismatchError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.adapter_inputs.base import BaseValues


def change_inputs(manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """The side inputs that change outputs: name → the values [size] for the base."""
    added = manifest.added_tokens
    inputs: dict[str, NDArray[np.float32]] = {}
    for output in manifest.changed:
        if output.scale is not None:
            inputs[output.scale] = np.ones(output.size, np.float32)
        if output.offset is not None:
            hides = added is not None and added.output == output.module
            inputs[output.offset] = (
                base_offset(added, manifest.factor_dtype)
                if added is not None and hides
                else np.zeros(output.size, np.float32)
            )
    return inputs


def added_biases(adapter: Adapter, manifest: Manifest) -> set[str]:
    """The adapter's trained biases that the bundle takes as offsets."""
    replaced = {target.parameter for target in manifest.saved}
    takes = {f"{o.module}.bias" for o in manifest.changed if o.offset is not None}
    return {name for name in adapter.saved if name in takes and name not in replaced}


def output_changes(
    adapter: Adapter, manifest: Manifest, base: BaseValues | None
) -> dict[str, NDArray[np.float32]]:
    """The scales and offsets [out] of an adapter that fits, by side input.

    Raises:
        AdapterMismatchError: `base` lacks a weight that DoRA needs.
    """
    targets = {target.module: target for target in manifest.targets}
    biases = added_biases(adapter, manifest)
    changes: dict[str, NDArray[np.float32]] = {}
    added = manifest.added_tokens
    for output in manifest.changed:
        module = output.module
        if added is not None and module == added.output:
            if tokens_of(adapter, manifest) != added.base and output.offset is not None:
                changes[output.offset] = visible_logits(adapter, manifest)
            continue
        pair = adapter.factors.get(module)
        trained = adapter.saved[f"{module}.bias"] if f"{module}.bias" in biases else None
        scaled = pair is not None and pair.magnitude is not None
        added_bias = None if pair is None else pair.bias
        if not scaled and trained is None and added_bias is None:
            continue
        base_bias = None if base is None else base.bias(module)
        scale = np.ones(output.size, np.float32)
        if pair is not None and scaled and output.scale is not None:
            W = _weight(base, targets[module])
            scale = output_scale(W, pair, adapter.scaling(module))
            changes[output.scale] = scale
        if output.offset is not None:
            zero = np.zeros(output.size, np.float32)
            b = zero if base_bias is None else base_bias
            bias = b if trained is None else trained.astype(np.float32)
            offset = bias - scale * b
            if added_bias is not None:
                s = np.float32(adapter.scaling(module))
                offset = offset + s * added_bias.astype(np.float32)
            changes[output.offset] = offset
    return changes


def recover_changes(
    arrays: Mapping[str, NDArray[Any]],
    factors: Mapping[str, Factors],
    manifest: Manifest,
    base: BaseValues | None,
) -> tuple[dict[str, Factors], dict[str, NDArray[np.float32]]]:
    """Recover `factors` with DoRA's magnitudes, and trained biases, from one slot of side inputs.

    B of `factors` includes the scaling. An offset of a layer without a bias becomes the bias of its
    B (`lora_bias`), which PEFT can add to such a layer; the other factors then get biases of zeros.

    Raises:
        AdapterMismatchError: `base` lacks a weight; or there are factors of embeddings beside such
            an offset, which PEFT does not combine.
    """
    targets = {target.module: target for target in manifest.targets}
    scales: dict[str, NDArray[np.float32]] = {}
    biases: dict[str, NDArray[np.float32]] = {}
    for output in manifest.changed:
        if manifest.added_tokens is not None and output.module == manifest.added_tokens.output:
            continue  # this offset hides tokens
        scale = None if output.scale is None else arrays.get(output.scale)
        offset = None if output.offset is None else arrays.get(output.offset)
        if scale is not None:
            scales[output.module] = scale[0].astype(np.float32)
        if offset is None:
            continue
        base_bias = None if base is None else base.bias(output.module)
        b = np.zeros(output.size, np.float32) if base_bias is None else base_bias
        bias = offset[0].astype(np.float32) + scales.get(output.module, np.float32(1)) * b
        # An offset that only preserves the base's bias is not a trained bias.
        rounding = 8 * np.finfo(manifest.factor_dtype).eps * np.abs([b, bias, offset[0]]).max()
        if np.abs(bias - b).max() > rounding:
            biases[f"{output.module}.bias"] = bias
    if not scales:
        return _with_own_biases(factors, biases, base), biases
    scaled = {}
    for module, pair in factors.items():
        ones = np.ones(len(pair.B), np.float32)
        # scale = magnitude / norm, so output_scale with a magnitude of ones is 1 / norm.
        unit = dataclasses.replace(pair, magnitude=ones)
        inverse = output_scale(_weight(base, targets[module]), unit, 1.0)
        scaled[module] = dataclasses.replace(pair, magnitude=scales.get(module, ones) / inverse)
    return scaled, biases


def _with_own_biases(
    factors: Mapping[str, Factors], biases: dict[str, NDArray[np.float32]], base: BaseValues | None
) -> dict[str, Factors]:
    """`factors` with those of `biases` whose layers have none in the base; these are removed.

    Raises:
        AdapterMismatchError: other factors cannot have biases of zeros.
    """
    own = {
        module: biases.pop(f"{module}.bias")
        for module in factors
        if f"{module}.bias" in biases and (base is None or base.bias(module) is None)
    }
    if not own:
        return dict(factors)
    others = sorted(module for module, pair in factors.items() if pair.kind != "linear")
    if others:  # PEFT ignores a trained bias of a layer that has none
        raise AdapterMismatchError(
            f"it has a bias for {min(own)} (lora_bias), which has none in the base, and factors for"
            f" {others[0]}, which PEFT does not combine: use the PEFT directory that it was made"
            " from"
        )
    return {
        module: dataclasses.replace(
            pair, bias=own.get(module, np.zeros(pair.B.shape[0], np.float32))
        )
        for module, pair in factors.items()
    }


def _weight(base: BaseValues | None, target: LoraTarget) -> NDArray[np.float32]:
    W = None if base is None else base.weight(target)
    if W is None:
        raise AdapterMismatchError(
            f"it is a DoRA adapter (use_dora), and the base's weight of {target.module} is"
            " quantized here and cannot be read: export the unquantized base with this adapter"
        )
    return W
