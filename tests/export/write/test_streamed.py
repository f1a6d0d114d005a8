"""Weights are written a few rows at a time; none is in memory or hashed twice."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.adapter.files.digest import file_digest
from loradeploy.bundle.manifest import read_manifest
from loradeploy.export import write
from loradeploy.export.api import export
from loradeploy.export.graph import streamed
from loradeploy.export.graph.streamed import joined, save_graph
from tests.conftest import ROOT
from tests.export.graphs import IN, Builder, numbers

DTYPES = (np.float32, np.float16, np.int8, ml_dtypes.bfloat16)
_KIB = 1 << 10
# Limit of the additional memory: one copy of the weights plus some rows.
MOST = 1.3  # times the size of the model

# A first export loads all imports; then the peak is reset.
CHILD = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from loradeploy.export.api import export
from tools.inputs.made_adapters import make_adapters

place = Path(sys.argv[1])
for name, width, layers, words in (("small", 32, 1, 64), ("large", 1024, 4, 12_000)):
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "vocab_size": words}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(place / name)

def kib(what):
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(what))

def peak(*given, **options):
    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS:")
    export(*given, **options)
    return kib("VmHWM:") - before

export(place / "small", place / "warm")
exported = peak(place / "large", place / "bundle")
(adapter,) = make_adapters(place / "bundle", place / "made", 1, rank=16).values()
print(exported, peak(place / "bundle", place / "merged", adapters=[adapter], merge=True))
"""


@pytest.mark.parametrize("dtype", DTYPES)
def test_concatenated_columns_are_written_as_they_are_read(
    dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "_BLOCK_BYTES", 64)  # a few rows at a time
    one, two = numbers(9, 5).astype(dtype), numbers(4, 9).astype(dtype).T
    tensor = joined("both", [ir.tensor(one), ir.tensor(two)])
    expected = np.concatenate([one, two], axis=1)
    file = io.BytesIO()
    tensor.tofile(file)
    assert tensor.shape.numpy() == (9, 9)
    assert file.getvalue() == expected.tobytes() == tensor.tobytes()
    assert np.array_equal(tensor.numpy(), expected)


def test_columns_without_rows_are_an_empty_matrix() -> None:
    parts = [ir.tensor(np.empty((0, columns), np.float32)) for columns in (3, 4)]
    tensor, file = joined("both", parts), io.BytesIO()
    tensor.tofile(file)
    assert tensor.numpy().shape == (0, 7)
    assert file.getvalue() == b""


def test_onnx_ir_keeps_former_graph_inputs_and_they_are_released() -> None:
    b = Builder()
    x, weight = b.input("x", ["rows", IN]), b.weight("w", IN, IN)
    model = b.model(b.node("MatMul", [x, weight]))
    model.graph.inputs.append(weight)
    model.graph.inputs.remove(weight)
    assert weight in model.graph.inputs._ref_counter


def test_a_transposed_weight_is_written_by_rows_and_released(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", ["rows", IN])
    turned = numbers(700, IN).T
    weight = b.constant("weight", turned)
    assert not turned.flags.c_contiguous
    model = b.model(b.node("MatMul", [x, weight], ["rows", 700], name="y"))
    save_graph(model, tmp_path)
    assert weight.const_value is None
    assert (tmp_path / "model.onnx.data").read_bytes() == np.ascontiguousarray(turned).tobytes()
    stored = ir.load(tmp_path / "model.onnx").graph.initializers["weight"].const_value
    assert stored is not None
    assert np.array_equal(stored.numpy(), turned)


def test_no_file_of_a_bundle_is_hashed_twice(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []

    def counted(file: Path) -> str:
        hashed.append(file.name)
        return file_digest(file)

    monkeypatch.setattr(write, "file_digest", counted)
    export(tiny_llama, tmp_path / "bundle")
    assert sorted(hashed) == ["model.onnx", "model.onnx.data"]
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.data_digest == file_digest(tmp_path / "bundle" / "model.onnx.data")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
def test_an_export_and_a_merge_take_the_memory_of_one_copy_of_the_model(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 3e8
    exported, merged = (int(peak) * _KIB for peak in done.stdout.split()[-2:])
    assert exported < MOST * size
    assert merged < MOST * size
