"""The Node client reads PEFT directories like Python, and refuses invalid adapters by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.adapter.files.tensors import read_arrays, write_arrays
from loradeploy.errors import AdapterError
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.clients.conftest import Node, Required
from tests.clients.generations import (
    COUNT,
    TOKENS,
    answers,
)


def peft_directory(
    place: Path, like: Path, *, store: str = "F32", change: Any = None, **config: Any
) -> Path:
    """Copy the PEFT directory `like` with config changes, or with its factors as another dtype.

    `change`: a function that modifies the arrays by key.
    """
    place.mkdir(parents=True)
    values = json.loads((like / "adapter_config.json").read_text()) | config
    (place / "adapter_config.json").write_text(json.dumps(values))
    arrays, metadata = read_arrays(like / "adapter_model.safetensors", error=AdapterError)
    if change is not None:
        metadata = change(arrays) or metadata
    weights = place / "adapter_model.safetensors"
    if store == "F32":
        write_arrays(weights, arrays, metadata)
    elif store == "F16":
        write_arrays(weights, {n: v.astype(np.float16) for n, v in arrays.items()}, metadata)
    else:  # numpy has no bfloat16: use the upper half of the bits of a float32
        halves = {n: (v.view(np.uint32) >> 16).astype(np.int16) for n, v in arrays.items()}
        write_arrays(weights, halves, metadata)
        header = weights.read_bytes()
        size = int.from_bytes(header[:8], "little")
        named = header[8 : 8 + size].replace(b'"I16"', b'"BF16"')
        weights.write_bytes(len(named).to_bytes(8, "little") + named + header[8 + size :])
    return place


def shrink_q(arrays: dict[str, Any]) -> None:
    """Reduce one module from rank 4 to rank 3."""
    for name in list(arrays):
        if "layers.0.self_attn.q_proj" in name:
            arrays[name] = arrays[name][:3] if "lora_A" in name else arrays[name][:, :3].copy()


@pytest.fixture(scope="session")
def peft_adapters(
    client_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The first adapter in the other forms that PEFT writes."""
    place, like = tmp_path_factory.mktemp("peft"), client_adapters["all"]
    pattern = {"layers.0.self_attn.q_proj": 3, "down_proj": 4}
    alphas = {"gate_proj": 3, "layers.1.mlp.up_proj": 20.5, r"^model\.layers\.0\.mlp\.up_proj": 1}
    return {
        "plain": like,
        "float16": peft_directory(place / "f16", like, store="F16"),
        "bfloat16": peft_directory(place / "bf16", like, store="BF16"),
        "rslora": peft_directory(place / "rslora", like, use_rslora=True),
        "patterns": peft_directory(
            place / "patterns", like, change=shrink_q, rank_pattern=pattern, alpha_pattern=alphas
        ),
        "another alpha": peft_directory(place / "other-alpha", like, lora_alpha=12),
    }


def test_node_reads_peft_directories_like_python(
    node: Node, required: Required, peft_adapters: dict[str, Path]
) -> None:
    bundle = required("slots")
    rows = [*peft_adapters, None]
    call = {"prompts": [TOKENS] * len(rows), "adapters": rows, "maxNewTokens": COUNT}
    places = {**peft_adapters, "rslora": peft_adapters["rslora"] / "adapter_model.safetensors"}
    (result,) = node([{"bundle": bundle, "add": places, "calls": [["generate", call]]}])
    session = AdapterSession(bundle)
    for name, place in peft_adapters.items():
        session.load(name, place)
    ours = TextGenerator(session).generate(
        [TOKENS] * len(rows), adapters=rows, max_new_tokens=COUNT
    )
    theirs = dict(zip(rows, answers(result), strict=True))
    assert [theirs[name]["tokenIds"] for name in rows] == [list(a.token_ids) for a in ours]
    # A wrong scaling would be detected: each of these has a different s in some module.
    different = ("plain", "rslora", "patterns", "another alpha", None)
    assert len({tuple(theirs[name]["tokenIds"]) for name in different}) == len(different)


def uneven(arrays: dict[str, Any]) -> dict[str, str]:
    """Rescale A and B so that the products are the same and neither fits float16."""
    for key in arrays:
        arrays[key] = arrays[key] * np.float32(2.0**20 if "lora_A" in key else 2.0**-20)
    return {}


def test_node_rescales_factors_to_fit_float16(
    node: Node, required: Required, client_adapters: dict[str, Path], tmp_path: Path
) -> None:
    place = peft_directory(tmp_path / "uneven", client_adapters["all"], change=uneven)
    rows = ["uneven", "all", None]
    call = {"prompts": [TOKENS] * 3, "adapters": rows, "maxNewTokens": COUNT}
    (result,) = node(
        [{"bundle": required("fp16"), "add": {"uneven": place}, "calls": [["generate", call]]}]
    )
    found = [answer["tokenIds"] for answer in answers(result)]
    assert found[0] == found[1] != found[2]


