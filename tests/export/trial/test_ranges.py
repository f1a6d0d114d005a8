"""An adapter whose effect fixed ranges of activations change too much is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.files.peft import save_adapter
from loradeploy.conversion import convert
from loradeploy.errors import ExportError
from loradeploy.export.api import export
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter, once
from tests.export import others
from tests.export.graphs import IN, OUT, Builder, numbers
from tests.export.others import IDS
from tests.export.reference import apart, factors, onnx_output, torch_output

TASK = "feature-extraction"


@pytest.fixture(scope="session")
def quantized(shared: Path, tiny_bert: Path) -> Path:
    """The tiny BERT with ranges that onnxruntime measured on two batches of the base."""
    plain = once(
        shared / "encoder-legacy",
        lambda out: others.export_with_torch(tiny_bert, out, dynamo=False),
    )
    return once(
        shared / "encoder-qdq", lambda out: others.quantise_statically(plain / "model.onnx", out)
    )


def _adapter(make: MakeAdapter, base: Path, scale: float) -> Path:
    return make(base, r=4, seed=1, task=TASK, scale=scale)


def test_an_adapter_within_the_ranges_is_exported_with_its_effect(
    quantized: Path, tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter, place = _adapter(make_adapter, tiny_bert, 0.1), tmp_path / "bundle"
    export(quantized, place, adapters={"mine": adapter}, checkpoint=tiny_bert)
    base = torch_output(tiny_bert, IDS, task=TASK)
    expected = torch_output(tiny_bert, IDS, adapter=adapter, task=TASK)
    adapted = onnx_output(place, IDS, side=factors(place, adapter))
    assert apart(adapted, expected) < apart(base, expected) / 10


@pytest.mark.parametrize(
    ("scale", "why"), [(1.0, "its activations are clipped"), (0.003, "its effect is rounded away")]
)
def test_an_adapter_whose_effect_is_lost_is_refused(
    scale: float,
    why: str,
    quantized: Path,
    tiny_bert: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    adapter, place = _adapter(make_adapter, tiny_bert, scale), tmp_path / "bundle"
    with pytest.raises(ExportError, match="changes the effect of the adapter mine on last_hidden"):
        export(quantized, place, adapters={"mine": adapter}, checkpoint=tiny_bert)
    assert not place.exists(), why


def _between(place: Path) -> Path:
    """A float layer whose result is quantized in a range before the next layer."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    y = b.node("MatMul", [x, b.weight("w", IN, OUT)], ["batch", "sequence", OUT], module="m.proj")
    scale = b.constant("scale", np.float32(0.05))
    q = b.node("QuantizeLinear", [y, scale, b.constant("zero", np.uint8(128))])
    q.type = ir.TensorType(ir.DataType.UINT8)
    y = b.node("DequantizeLinear", [q, scale, b.constants[-1]], ["batch", "sequence", OUT])
    y = b.node("MatMul", [y, b.weight("v", OUT, OUT)], ["batch", "sequence", OUT], module="m.out")
    y.name = "last_hidden_state"
    ir.save(b.model(y), place)
    return place


def test_an_adapter_before_a_range_is_clipped_if_it_is_merged(tmp_path: Path) -> None:
    """The update of side inputs is added behind the range of its own layer."""
    graph = _between(tmp_path / "m.onnx")
    given: dict[str, dict[str, Path]] = {}
    for name, size in (("small", 0.3), ("large", 30.0)):
        pair = Factors(numbers(2, IN), size * numbers(OUT, 2))
        config = AdapterConfig(r=2, lora_alpha=2, target_modules=("proj",))
        save_adapter(Adapter(config, {"m.proj": pair}), tmp_path / name)
        given[name] = {name: tmp_path / name}
    export(graph, tmp_path / "side", adapters=given["large"], task=TASK)
    export(graph, tmp_path / "merged", adapters=given["small"], task=TASK, merge=True)
    with pytest.raises(ExportError, match="changes the effect of the merged adapter"):
        export(graph, tmp_path / "clipped", adapters=given["large"], task=TASK, merge=True)


def test_loading_an_adapter_that_was_not_measured_is_a_warning(
    quantized: Path,
    tiny_bert: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    measured, place = _adapter(make_adapter, tiny_bert, 0.1), tmp_path / "bundle"
    later = make_adapter(tiny_bert, r=4, seed=2, task=TASK, scale=1.0)
    manifest = export(quantized, place, adapters={"mine": measured}, checkpoint=tiny_bert)
    session = AdapterSession(place)
    session.load("mine")
    session.load("again", measured)
    session.load("packed", place / "adapters" / "mine.onnx_adapter")
    assert "was not measured in" not in caplog.text
    session.load("later", later)
    count = manifest.fixed_ranges
    assert count > 0
    convert(later, tmp_path / "later.onnx_adapter", bundle=place)
    session.load("packed-later", tmp_path / "later.onnx_adapter")
    assert "the adapter packed-later was not measured in" in caplog.text
    assert f"the adapter later was not measured in this bundle, whose graph clips {count} " in (
        caplog.text
    )
