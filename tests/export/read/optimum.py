"""Write the parts of an encoder-decoder as optimum does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np

IDS: Final = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])


def write_part(
    module: Any, tensors: dict[str, Any], outputs: list[str], file: Path, *, opset: int = 18
) -> None:
    """Export `module`, whose forward takes `tensors` in this order. A cache has a dot in names."""
    import torch

    axes = {
        name: {0: "batch", (2 if "." in name else 1): f"{name}_length"}
        for name in [*tensors, *outputs]
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter is deprecated but still used
        torch.onnx.export(
            module,
            tuple(tensors.values()),
            file,
            input_names=list(tensors),
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=opset,
            dynamo=False,
        )


def write_encoder(model: Any, file: Path, *, opset: int = 18) -> dict[str, Any]:
    """Export the encoder of `model`; return the feeds of its example."""
    import torch

    encoder = model.get_encoder()
    forward = encoder.forward
    encoder.forward = lambda ids, mask: forward(
        input_ids=ids, attention_mask=mask, return_dict=False
    )[:1]
    ids = torch.from_numpy(IDS)
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    write_part(encoder, feeds, ["last_hidden_state"], file, opset=opset)
    encoder.forward = forward
    return feeds
