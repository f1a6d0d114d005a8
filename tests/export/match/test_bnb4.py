"""MatMulBnb4, the 4-bit floats of bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from loradeploy.bundle.manifest import Manifest
from loradeploy.errors import ExportError
from loradeploy.export.api import export
from loradeploy.export.match.products import Product, products
from tests.conftest import MakeAdapter, once
from tests.export import others
from tests.export.reference import difference, factors, onnx_output
from tests.tolerances import tolerance

KINDS = pytest.mark.parametrize("kind", [0, 1], ids=["FP4", "NF4"])
LAYERS: Any = {"target_modules": ["query", "value", "output.dense"]}
IN, OUT = 7, 5  # blocks end within an output, and a byte has numbers of two outputs


def quantized(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer

    quantizer = MatMulBnb4Quantizer(model, kind, 16)
    quantizer.process()
    return quantizer.model.model


def a_product(kind: int) -> tuple[bytes, Product, np.ndarray[Any, Any]]:
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((IN, OUT)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"], name="m")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", OUT])],
        [numpy_helper.from_array(weight, "W")],
    )
    plain = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    data = quantized(plain, kind).SerializeToString()
    (product,) = products(ir.from_proto(onnx.load_from_string(data)).graph)
    return data, product, weight


@KINDS
def test_its_weights_are_those_that_onnxruntime_multiplies_by(kind: int) -> None:
    data, product, _ = a_product(kind)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": np.eye(IN, dtype=np.float32)})[0].T
    found = product.rows(list(range(OUT)))
    assert found is not None
    assert difference(found, expected) < 1e-6
    picked = product.rows([3, 1])
    assert picked is not None
    assert np.array_equal(picked, found[[3, 1]])


@KINDS
def test_its_rounding_is_at_most_half_a_step(kind: int) -> None:
    _, product, weight = a_product(kind)
    rows, steps = product.rows(list(range(OUT))), product.steps(list(range(OUT)))
    assert rows is not None
    assert steps is not None
    assert (np.abs(rows - weight.T) <= 0.5 * steps + 1e-6).all()


@pytest.fixture(scope="session")
def packed_encoder(shared: Path, tiny_bert: Path) -> Path:
    """The tiny BERT of torch.onnx in NF4."""

    def make(place: Path) -> None:
        file = place / "model.onnx"
        others.export_as_optimum(tiny_bert, file)
        onnx.save(quantized(onnx.load(file), 1), file)

    return once(shared / "encoder-bnb4", make)


@pytest.mark.parametrize("evidence", ["names", "checkpoint"])
@pytest.mark.parametrize("branches", [None, False], ids=["branches", "no branches"])
def test_a_graph_in_nf4_takes_adapters_beside_its_weights(
    evidence: str,
    branches: bool | None,
    packed_encoder: Path,
    tiny_bert: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    import peft
    import torch
    import transformers

    adapter = make_adapter(tiny_bert, task="feature-extraction", r=4, scale=0.2, **LAYERS)
    given: Any = {"checkpoint": tiny_bert} if evidence == "checkpoint" else {}
    bundle = tmp_path / "bundle"
    manifest: Manifest = export(
        packed_encoder, bundle, adapters={"a": adapter}, branches=branches, **given
    )
    assert manifest.precision == "int4"
    base = transformers.AutoModel.from_pretrained(tiny_bert, dtype=torch.float32).eval()
    modules = dict(base.named_modules())
    count = 0
    for product in products(ir.load(packed_encoder / "model.onnx").graph):
        if product.node.op_type != "MatMulBnb4":
            continue
        rows = product.rows(list(range(product.out_features)))
        assert rows is not None
        matches = [
            module
            for module in modules.values()
            if isinstance(module, torch.nn.Linear)
            and module.weight.shape == rows.shape
            and np.linalg.norm(module.weight.detach().numpy() - rows) < 0.3 * np.linalg.norm(rows)
        ]
        assert len(matches) == 1
        with torch.no_grad():
            matches[0].weight.copy_(torch.from_numpy(rows))
        count += 1
    assert count
    ids = torch.from_numpy(others.IDS)
    with torch.no_grad():
        plain = base(ids).last_hidden_state.numpy()
        expected = peft.PeftModel.from_pretrained(base, adapter).eval()(ids).last_hidden_state
    side = factors(bundle, adapter)
    assert difference(onnx_output(bundle, others.IDS), plain) < tolerance("torch-onnx-tiny")
    found = onnx_output(bundle, others.IDS, side=side)
    assert difference(found, expected.numpy()) < tolerance("torch-onnx-tiny")
    assert difference(found, plain) > 0.1, "the adapter did nothing"


def test_merging_into_it_is_refused_with_what_to_do(
    packed_encoder: Path, tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_bert, task="feature-extraction", r=4, **LAYERS)
    for requantize in (False, True):
        with pytest.raises(ExportError, match="merge into the unquantized .*, or use side inputs"):
            export(
                packed_encoder,
                tmp_path / "b",
                adapters={"a": adapter},
                merge=True,
                requantize=requantize,
            )
