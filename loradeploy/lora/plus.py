"""LoRA+ (Hayou et al., 2024, arXiv:2402.12354): B learns faster than A."""

from __future__ import annotations

from typing import Any

from torch import nn

from loradeploy.lora.inject import Injection


def parameter_groups(
    injection: Injection, learning_rate: float, ratio: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The groups of an optimizer: B learns at `ratio` × `learning_rate`, all else as it says.

    As in the authors' code, a linear layer's or convolution's B and all vectors (biases, DoRA's
    magnitudes) are fast; both factors of an embedding and the other parameters of modules_to_save
    are not. Biases are not decayed. A group without parameters is left out.
    """
    fast = {id(layer.lora_B) for layer in injection.layers.values() if layer.kind != "embedding"}
    biases = {id(p) for name, p in injection.saved.items() if name.endswith("bias")}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in injection.parameters():
        quick = id(parameter) in fast or parameter.ndim == 1
        groups.setdefault((quick, id(parameter) not in biases), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * (ratio if quick else 1.0),
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (quick, decayed), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]
