"""Convert adapters of PiSSA and OLoRA to standard LoRA on the unchanged base.

Both initialize the factors with parts B₀, A₀ of the base's weight and train on W − s · B₀ A₀. The
result, W − s · B₀ A₀ + s · B A, is a standard adapter of twice the rank on W: [B, −B₀] and [A; A₀].
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from loradeploy.adapter import Adapter, AdapterConfig, Factors, base_digest
from loradeploy.adapter.tasks import task_of_peft
from loradeploy.errors import AdapterError, AdapterMismatchError, ModelError, first_line
from loradeploy.lora.base.checkpoint import find_checkpoint
from loradeploy.lora.base.loading import from_pretrained, load_pretrained
from loradeploy.lora.layers.initialize import initialization
from loradeploy.lora.layers.kinds import kind_of
from loradeploy.lora.layers.linear import LoraLinear
from loradeploy.lora.quiet import quiet
from loradeploy.lora.submodels import named_as_in

# Tolerance for W − s · B₀ A₀ against the adapter's copy: an SVD rounds differently on each machine.
_ROUNDING: Final = 1e-4


def doubled(config: AdapterConfig) -> AdapterConfig:
    """`config` with twice the rank everywhere, the same scaling s, and an unchanged base."""
    factor = math.sqrt(2) if config.use_rslora else 2
    return dataclasses.replace(
        config,
        r=2 * config.r,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        lora_alpha=factor * config.lora_alpha,
        alpha_pattern={name: factor * alpha for name, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )


def to_standard_lora_from_checkpoint(adapter: Adapter, model: str | os.PathLike[str]) -> Adapter:
    """As `to_standard_lora`, for the checkpoint or hub id `model`, whose digest the result gets.

    Raises:
        ModelError: the checkpoint is missing or cannot be loaded as a model for the adapter's task.
        AdapterError: as `to_standard_lora`.
    """
    import transformers

    directory = find_checkpoint(model)
    try:
        with quiet():
            named = from_pretrained(transformers.AutoConfig, directory).architectures or [
                "AutoModel"
            ]
            task = task_of_peft(adapter.config.task_type)
            auto = getattr(transformers, task.auto_class if task else named[0])
            # A head that the checkpoint lacks, or has for other labels, is not a target.
            loaded = load_pretrained(auto, directory, dtype="auto", ignore_mismatched_sizes=True)
    except ModelError:
        raise
    except Exception as problem:  # from_pretrained raises exceptions of many types
        raise ModelError(f"{directory} cannot be loaded: {first_line(problem)}") from None
    random = sorted(m for m in adapter.factors if f"{m}.weight" in loaded.lacking)
    if random:
        raise ModelError(
            f"{directory} lacks the weight of {random[0]}, which initialized the adapter: it is not"
            " the base that it was trained on"
        )
    made = to_standard_lora(adapter, loaded.model)
    return dataclasses.replace(made, base_digest=adapter.base_digest or base_digest(directory))


def to_standard_lora(adapter: Adapter, model: nn.Module) -> Adapter:
    """`adapter`, which PEFT trained with PiSSA or OLoRA, as standard LoRA on the base `model`.

    The part that was subtracted from the base is recomputed from its weights, which must be those
    of the training, in the same dtype. A standard adapter is returned unchanged.

    Raises:
        AdapterMismatchError: a target module is not a linear layer of `model`, or has another
            shape.
        AdapterError: it was initialized by a randomized SVD, which cannot be recomputed; or the
            base weights in its file are not those of this base after the initialization; or another
            module shares a target's weight.
    """
    if not adapter.changes_base:
        return adapter
    method = adapter.config.init_lora_weights
    if "niter" in str(method):
        raise AdapterError(
            f"init_lora_weights {method!r} used a random approximation that was not saved:"
            " convert it where it was trained, with PEFT's"
            " save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    adapter = named_as_in(model, adapter)
    modules = dict(model.named_modules())
    begin = initialization(method)
    factors = {}
    carried = dict(adapter.carried)
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, pair in adapter.factors.items():
        module, s = modules.get(name), adapter.scaling(name)
        if module is None or kind_of(module) is not LoraLinear:
            raise AdapterMismatchError(f"{name} is not a linear layer of this model")
        if owners[id(module.weight)] > 1:
            raise AdapterError(
                f"{name}.weight is shared with another module, which {method} changed too: no"
                " adapter can undo that; train again with the head untied"
            )
        layer = LoraLinear(module, pair.rank, s)
        _check_factors(name, pair, layer, method)
        W = layer.as_matrix(layer.weight.detach()).float()
        A, B = begin(W, pair.rank, s, torch.Generator())
        factors[name] = Factors(
            A=np.concatenate([pair.A, _array(A)]),
            B=np.concatenate([pair.B, -_array(B)], axis=1),
            magnitude=pair.magnitude,
        )
        # The weight in the adapter's file is W − s · B₀ A₀.
        below = carried.pop(f"{name}.weight", None)
        if below is not None and not _nearly(
            layer.as_matrix(torch.tensor(below)), W - s * (B.float() @ A.float())
        ):
            raise AdapterError(
                f"{name}.weight in the adapter is not what {method} leaves of this base's:"
                " give the base that it was trained on"
            )
    return dataclasses.replace(
        adapter, config=doubled(adapter.config), factors=factors, carried=carried
    )


def _check_factors(name: str, pair: Factors, layer: LoraLinear, method: object) -> None:
    """Raise an error if `pair` has other shapes than the layer's, or is of an unknown update."""
    if (pair.A.shape, pair.B.shape) != (layer.lora_A.shape, layer.lora_B.shape):
        raise AdapterMismatchError(
            f"{name} takes factors {list(layer.lora_A.shape)} and {list(layer.lora_B.shape)},"
            f" the adapter has {list(pair.A.shape)} and {list(pair.B.shape)}"
        )
    weight = layer.weight.detach()
    if method == "olora" and layer.as_matrix(weight) is not weight:
        raise AdapterError(
            f"{name} is a Conv1D: PEFT's OLoRA does not subtract the product of the factors"
            " from it, so the adapter cannot be converted"
        )


def _nearly(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices are equal up to the rounding of an SVD."""
    return one.shape == other.shape and bool(
        torch.linalg.norm(one.float() - other) <= _ROUNDING * torch.linalg.norm(other)
    )


def _array(values: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.asarray(values.cpu().numpy(), np.float32)
