"""Models above protobuf's limit of 2 GB: weights stay in external files throughout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.bundle.manifest import read_manifest
from loradeploy.export.api import export
from tests.export.graphs import Builder
from tests.export.reference import session

pytestmark = pytest.mark.slow

WIDTH, WIDER = 4096, 3 << 14  # 768 MiB per weight
SCALES = (1.0, 2.0, 3.0)


def test_a_graph_of_more_than_two_gigabytes_takes_side_inputs(tmp_path: Path) -> None:
    place = tmp_path / "model"
    place.mkdir()
    size = WIDTH * WIDER * 4
    data = place / "model.onnx.data"
    with data.open("wb") as file:
        file.truncate(len(SCALES) * size)  # a sparse file of zeros
    numbers = np.memmap(data, np.float32, "r+", shape=(len(SCALES), WIDTH, WIDER))
    for number, scale in enumerate(SCALES):
        numbers[number, 0, :4] = scale
    numbers.flush()
    del numbers

    b = Builder()
    x = b.input("input_ids", ["batch", "sequence", WIDTH])
    products = []
    for number in range(len(SCALES)):
        name = f"weight{number}"
        tensor = ir.ExternalTensor(
            data.name,
            number * size,
            size,
            ir.DataType.FLOAT,
            shape=ir.Shape([WIDTH, WIDER]),
            name=name,
            base_dir=place,
        )
        weight = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([WIDTH, WIDER]),
            const_value=tensor,
        )
        b.constants.append(weight)
        shape: list[int | str] = ["batch", "sequence", WIDER]
        products.append(b.node("MatMul", [x, weight], shape, module=f"wide.{number}.proj"))
    total = b.node("Sum", products, ["batch", "sequence", WIDER], name="last_hidden_state")
    ir.save(b.model(total), place / "model.onnx")

    manifest = export(place, tmp_path / "bundle", task="feature-extraction")
    assert len(manifest.targets) == len(SCALES)
    assert (tmp_path / "bundle" / "model.onnx").stat().st_size < 1 << 20
    graph = session(tmp_path / "bundle")
    feeds = {"input_ids": np.ones((1, 1, WIDTH), np.float32)}
    (base,) = graph.run(None, feeds)
    assert base[0, 0, :5].tolist() == [6, 6, 6, 6, 0]

    rank = 2
    target = read_manifest(tmp_path / "bundle").targets[1]
    factors = {
        target.lora_A: np.full((1, WIDTH, rank), 1 / WIDTH, np.float32),
        target.lora_B: np.full((1, rank, WIDER), 0.5, np.float32),
    }
    (adapted,) = graph.run(None, {**feeds, **factors})
    assert np.abs(adapted - base - 1).max() < 1e-4