def other_base(arrays: dict[str, Any]) -> dict[str, str]:
    return {"loradeploy.base_digest": "sha256:" + "0" * 64}


def of_another_model(arrays: dict[str, Any]) -> None:
    for name in list(arrays):
        arrays[name.replace("self_attn", "attention")] = arrays.pop(name)


def wrong_sizes(arrays: dict[str, Any]) -> None:
    for name in arrays:
        if "q_proj.lora_A" in name:
            arrays[name] = arrays[name][:, :-1].copy()


def half_missing(arrays: dict[str, Any]) -> None:
    del arrays[next(name for name in arrays if "v_proj.lora_B" in name)]


def module_missing(arrays: dict[str, Any]) -> None:
    for name in [name for name in arrays if "layers.1.mlp.up_proj" in name]:
        del arrays[name]


def with_trained_tokens(arrays: dict[str, Any]) -> None:
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    arrays[name] = np.ones((1, 64), np.float32)


def not_finite(arrays: dict[str, Any]) -> None:
    next(iter(arrays.values()))[0, 0] = np.nan


# By case: how an adapter is broken, and the expected message.
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "another base": ({"change": other_base}, "trained on another base"),
    "another model": ({"change": of_another_model}, "is not a target module of this bundle"),
    "wrong sizes": ({"change": wrong_sizes}, "q_proj.lora_A is [4,63]"),
    "half a module": ({"change": half_missing}, "lora_A and lora_B are needed"),
    "a module less": (
        {"change": module_missing, "target_modules": ["q_proj", "up_proj"]},
        "model.layers.1.mlp.up_proj is targeted and has no tensors",
    ),
    "no number": ({"change": not_finite}, "not finite"),
    "another rank": ({"r": 8}, "rank and base take [8,64]"),
    "DoRA": ({"use_dora": True}, "use_dora=true"),
    "an unknown field": ({"new_method": {"on": True}}, "new_method"),
    "adapted parameters": (
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        "target_parameters",
    ),
    "trained tokens": ({"trainable_token_indices": [3, 5]}, "trainable_token_indices=[3,5]"),
    "trained tokens of several embeddings": (
        {"trainable_token_indices": {"embed_tokens": [3]}},
        'trainable_token_indices={"embed_tokens":[3]}',
    ),
    "tokens that no field names": (
        {"change": with_trained_tokens},
        "trainable_tokens_delta is neither a factor nor a side input",
    ),
    "an expression": ({"alpha_pattern": {"(a+)+$": 2}}, "alpha_pattern has the expression"),
    "trained biases": ({"bias": "all"}, 'bias="all"'),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "no LoRA": ({"peft_type": "IA3"}, "only LORA"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha"),
}


def test_node_refuses_adapters_by_name(
    node: Node, required: Required, client_adapters: dict[str, Path], tmp_path: Path
) -> None:
    bundle, like = required("slots"), client_adapters["all"]
    places: dict[str, Any] = {
        name: peft_directory(tmp_path / name, like, **how) for name, (how, _) in BROKEN.items()
    }
    message = {name: what for name, (_, what) in BROKEN.items()}

    def break_file(name: str, file: Path, content: bytes, what: str) -> None:
        if file.name == "adapter_model.safetensors":
            peft_directory(tmp_path / name, like)
            file = tmp_path / name / file.name
        file.write_bytes(content)
        places[name], message[name] = file, what

    weights = (like / "adapter_model.safetensors").read_bytes()
    native = (bundle / "adapters" / "all.onnx_adapter").read_bytes()
    in_directory, alone = Path("adapter_model.safetensors"), tmp_path / "x"
    alone.mkdir()
    break_file("a cut file", in_directory, weights[:-100], "not a valid safetensors file")
    break_file("a cut header", in_directory, weights[:50], "not a valid safetensors file")
    break_file("a long header", in_directory, b"\xff" * 16, "not a valid safetensors file")
    break_file("more bytes", in_directory, weights + b"0000", "not a valid safetensors file")
    break_file("a cut adapter", alone / "cut.onnx_adapter", native[:-4000], "truncated")
    break_file(
        "no adapter", alone / "no.onnx_adapter", weights, "truncated or not an .onnx_adapter"
    )
    break_file("a pickle", alone / "a.bin", b"", "is refused")
    of_texts = client_adapters["few"]
    places |= {"own texts": of_texts, "nothing": tmp_path / "nothing"}
    message |= {
        "own texts": "chat_template.jinja differs from the base's",
        "nothing": "does not exist",
    }
    lost = [["generate", {"prompt": TOKENS, "adapter": "DoRA"}]]
    (result,) = node([{"bundle": bundle, "add": places, "calls": lost}])
    for name, what in message.items():
        reported = result["value"]["added"][name]
        assert reported.get("error") == "AdapterError", (name, reported)
        assert what in reported["message"], (name, reported)
        assert "\n" not in reported["message"]
    assert sorted(result["value"]["adapters"]) == ["all", "few"]  # refused ones are not listed
    assert "no adapter is loaded as" in result["value"]["answers"][0]["message"]
