"""Outputs of PyTorch and of onnxruntime for the same inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from loradeploy.adapter.files.peft import load_adapter
from loradeploy.adapter.files.tensors import read_arrays
from loradeploy.adapter.tasks import CLASSIFICATIONS, TASK_TABLE
from loradeploy.bundle.adapter_inputs.factors import branch_choice, side_inputs
from loradeploy.bundle.manifest import read_manifest
from loradeploy.bundle.names import ADAPTER_IDS, ROWS
from loradeploy.errors import BundleError

Arrays = dict[str, NDArray[Any]]


def session(bundle: Path) -> onnxruntime.InferenceSession:
    """Return a plain onnxruntime session on the graph of a bundle."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # onnxruntime warns about every side input
    return onnxruntime.InferenceSession(
        bundle / "model.onnx", options, providers=["CPUExecutionProvider"]
    )


def token_feeds(
    graph: onnxruntime.InferenceSession,
    ids: NDArray[np.int64],
    mask: NDArray[np.int64] | None = None,
) -> Arrays:
    """Return inputs of a first call: an empty cache, positions that skip padding."""
    mask = np.ones_like(ids) if mask is None else mask
    feeds: Arrays = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.clip(mask.cumsum(axis=1) - 1, 0, None),
        "token_type_ids": np.zeros_like(ids),
    }
    taken = {value.name: value for value in graph.get_inputs()}
    for name, value in taken.items():
        if name.startswith("past_key_values."):
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            feeds[name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), dtype)
    return {name: feeds[name] for name in taken}


def onnx_output(
    bundle: Path,
    ids: NDArray[np.int64],
    mask: NDArray[np.int64] | None = None,
    side: Mapping[str, NDArray[Any]] | None = None,
) -> NDArray[Any]:
    """Run the bundle's graph, with side inputs if given, and return its first output."""
    graph = session(bundle)
    feeds = {**token_feeds(graph, ids, mask), **(side or {})}
    output: NDArray[Any] = graph.run(None, feeds)[0]
    return output


def factors(bundle: Path, adapter: Path) -> Arrays:
    """Return the side inputs of one adapter in one slot, with the input that selects its branch."""
    manifest = read_manifest(bundle)
    return {**side_inputs(load_adapter(adapter), manifest), **branch_choice(manifest)}


def defaults(bundle: Path) -> Arrays:
    """Return the base's values of side inputs that replace whole parameters."""
    file = bundle / "defaults.safetensors"
    return read_arrays(file, error=BundleError)[0] if file.exists() else {}


def idle(bundle: Path) -> Arrays:
    """Return side inputs of one slot without an adapter."""
    manifest = read_manifest(bundle)
    dtype = np.dtype(manifest.factor_dtype)
    arrays: Arrays = {}
    for target in manifest.targets:
        rank = target.rank_from(1)
        arrays[target.lora_A] = np.zeros((1, target.in_features, rank), dtype)
        arrays[target.lora_B] = np.zeros((1, rank, target.out_features), dtype)
    return arrays


def stacked(slots: list[Arrays], base: Arrays) -> Arrays:
    """Return side inputs of several slots, zero-padded to one rank; an empty slot is the base."""
    stack: Arrays = {}
    for name in dict.fromkeys(name for slot in slots for name in slot):
        some = next(slot[name] for slot in slots if name in slot)
        empty = base.get(name, np.zeros_like(some))
        held = [slot.get(name, empty) for slot in slots]
        shape = np.max([values.shape for values in held], axis=0)
        padded = [
            np.pad(
                values,
                [(0, int(most - has)) for most, has in zip(shape, values.shape, strict=True)],
            )
            for values in held
        ]
        stack[name] = np.concatenate(padded)
    return stack


def mixed_batch(bundle: Path, slots: list[Arrays], ids: NDArray[np.int64]) -> Arrays:
    """Return side inputs of a batch in which row i uses `slots[ids[i]]`, in the bundle's layout."""
    base = defaults(bundle)
    if read_manifest(bundle).layout == ROWS:
        return stacked([slots[slot] for slot in ids], base)
    return {**stacked(slots, base), ADAPTER_IDS: ids}


def torch_output(
    model: Path,
    ids: NDArray[np.int64],
    mask: NDArray[np.int64] | None = None,
    *,
    task: str = "causal-lm",
    adapter: Path | None = None,
    labels: int = 2,
) -> NDArray[Any]:
    """Return PyTorch's logits or last hidden state, with a PEFT adapter if given.

    A padded decoder gets the positions of transformers' `generate`, like those of the graph.
    """
    import peft
    import torch
    import transformers

    auto = getattr(transformers, TASK_TABLE[task].auto_class)
    options = {"num_labels": labels} if task in CLASSIFICATIONS else {}
    base = auto.from_pretrained(model, dtype=torch.float32, **options).eval()
    held = base if adapter is None else peft.PeftModel.from_pretrained(base, adapter).eval()
    tokens = torch.from_numpy(ids)
    attention = torch.ones_like(tokens) if mask is None else torch.from_numpy(mask)
    feeds = {"input_ids": tokens, "attention_mask": attention}
    if task == "causal-lm" and "position_ids" in inspect.signature(base.forward).parameters:
        feeds["position_ids"] = (attention.cumsum(-1) - 1).clamp(0)
    with torch.no_grad():
        result = held(**feeds)
    output: NDArray[Any] = getattr(result, TASK_TABLE[task].output).numpy()
    return output


def difference(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Return the largest absolute difference."""
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())


def apart(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Return 1 − cosine of two outputs."""
    a, b = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    return float(1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
