"""Write GGUF files for llama.cpp's side of bench_peers, in its own environment.

    python -m tools.bench_peers.llama_files SOURCE.gguf TARGET.gguf F32|Q8_0
    python -m tools.bench_peers.llama_files ADAPTER TARGET.gguf heads=9,3

SOURCE is a GGUF file of the architecture `llama`. ADAPTER is a PEFT directory for such a model,
which is converted to an adapter for llama.cpp (`general.type` adapter).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from safetensors.numpy import load_file

_NAMES: Final = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_FACTOR: Final = re.compile(r"model\.layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])\.weight$")


def requantized(source: Path, target: Path, precision: str) -> None:
    """Write the same model with its matrices in another precision."""
    reader = gguf.GGUFReader(source)
    kind = gguf.GGMLQuantizationType[precision]
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        value, array = field.contents(), field.types[0] == gguf.GGUFValueType.ARRAY
        inner = field.types[-1] if array else None
        writer.add_key_value(name, value, field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        own = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, own), raw_dtype=own)
    _write(writer)


def adapter(directory: Path, target: Path, heads: tuple[int, int]) -> None:
    """Write a PEFT adapter for llama.cpp, which orders the rows of queries and keys differently.

    `heads`: numbers of heads of the queries and of the keys.
    """
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", config["lora_alpha"])
    for key, values in sorted(load_file(directory / "adapter_model.safetensors").items()):
        found = _FACTOR.search(key)
        if found is None:
            raise SystemExit(f"{directory}: {key} is no factor of a linear layer")
        layer, module, factor = found.groups()
        if factor == "B" and module in ("q_proj", "k_proj"):
            values = _interleaved(values, heads[module == "k_proj"])
        name = f"blk.{layer}.{_NAMES[module]}.weight.lora_{factor.lower()}"
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    _write(writer)


def _interleaved(values: Any, heads: int) -> Any:
    """Reorder rows for rotary embeddings over neighboring rows instead of halves."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    source, target, last = sys.argv[1:]
    if last.startswith("heads="):
        queries, keys = map(int, last.removeprefix("heads=").split(","))
        adapter(Path(source), Path(target), (queries, keys))
    else:
        requantized(Path(source), Path(target), last)
