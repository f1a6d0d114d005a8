"""PiSSA's and OLoRA's adapters as plain ones, for the base as it was.

Both begin at factors B₀, A₀ of the base's weight and train on W − s · B₀ A₀. What they end at,
W − s · B₀ A₀ + s · B A, is a plain adapter of twice the rank on W: [B, −B₀] and [A; A₀].
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
from loradeploy.lora.checkpoint import find_checkpoint
from loradeploy.lora.initialize import initialization
from loradeploy.lora.layers import LoraLinear, kind_of
from loradeploy.lora.loading import from_pretrained, load_pretrained
from loradeploy.lora.quiet import quiet
from loradeploy.lora.submodels import named_as_in

# What is left of a weight, beside what was left where it was trained: an SVD rounds by machine.
_ROUNDING: Final = 1e-4


def doubled(config: AdapterConfig) -> AdapterConfig:
    """`config` with twice the rank everywhere and the same scaling s, on the base as it is."""
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
    """As `plain`, on the Hugging Face checkpoint or hub id `model`, whose digest the adapter gets.

    Raises:
        ModelError: the checkpoint is missing or cannot be loaded as a model for the adapter's task.
        AdapterError: as `plain`.
    """
    import transformers

    place = find_checkpoint(model)
    try:
        with quiet():
            named = from_pretrained(transformers.AutoConfig, place).architectures or ["AutoModel"]
            task = task_of_peft(adapter.config.task_type)
            auto = getattr(transformers, task.auto_class if task else named[0])
            # A head that the checkpoint lacks, or has of other labels, begins at no such factors.
            loaded = load_pretrained(auto, place, dtype="auto", ignore_mismatched_sizes=True)
    except ModelError:
        raise
    except Exception as problem:  # from_pretrained raises whatever its readers do
        raise ModelError(f"{place} cannot be loaded: {first_line(problem)}") from None
    random = sorted(m for m in adapter.factors if f"{m}.weight" in loaded.lacking)
    if random:
        raise ModelError(
            f"{place} lacks the weight of {random[0]}, which the adapter began at: it is not the"
            " base that it was trained on"
        )
    made = plain(adapter, loaded.model)
    return dataclasses.replace(made, base_digest=adapter.base_digest or base_digest(place))


def plain(adapter: Adapter, model: nn.Module) -> Adapter:
    """`adapter`, which PEFT trained from PiSSA or OLoRA, as a plain one on the base `model`.

    What was taken out of the base is computed again from its weights, which must be those that the
    training began with, in the same width. An adapter that is plain already comes back as it is.

    Raises:
        AdapterMismatchError: a target module is no layer of `model`, or one of another shape.
        AdapterError: it began at a randomized SVD, which nothing can tell again; or its file has
            other weights of the base below the factors than were left there; or another module
            shares a target's weight.
    """
    if not adapter.changes_base:
        return adapter
    method = adapter.config.init_lora_weights
    if "niter" in str(method):
        raise AdapterError(
            f"init_lora_weights {method!r} began at a random approximation that was not kept:"
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
        module = modules.get(name)
        if module is None or kind_of(module) is not LoraLinear:
            raise AdapterMismatchError(f"{name} is not a linear layer of this model")
        if owners[id(module.weight)] > 1:
            raise AdapterError(
                f"{name}.weight is shared by another module, out of which {method} took a part too:"
                " no adapter can give that back; train again with the head untied"
            )
        s = adapter.scaling(name)
        layer = LoraLinear(module, pair.rank, s)
        if (pair.A.shape, pair.B.shape) != (layer.lora_A.shape, layer.lora_B.shape):
            raise AdapterMismatchError(
                f"{name} takes factors {list(layer.lora_A.shape)} and {list(layer.lora_B.shape)},"
                f" the adapter has {list(pair.A.shape)} and {list(pair.B.shape)}"
            )
        weight = layer.weight.detach()
        if method == "olora" and layer.as_matrix(weight) is not weight:
            raise AdapterError(
                f"{name} is a Conv1D: what PEFT's OLoRA takes out of one is not the product of its"
                " factors, so that the adapter cannot be converted"
            )
        A, B = begin(layer.as_matrix(weight).float(), pair.rank, s, torch.Generator())
        factors[name] = Factors(
            A=np.concatenate([pair.A, _array(A)]),
            B=np.concatenate([pair.B, -_array(B)], axis=1),
            magnitude=pair.magnitude,
        )
        # What came with the file is the weight without what the training took out of it.
        below = carried.pop(f"{name}.weight", None)
        if below is not None:
            left = layer.as_matrix(weight).float() - s * (B.float() @ A.float())
            if not _nearly(layer.as_matrix(torch.tensor(below)), left):
                raise AdapterError(
                    f"{name}.weight came with the adapter and is not what {method} leaves of this"
                    " base's: give the base that it was trained on"
                )
    return dataclasses.replace(
        adapter, config=doubled(adapter.config), factors=factors, carried=carried
    )


def _nearly(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices are the same but for the rounding of an SVD."""
    return one.shape == other.shape and bool(
        torch.linalg.norm(one.float() - other) <= _ROUNDING * torch.linalg.norm(other)
    )


def _array(values: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.asarray(values.cpu().numpy(), np.float32)
