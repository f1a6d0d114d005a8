"""A classifier's head that is quantized is replaced by that of an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.files.peft import save_adapter
from loradeploy.export.api import export
from loradeploy.runtime.session import AdapterSession
from tests.export import others
from tests.export.graphs import Builder, numbers, run
from tests.export.reference import difference

IN, LABELS, WORDS = 16, 3, 512
W, C, BIAS = numbers(IN, IN, seed=1), numbers(IN, LABELS, seed=2), numbers(LABELS, seed=3)
TABLE = numbers(WORDS, IN, seed=4)
A, B = numbers(2, IN, seed=5), numbers(IN, 2, seed=6)
HEAD, HEAD_BIAS = numbers(LABELS, IN, seed=7), numbers(LABELS, seed=8)
IDS = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])
# Relative to the largest logit: weights and activations are rounded to 8 bits.
ROUNDING = 0.03


def _graph(place: Path, *, gemm: bool) -> Path:
    b = Builder()
    ids = b.input("input_ids", ["batch", "sequence"], ir.DataType.INT64)
    x = b.node("Gather", [b.constant("words", TABLE), ids], ["batch", "sequence", IN])
    shape: list[Any] = ["batch", "sequence", IN]
    x = b.node("MatMul", [x, b.constant("w", W)], shape, name="/encoder/proj/MatMul")
    axis = b.constant("axis", np.array([1]))
    x = b.node("ReduceMean", [x, axis], ["batch", IN], keepdims=0)
    head, bias, size = b.constant("c", C), b.constant("classifier.bias", BIAS), ["batch", LABELS]
    if gemm:
        y = b.node("Gemm", [x, head, bias], size, name="/classifier/Gemm")
    else:
        y = b.node("MatMul", [x, head], size, name="/classifier/MatMul")
        y = b.node("Add", [y, bias], size, name="/classifier/Add")
    model = b.model(b.node("Identity", [y], ["batch", LABELS], name="logits"))
    model.graph.opset_imports[""] = 21
    ir.save(model, place)
    return place


def _dynamic(graph: Path, place: Path, **options: Any) -> None:
    from onnxruntime.quantization import quantize_dynamic

    place.mkdir()
    kinds = ["MatMul"]
    quantize_dynamic(graph, place / "model.onnx", op_types_to_quantize=kinds, **options)


def _static(graph: Path, place: Path, kinds: tuple[str, ...] = ("MatMul",)) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            ids = np.random.default_rng(0).integers(0, WORDS, (64, 4))
            self._rest = iter([{"input_ids": ids}])

        def get_next(self) -> Any:
            return next(self._rest, None)

    place.mkdir()
    quantize_static(graph, place / "model.onnx", Reader(), op_types_to_quantize=list(kinds))


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "dynamic": _dynamic,
    "dynamic, per channel": lambda graph, place: _dynamic(graph, place, per_channel=True),
    "static": _static,
    "static, with the bias": lambda graph, place: _static(graph, place, ("MatMul", "Add")),
    "static, a Gemm": lambda graph, place: _static(graph, place, ("MatMul", "Gemm")),
    "packed, with the bias as an input": lambda graph, place: others.pack(
        graph, place, bits=8, symmetric=False
    ),
}


def _logits(update: float, head: Any, bias: Any) -> Any:
    states = TABLE[IDS] @ (W + update * (B @ A).T)
    return states.mean(axis=1) @ head + bias


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_its_own_head_over_a_quantized_one(kind: str, tmp_path: Path) -> None:
    gemm = kind.endswith("Gemm")
    KINDS[kind](_graph(tmp_path / "model.onnx", gemm=gemm), tmp_path / "graph")
    config = AdapterConfig(
        r=2,
        lora_alpha=4,
        target_modules=("proj",),
        modules_to_save=("classifier",),
        task_type="SEQ_CLS",
    )
    saved = {"classifier.weight": HEAD, "classifier.bias": HEAD_BIAS}
    save_adapter(Adapter(config, {"encoder.proj": Factors(A, B)}, saved), tmp_path / "adapter")
    plain = Adapter(
        AdapterConfig(r=2, lora_alpha=4, target_modules=("proj",)), {"encoder.proj": Factors(A, B)}
    )
    save_adapter(plain, tmp_path / "plain")
    adapters = {"mine": tmp_path / "adapter", "plain": tmp_path / "plain"}
    export(tmp_path / "graph", tmp_path / "bundle", adapters=adapters)
    session = AdapterSession(tmp_path / "bundle")
    feeds = {"input_ids": IDS}
    expected = {
        None: _logits(0, C, BIAS),
        "plain": _logits(2, C, BIAS),
        "mine": _logits(2, HEAD.T, HEAD_BIAS),
    }
    for name, logits in expected.items():
        (got,) = session.run(["logits"], feeds, adapters=name)
        assert difference(got, logits) < ROUNDING * np.abs(logits).max()
    (mixed,) = session.run(["logits"], feeds, adapters=["mine", None])
    rows = np.stack([expected["mine"][0], expected[None][1]])
    assert difference(mixed, rows) < ROUNDING * np.abs(rows).max()
    save_adapter(
        Adapter(
            AdapterConfig(r=2, modules_to_save=("classifier",), task_type="SEQ_CLS"), {}, saved
        ),
        tmp_path / "head",
    )
    export(tmp_path / "graph", tmp_path / "merged", adapters=[tmp_path / "head"], merge=True)
    (merged,) = AdapterSession(tmp_path / "merged").run(["logits"], feeds)
    own = _logits(0, HEAD.T, HEAD_BIAS)
    assert difference(merged, own) < ROUNDING * np.abs(own).max()
    source = run(ir.load(tmp_path / "graph" / "model.onnx"), feeds)
    assert difference(source, expected["mine"]) > 0.5, "the adapter has no effect"
