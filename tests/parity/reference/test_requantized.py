"""Merges into packed weights: a correct one passes despite the rounding of both packings."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

import loradeploy as ld
from loradeploy.bundle.manifest import read_manifest
from loradeploy.parity.reference.quantized import QuantizedWeight
from loradeploy.parity.reference.requantized import with_roundings
from tests.conftest import MakeAdapter, once
from tests.export import others
from tests.parity.tampering import change_graph

Change = Callable[[onnx.GraphProto], None]
KINDS = {"int8": (8, True), "int4": (4, False)}  # bits, symmetric: int4 has zero points


@pytest.fixture(scope="session")
def bert(tiny_bert: Path, shared: Path) -> Path:
    """The tiny BERT with biases that are not zero."""

    def make(place: Path) -> None:
        shutil.copytree(tiny_bert, place)
        file = place / "model.safetensors"
        tensors, generator = load_file(file), np.random.default_rng(0)
        for name, values in tensors.items():
            if name.endswith("dense.bias") or (".self." in name and name.endswith(".bias")):
                tensors[name] = generator.standard_normal(values.shape).astype(values.dtype)
        save_file(tensors, file, {"format": "pt"})

    return once(shared / "biased-bert", make)


@pytest.fixture(scope="session")
def merged(bert: Path, make_adapter: MakeAdapter, shared: Path) -> Callable[[str], Path]:
    """A function that exports BERT with torch's older exporter, packs it, and merges an adapter."""

    def make(kind: str) -> Path:
        plain = shared / "packed-bert" / "plain"
        once(plain, lambda place: others.export_with_torch(bert, place, dynamo=False))
        bits, symmetric = KINDS[kind]

        def pack(place: Path) -> None:
            others.pack(plain / "model.onnx", place, bits=bits, symmetric=symmetric)

        packed = once(shared / "packed-bert" / kind, pack)
        adapters = {"mine": _adapter(make_adapter, bert)}
        options = {"checkpoint": bert, "merge": True, "requantize": True}
        return once(
            shared / "packed-bert" / f"{kind}-merged",
            lambda place: ld.export(packed, place, adapters=adapters, **options),
        )

    return make


def _adapter(make_adapter: MakeAdapter, model: Path, **options: object) -> Path:
    given = {"r": 4, "seed": 1, "task": "feature-extraction", "scale": 0.3, **options}
    return make_adapter(model, target_modules=["query", "value", "dense"], **given)


def _check(bundle: Path, model: Path, adapter: Path, **options: object) -> ld.ParityReport:
    return ld.parity(
        bundle,
        model=model,
        adapters=[adapter],
        prompts=["Shares fell", "The capital of a country"],
        backends=["onnx-merged"],
        localize=False,
        shrink=False,
        **options,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_correct_merge_passes_and_the_controls_fail(
    kind: str, merged: Callable[[str], Path], bert: Path, make_adapter: MakeAdapter
) -> None:
    bundle = merged(kind)
    assert read_manifest(bundle).requantized
    report = _check(bundle, bert, _adapter(make_adapter, bert), controls=True)
    assert report.passed, report.failures
    assert report.mutation_score == 1
    assert not [note for note in report.notes if "rounding alone" in note]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("claimed", [{"alpha": 4}, {"alpha": 16}, {"seed": 2}])
def test_another_adapter_than_the_merged_one_fails(
    kind: str,
    claimed: dict[str, int],
    merged: Callable[[str], Path],
    bert: Path,
    make_adapter: MakeAdapter,
) -> None:
    other = _adapter(make_adapter, bert, **claimed)
    report = _check(merged(kind), bert, other)
    assert not report.passed
    assert [note for note in report.notes if "not rounding alone" in note]


def _without(index: int) -> Change:
    """Remove the input `index` of the first product that has it."""

    def change(graph: onnx.GraphProto) -> None:
        products = [node for node in graph.node if node.op_type == "MatMulNBits"]
        node = next(node for node in products if len(node.input) > index and node.input[index])
        node.input[index] = ""

    return change


def _exchange(graph: onnx.GraphProto) -> None:
    """Exchange the weights of the first two products of the same shape."""
    first, other = [node for node in graph.node if node.op_type == "MatMulNBits"][:2]
    for index in (1, 2, 3):
        if len(first.input) > index:
            first.input[index], other.input[index] = other.input[index], first.input[index]


def _in_other_blocks(graph: onnx.GraphProto) -> None:
    """Reorder the scales of a product, as if its g_idx were lost."""
    node = next(node for node in graph.node if node.op_type == "MatMulNBits")
    (scales,) = (value for value in graph.initializer if value.name == node.input[2])
    turned = numpy_helper.to_array(scales).reshape(-1)[::-1].reshape(tuple(scales.dims))
    name = scales.name
    scales.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(turned), name))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        pytest.param("int8", _without(5), id="bias"),
        pytest.param("int4", _without(3), id="zero-points"),
        pytest.param("int8", _exchange, id="weights-of-another"),
        pytest.param("int4", _in_other_blocks, id="blocks"),
    ],
)
def test_a_merge_with_a_damaged_graph_fails(
    kind: str,
    change: Change,
    merged: Callable[[str], Path],
    bert: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    broken = Path(shutil.copytree(merged(kind), tmp_path / "broken"))
    change_graph(broken, change)
    report = _check(broken, bert, _adapter(make_adapter, bert))
    assert not report.passed


# -- telling rounding from updates -------------------------------------------------------------

BLOCK = 32


def _rounded(weight: np.ndarray, bits: int) -> np.ndarray:
    blocks = weight.reshape(len(weight), -1, BLOCK)
    step = np.abs(blocks).max(axis=2, keepdims=True) / 2 ** (bits - 1)
    return (np.round(blocks / step) * step).reshape(weight.shape).astype(np.float32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("share", "extra", "right"),
    [(1, 0, True), (0, 0, False), (2, 0, False), (0.5, 0, False), (1, 1, False)],
    ids=["right", "missing", "doubled", "halved", "on-top-of-another"],
)
def test_a_wrong_update_in_packed_weights_is_distinguished_from_rounding(
    share: float, extra: float, right: bool, bits: int
) -> None:
    generator = np.random.default_rng(0)
    base = generator.standard_normal((96, 128)).astype(np.float32)

    def update() -> np.ndarray:
        A, B = generator.standard_normal((4, 128)), generator.standard_normal((96, 4))
        return (0.4 * B @ A).astype(np.float32)

    own, other = update(), update()
    stored = _rounded(_rounded(base, bits) + share * own + extra * other, bits)
    packed = {"m": QuantizedWeight(stored, bits, BLOCK, None)}
    found, problems = with_roundings(packed, {"m": base}.get, {"m": base + own}.get)
    assert (not problems) == right, problems
    assert (found["m"].rounding is not None) == right
