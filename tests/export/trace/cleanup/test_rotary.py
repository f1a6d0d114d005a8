"""Rotary position embeddings: the traced nodes become one RotaryEmbedding."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.export.trace.cleanup.rotary import fuse_rotary
from tests.export.graphs import Builder, numbers, ops, run
from tests.tolerances import tolerance

HEADS, SIZE = 2, 8
SPLIT = ["batch", HEADS, "sequence", SIZE]


def rotation(
    *, half: int = SIZE // 2, scale: float | None = None, cast: bool = True, swapped: bool = False
) -> ir.Model:
    """x · cos + Concat(-x₂, x₁) · sin, x split at `half`; `scale` and `cast`: of the tables."""
    b = Builder()
    x = b.input("x", list(SPLIT))
    angles = b.input("angles", ["batch", "sequence", SIZE // 2])
    doubled = b.node("Concat", [angles, angles], ["batch", "sequence", SIZE], axis=-1)
    tables = []
    for op in ("Cos", "Sin"):
        table = b.node(op, [doubled], ["batch", "sequence", SIZE])
        if scale is not None:
            factor = b.constant(f"{op}.scale", np.array(scale, np.float32))
            table = b.node("Mul", [table, factor], ["batch", "sequence", SIZE])
        if cast:
            table = b.node("Cast", [table], ["batch", "sequence", SIZE], to=1)
        axis = b.constant(f"{op}.axis", np.array([1]))
        tables.append(b.node("Unsqueeze", [table, axis], ["batch", 1, "sequence", SIZE]))
    at = {name: b.constant(f"at.{name}", np.array([n])) for name, n in (("0", 0), ("h", half))}
    end, axes, step = (b.constant(n, np.array([v])) for n, v in (("e", 99), ("a", 3), ("s", 1)))
    first = b.node("Slice", [x, at["0"], at["h"], axes, step])
    second = b.node("Slice", [x, at["h"], end, axes, step])
    halves = [b.node("Neg", [second]), first]
    rotated = b.node("Concat", halves, list(SPLIT), axis=-1)
    terms = [
        b.node("Mul", [x, tables[0]], list(SPLIT)),
        b.node("Mul", [rotated, tables[1]], list(SPLIT)),
    ]
    y = b.node("Add", terms[::-1] if swapped else terms, list(SPLIT), name="y")
    model = b.model(y)
    model.graph.opset_imports[""] = 23
    model.ir_version = 11
    return model


FEEDS = {"x": numbers(2, HEADS, 3, SIZE), "angles": numbers(2, 3, SIZE // 2, seed=1)}


@pytest.mark.parametrize("form", [{}, {"scale": 1.25}, {"cast": False}, {"swapped": True}], ids=str)
def test_a_rotation_becomes_one_node_with_the_same_result(form: dict[str, float | bool]) -> None:
    fused = rotation(**form)  # type: ignore[arg-type]
    fuse_rotary(fused.graph)
    assert ops(fused).count("RotaryEmbedding") == 1
    assert not {"Concat", "Neg", "Slice", "Add"} & set(ops(fused))
    expected = run(rotation(**form), FEEDS)  # type: ignore[arg-type]
    assert np.abs(run(fused, FEEDS) - expected).max() <= tolerance("rows")
    assert np.abs(expected - FEEDS["x"]).max() > 0.1  # something was rotated


def test_a_rotation_that_is_not_split_in_half_is_not_changed() -> None:
    model = rotation(half=3)
    fuse_rotary(model.graph)
    assert "RotaryEmbedding" not in ops(model)


def test_rotary_tables_that_depend_on_the_sequence_length_are_refused_by_name() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from loradeploy.errors import ExportError
    from loradeploy.export.trace.module import trace

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    )
    message = "rope_scaling of type dynamic.*texts of up to 32 tokens"
    with pytest.raises(ExportError, match=message):
        trace(LlamaForCausalLM(config), "causal-lm")
