"""llama.cpp's adapters: converted to the logits of the PEFT adapter that they were made from."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loradeploy.adapter import load_adapter
from loradeploy.adapter.files import gguf as gguf_files
from loradeploy.adapter.files.gguf import read_gguf
from loradeploy.errors import AdapterError, LoraDeployError
from tests.cli.calling import call
from tests.tolerances import tolerance

BODY: Final = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# general.architecture → transformers' config, and whether convert_lora_to_gguf.py permutes rows.
ARCHITECTURES: Final = {
    "llama": ("Llama", True),
    "llama of Mistral": ("Mistral", True),
    "granite": ("Granite", True),
    "qwen2": ("Qwen2", False),
    "qwen3": ("Qwen3", False),
    "gemma": ("Gemma", False),
    "gemma2": ("Gemma2", False),
    "gemma3": ("Gemma3", False),
}
NAMES: Final = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def model(kind: str, **changes: Any) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    name = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(transformers, f"{name}Config")(**{**BODY, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def logits(net: Any) -> Any:
    import torch

    with torch.no_grad():
        return net(torch.arange(3, 27).reshape(2, 12)).logits


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of llama.cpp's converter."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2)


def arrays_of(peft_directory: Path, rotary: bool) -> dict[str, np.ndarray]:
    """The tensors that convert_lora_to_gguf.py writes for a PEFT adapter."""
    from safetensors.numpy import load_file

    found = {}
    for key, values in load_file(peft_directory / "adapter_model.safetensors").items():
        parts = key.removeprefix("base_model.model.").split(".")
        if "embed_tokens" in parts:
            half = parts[-1][-1].lower()
            name, values = f"token_embd.weight.lora_{half}", values.T if half == "a" else values
        elif "lm_head" in parts:
            name = f"output.weight.lora_{parts[1][-1].lower()}"
        else:
            module, half = parts[4], parts[5][-1].lower()
            name = f"blk.{parts[2]}.{NAMES[module]}.weight.lora_{half}"
            if rotary and half == "b" and module in ("q_proj", "k_proj"):
                values = permuted(values, 4 if module == "q_proj" else 2).reshape(values.shape)
        found[name] = np.ascontiguousarray(values)
    return found


def write(
    place: Path, architecture: str, arrays: dict[str, np.ndarray], dtype: str = "F32", **values: Any
) -> Path:
    """Write a file with gguf's own writer, as the converter does. A value of None is left out."""
    import gguf

    writer = gguf.GGUFWriter(place, architecture)
    known = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 6.0, **values}
    for key, value in known.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_float32(key, value)
    kind = gguf.GGMLQuantizationType[dtype]
    for name, array in arrays.items():
        writer.add_tensor(name, gguf.quantize(array.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return place


def adapt(net: Any, place: Path, **options: Any) -> Any:
    """The model with a random adapter of rank 4 and alpha 6, which PEFT saves in `place`."""
    import peft
    import torch

    config = peft.LoraConfig(r=4, lora_alpha=6, **{"target_modules": [*NAMES], **options})
    made = peft.get_peft_model(net, config)
    numbers = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=numbers) * 0.2
    made.save_pretrained(place, save_embedding_layers=False)
    return made.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_converted_file_has_the_logits_of_the_adapter_it_was_made_from(
    name: str, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel

    kind, rotary = ARCHITECTURES[name]
    model(kind).save_pretrained(tmp_path / "base")
    expected = logits(adapt(model(kind), tmp_path / "theirs"))
    architecture = name.partition(" ")[0]
    found = {}
    for order in (rotary, not rotary):
        file = write(
            tmp_path / f"{order}.gguf", architecture, arrays_of(tmp_path / "theirs", order)
        )
        output = tmp_path / f"peft-{order}"
        call("convert", file, "--model", tmp_path / "base", "--output", output)
        found[order] = logits(PeftModel.from_pretrained(model(kind), output).eval())
    torch.testing.assert_close(found[rotary], expected, atol=tolerance("same-torch"), rtol=0)
    for other in (found[not rotary], logits(model(kind))):
        assert (other - expected).abs().max() > 1e-3, "the test would not see a wrong conversion"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "v_proj"]])
