"""A weight that is not finite is refused, also where no trial reads it; a mask of −inf is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from loradeploy.errors import ExportError, ModelError
from loradeploy.export.api import export
from loradeploy.export.read.finite import check_finite_checkpoint, check_finite_graph
from loradeploy.runtime.session import AdapterSession
from tests.export.graphs import IN, OUT, Builder, numbers
from tests.export.others import copy_of
from tests.inputs.architectures import ARCHITECTURES, make_model
from tests.runtime.feeds import feeds

FILE = Path("m.onnx")
BFLOAT16 = ir.DataType.BFLOAT16.numpy()


def _with(value: float, *shape: int, dtype: type = np.float32) -> NDArray[Any]:
    values = numbers(*shape).astype(dtype)
    values.reshape(-1)[-1] = value
    return values


def _weights(directory: Path) -> Path:
    return directory / "model.safetensors"


def _mask(size: int) -> NDArray[Any]:
    return np.triu(np.full((size, size), -np.inf, np.float32), 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, BFLOAT16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("op", ["MatMul", "Gather"])
def test_a_weight_with_one_damaged_value_is_refused(op: str, value: float, dtype: type) -> None:
    b = Builder()
    w = b.constant("w", _with(value, IN, OUT, dtype=dtype))
    given = [b.input("x", ["n", IN]), w] if op == "MatMul" else [w, b.input("x", ["n"])]
    model = b.model(b.node(op, given, ["n", OUT]))
    with pytest.raises(ModelError, match=r"^m\.onnx: 1 of the 24 values of w is NaN or infinite"):
        check_finite_graph(model, FILE)


def test_the_damage_is_found_behind_a_cast_and_a_transpose() -> None:
    b = Builder()
    w = b.constant("w", _with(-np.inf, OUT, IN, dtype=np.float16))
    wide = b.node("Cast", [b.node("Transpose", [w], perm=[1, 0])], to=1)
    model = b.model(b.node("MatMul", [b.input("x", ["n", IN]), wide], ["n", OUT]))
    with pytest.raises(ModelError, match="values of w is NaN"):
        check_finite_graph(model, FILE)


def test_what_is_infinite_on_purpose_is_accepted() -> None:
    """A bound, a causal mask that is looked up, distances with a mask, and suppressed tokens."""
    b = Builder()
    x = b.input("x", [OUT, OUT])
    rows = b.node("Gather", [b.constant("mask", _mask(OUT)), b.input("at", [OUT])])
    y = b.node("Add", [x, rows])
    y = b.node("Add", [y, b.constant("distances", _mask(OUT) + np.arange(OUT, dtype=np.float32))])
    y = b.node("Add", [y, b.constant("bias", _with(-np.inf, OUT))])
    y = b.node("Max", [y, b.constant("bound", np.array([-np.inf], np.float32))], [OUT, OUT])
    check_finite_graph(b.model(y), FILE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_damaged_row_of_a_checkpoint_is_found(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = torch.from_numpy(numbers(100, OUT)).to(dtype)
    save_torch({"embed.weight": rows, "mask": torch.from_numpy(_mask(OUT))}, _weights(tmp_path))
    check_finite_checkpoint(tmp_path)
    rows[-1, :3] = torch.nan
    save_torch({"embed.weight": rows}, _weights(tmp_path))
    with pytest.raises(ModelError, match="3 of the 400 values of embed.weight are NaN"):
        check_finite_checkpoint(tmp_path)


def test_a_checkpoint_with_a_damaged_row_is_not_exported(tiny_llama: Path, tmp_path: Path) -> None:
    """The row is of a token that no trial reads."""
    base = copy_of(tiny_llama, tmp_path / "base")
    tensors = load_file(_weights(base))
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name] = tensors[name].copy()
    tensors[name][-1] = np.nan
    save_file(tensors, _weights(base), {"format": "pt"})
    with pytest.raises(ModelError, match="values of .*embed_tokens.weight are NaN"):
        export(base, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_row_that_float16_cannot_hold_is_refused_by_name(
    tiny_llama: Path, tmp_path: Path
) -> None:
    base = copy_of(tiny_llama, tmp_path / "base")
    tensors = load_file(_weights(base))
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name] = tensors[name].copy()
    tensors[name][-1, 0] = 1e5
    save_file(tensors, _weights(base), {"format": "pt"})
    with pytest.raises(
        ExportError, match=r"embed_tokens\.weight has values that are too large for"
    ):
        export(base, tmp_path / "bundle", precision="fp16")


def test_a_bias_that_suppresses_a_token_is_exported_in_float16(tmp_path: Path) -> None:
    make_model(tmp_path / "base", *ARCHITECTURES["phi: attention and mlp side by side"])
    tensors = load_file(_weights(tmp_path / "base"))
    tensors["lm_head.bias"] = tensors["lm_head.bias"].copy()
    tensors["lm_head.bias"][5] = -np.inf
    save_file(tensors, _weights(tmp_path / "base"), {"format": "pt"})
    export(tmp_path / "base", tmp_path / "bundle", precision="fp16")
    session = AdapterSession(tmp_path / "bundle")
    logits = session.run(["logits"], feeds(session.manifest, np.array([[3, 9, 5, 7]])))[0]
    suppressed = np.isneginf(logits)
    assert suppressed[..., 5].all() and suppressed.sum() == 4 and np.isfinite(logits).sum() > 4


def test_a_damaged_row_of_a_graph_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    b = Builder()
    table = b.constant("table", _with(np.inf, 100, OUT))
    ids = b.input("input_ids", ["batch", "sequence"], ir.DataType.INT64)
    y = b.node("Gather", [table, ids], ["batch", "sequence", OUT])
    y = b.node("MatMul", [y, b.weight("w", OUT, OUT)], ["batch", "sequence", OUT])
    y.name = "last_hidden_state"
    ir.save(b.model(y), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="1 of the 400 values of table is NaN or infinite"):
        export(tmp_path / "m.onnx", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
