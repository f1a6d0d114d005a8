"""A cache of traced tiny models: torch.export takes ten seconds for two layers."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir

    Trace = Callable[[Any, str], ir.Model]

_TINY: Final = 2**26  # bytes of parameters
# Settings that no model computes with: the number of labels is that of the head's rows.
_UNUSED: Final = ("_name_or_path", "architectures", "id2label", "label2id", "problem_type")


def cached(trace: Trace, directory: Path) -> Trace:
    """Return `trace` with a cache in `directory`, shared by all processes of the test run.

    Two models are equal if their classes, configurations and all parameters and buffers are. Only
    models of transformers are cached: a class that a test defines may compute anything.
    """

    def traced(model: Any, task: str) -> ir.Model:
        import onnx_ir as ir

        from tests.conftest import once

        size = sum(p.nbytes for p in model.parameters())
        if size > _TINY or not type(model).__module__.startswith("transformers."):
            return trace(model, task)
        place = directory / _key(model, task)
        once(place, lambda partial: _save(trace(model, task), partial))
        return ir.load(place / "model.onnx")

    return traced


def _save(graph: ir.Model, directory: Path) -> None:
    import onnx_ir as ir

    directory.mkdir()
    ir.save(graph, directory / "model.onnx")


def _key(model: Any, task: str) -> str:
    import torch

    config = {name: value for name, value in model.config.to_dict().items() if name not in _UNUSED}
    how = (type(model).__qualname__, task, model.training, model.config._attn_implementation)
    digest = hashlib.sha256(json.dumps([how, config], sort_keys=True, default=str).encode())
    first: dict[int, str] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    for name, tensor in (*parameters, *buffers):
        shared_with = first.setdefault(tensor.data_ptr(), name)
        digest.update(f"{name} {shared_with} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]