def test_the_embedding_and_the_output_head_are_converted(
    targets: list[str], tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel

    net = model("Llama")
    net.save_pretrained(tmp_path / "base")
    expected = logits(adapt(net, tmp_path / "theirs", target_modules=targets))
    file = write(tmp_path / "a.gguf", "llama", arrays_of(tmp_path / "theirs", True))
    call("convert", file, "--model", tmp_path / "base", "--output", tmp_path / "peft")
    found = logits(PeftModel.from_pretrained(model("Llama"), tmp_path / "peft").eval())
    torch.testing.assert_close(found, expected, atol=tolerance("same-torch"), rtol=0)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0"])
def test_every_type_that_the_converter_writes_is_read_as_gguf_reads_it(
    dtype: str, tmp_path: Path
) -> None:
    import gguf

    numbers = np.random.default_rng(0)
    values = numbers.standard_normal((4, 64)).astype(np.float32)
    arrays, _ = read_gguf(write(tmp_path / "a.gguf", "llama", {"x": values}, dtype))
    kind = gguf.GGMLQuantizationType[dtype]
    expected = gguf.dequantize(gguf.quantize(values, kind), kind)
    np.testing.assert_array_equal(arrays["x"].astype(np.float32), expected)


PAIR: Final = {
    "blk.0.attn_q.weight.lora_a": np.ones((4, 32), np.float32),
    "blk.0.attn_q.weight.lora_b": np.ones((32, 4), np.float32),
}
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "another architecture": (
        lambda place: write(place, "gpt2", PAIR),
        "general.architecture is 'gpt2': adapters of llama.cpp are converted for",
    ),
    "another model type": (
        lambda place: write(place, "qwen2", PAIR),
        "is a 'llama', the adapter is for a qwen2",
    ),
    "a complete model": (
        lambda place: write(place, "llama", PAIR, **{"general.type": "model"}),
        "is not an adapter but a GGUF file of a 'model'",
    ),
    "another kind of adapter": (
        lambda place: write(place, "llama", PAIR, **{"adapter.type": "vera"}),
        "adapter.type is 'vera', expected 'lora'",
    ),
    "no alpha": (
        lambda place: write(place, "llama", PAIR, **{"adapter.lora.alpha": None}),
        "adapter.lora.alpha in its config is None, expected a number",
    ),
    "an alpha of zero": (
        lambda place: write(place, "llama", PAIR, **{"adapter.lora.alpha": 0.0}),
        "adapter.lora.alpha is 0, which llama.cpp and PEFT use differently",
    ),
    "activated LoRA": (
        lambda place: write(place, "llama", PAIR, **{"adapter.alora.invocation_tokens": [3, 4]}),
        "activated LoRA",
    ),
    "a norm": (
        lambda place: write(
            place, "llama", {**PAIR, "blk.0.attn_norm.weight": np.ones(32, np.float32)}
        ),
        "blk.0.attn_norm.weight is not part of a LoRA",
    ),
    "experts": (
        lambda place: write(
            place,
            "llama",
            {
                f"blk.0.ffn_up_exps.weight.lora_{half}": np.ones((2, 4, 4), np.float32)
                for half in "ab"
            },
        ),
        "blk.0.ffn_up_exps is not a module that is converted",
    ),
    "a layer that the base lacks": (
        lambda place: write(
            place, "llama", {k.replace("blk.0", "blk.7"): v for k, v in PAIR.items()}
        ),
        "has no model.layers.7.self_attn.q_proj",
    ),
    "half a module": (
        lambda place: write(place, "llama", dict([*PAIR.items()][:1])),
        "blk.0.attn_q only has A",
    ),
    "ranks that differ": (
        lambda place: write(
            place, "llama", {**PAIR, "blk.0.attn_q.weight.lora_a": np.ones((2, 32), np.float32)}
        ),
        r"factors \[2, 32\] and \[32, 4\]",
    ),
    "a rank of zero": (
        lambda place: write(
            place,
            "llama",
            {
                "blk.0.attn_q.weight.lora_a": np.ones((0, 32), np.float32),
                "blk.0.attn_q.weight.lora_b": np.ones((32, 0), np.float32),
            },
        ),
        r"factors \[0, 32\] and \[32, 0\]",
    ),
    "weights of another size than the base's": (
        lambda place: write(
            place, "llama", {**PAIR, "blk.0.attn_q.weight.lora_b": np.ones((64, 4), np.float32)}
        ),
        r"factors of \[64, 32\], .* has a weight of \[32, 32\]",
    ),
    "a type that is not read": (
        lambda place: write(
            place, "llama", {"blk.0.attn_q.weight.lora_a": np.ones((4, 32))}, "Q4_0"
        ),
        "has the type 2: convert the adapter again",
    ),
    "an infinite value": (
        lambda place: write(place, "llama", {k: v * np.inf for k, v in PAIR.items()}),
        "has values that are not finite",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_files_that_are_not_converted_are_refused_by_name(what: str, tmp_path: Path) -> None:
    make, message = REFUSED[what]
    model("Llama").save_pretrained(tmp_path / "base")
    file = make(tmp_path / "a.gguf")
    with pytest.raises(LoraDeployError, match=message) as refusal:
        call("convert", file, "--model", tmp_path / "base", "--output", tmp_path / "peft")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "peft").exists()


@pytest.mark.filterwarnings("ignore")
def test_an_embedding_that_is_tied_to_the_head_is_refused(tmp_path: Path) -> None:
    model("Llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    rows = {"a": np.ones((64, 4), np.float32), "b": np.ones((32, 4), np.float32)}
    file = write(
        tmp_path / "a.gguf", "llama", {f"token_embd.weight.lora_{h}": v for h, v in rows.items()}
    )
    with pytest.raises(AdapterError, match="tied to the output head of this base"):
        call("convert", file, "--model", tmp_path / "base", "--output", tmp_path / "peft")


def test_the_base_is_asked_for_and_a_file_is_named_with_the_conversion(tmp_path: Path) -> None:
    file = write(tmp_path / "a.gguf", "llama", PAIR)
    with pytest.raises(LoraDeployError, match="give its base as `model`: its architecture"):
        call("convert", file, "--output", tmp_path / "peft")
    for path in (file, tmp_path):
        with pytest.raises(AdapterError, match="GGUF file .* loradeploy convert ADAPTER --model"):
            load_adapter(path)


def test_a_file_that_is_truncated_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.gguf", "llama", PAIR)
    start = io.BytesIO(file.read_bytes()[:30])
    monkeypatch.setattr(start, "seek", lambda *_: 1000, raising=False)
    monkeypatch.setattr(gguf_files, "open_file", lambda *_, **__: start)
    with pytest.raises(AdapterError, match="is not a valid GGUF file"):
        read_gguf(file)


def test_one_of_several_files_in_a_directory_is_asked_for(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / name, "llama", PAIR)
    with pytest.raises(LoraDeployError, match="has 2 files of tensors: give one of a.gguf, b.gguf"):
        call("convert", tmp_path, "--output", tmp_path / "peft")


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_without_another_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    place = tmp_path_factory.mktemp("gguf") / "a.gguf"
    content = bytearray(write(place, "llama", PAIR).read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    for _ in range(data.draw(st.integers(0, 3)) if content else 0):
        position = data.draw(st.integers(0, min(len(content), 500) - 1))
        content[position] = data.draw(st.integers(0, 255))
    place.write_bytes(content)
    try:
        read_gguf(place)
    except AdapterError as refusal:
        assert "\n" not in str(refusal)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<4sIQQ", b"GGUF", 3, 2**63, 0),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**63),
        struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**62),
        struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 2**62),
        struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 9, 1),
        struct.pack(">4sIQQ", b"GGUF", 3, 0, 0),
        struct.pack("<4sIQQ", b"GGUF", 1, 0, 0),
        b"GGUF",
        b"",
    ],
)
def test_a_header_of_impossible_sizes_is_refused(header: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(header)
    with pytest.raises(AdapterError, match="is not a valid GGUF file"):
        read_gguf(file)
