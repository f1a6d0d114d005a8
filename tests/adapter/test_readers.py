"""Adapters of other libraries, converted to PEFT, compute the same as in those libraries.

Each case writes the library's files with random values and defines the library's equation for the
adapted weight of each module. PEFT with the converted adapter must give the logits of the model
with these weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest

from loradeploy.adapter import load_adapter
from loradeploy.adapter.files.tensors import write_arrays
from loradeploy.errors import LoraDeployError
from tests.cli.calling import call
from tests.tolerances import tolerance

if TYPE_CHECKING:
    from torch import Tensor, nn

Arrays = dict[str, np.ndarray]
# Computes the adapted weight of a module from its base weight.
Equation = Callable[[np.ndarray], np.ndarray]

SMALL = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {"intermediate_size": 48, "initializer_range": 0.2}


def random(*shape: int) -> np.ndarray:
    numbers = np.random.default_rng(sum(i * n for i, n in enumerate(shape, 1)))
    return (0.2 * numbers.standard_normal(shape)).astype(np.float32)


def models() -> dict[str, Callable[[], nn.Module]]:
    import transformers as t

    decoder = {**SMALL, **BODY, **WIDE, "num_key_value_heads": 2}
    encoder = {**SMALL, **BODY, **WIDE, "max_position_embeddings": 40}
    clip = {"projection_dim": 16, "max_position_embeddings": 40}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**decoder)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**decoder)),
        "bert": lambda: t.BertModel(t.BertConfig(**encoder), add_pooling_layer=False),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt2, **SMALL)),
        "clip": lambda: t.CLIPTextModel(t.CLIPTextConfig(**SMALL, **BODY, **clip)),
        "jina": lambda: t.JinaEmbeddingsV3Model(t.JinaEmbeddingsV3Config(**encoder)),
    }


@dataclass
class Case:
    """The files of a library and the adapted weights that it uses.

    `wrong`: equations with a possible mistake of a conversion, which the test must detect.
    """

    model: str
    tensors: Arrays
    right: Mapping[str, Equation]
    wrong: Mapping[str, Equation]
    config: Mapping[str, Any] | None = None
    file: str = "adapters.safetensors"
    config_file: str = "adapter_config.json"
    options: list[str] = field(default_factory=list)
    needs_base: bool = False
    header: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)


def plus(update: np.ndarray) -> Equation:
    return lambda weight: weight + update


def mlx() -> Case:
    """y = W x + scale · (x a) b."""
    tensors, right, wrong = {}, {}, {}
    for module, shape in {
        "model.layers.0.self_attn.q_proj": (32, 32),
        "model.layers.1.mlp.down_proj": (48, 32),
    }.items():
        a, b = random(shape[0], 4), random(4, shape[1])
        tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
        right[module], wrong[module] = plus(3 * (a @ b).T), plus((a @ b).T)
    settings = {"rank": 4, "scale": 3.0, "dropout": 0.0}
    return Case(
        "llama", tensors, right, wrong, {"fine_tune_type": "lora", "lora_parameters": settings}
    )


def mlx_vision() -> Case:
    """y = W x + alpha · (x A) B; alpha is not divided by the rank."""
    tensors, right, wrong = {}, {}, {}
    for module, shape in {
        "model.layers.0.self_attn.k_proj": (32, 16),
        "model.layers.1.mlp.down_proj": (48, 32),
    }.items():
        a, b = random(shape[0], 4), random(4, shape[1])
        tensors |= {f"{module}.A": a, f"{module}.B": b}
        right[module], wrong[module] = plus(1.5 * (a @ b).T), plus(1.5 / 4 * (a @ b).T)
    return Case("llama", tensors, right, wrong, {"rank": 4, "alpha": 1.5, "dropout": 0.1})


def mlx_dora() -> Case:
    """W' = m · (W + scale · (a b)ᵀ) / ‖W + scale · (a b)ᵀ‖, with row norms."""
    module = "model.layers.0.self_attn.v_proj"
    a, b, m = random(32, 4), random(4, 16), 1 + np.abs(random(16))

    def scaled(magnitude: np.ndarray) -> Equation:
        def equation(weight: np.ndarray) -> np.ndarray:
            both = weight + 3 * (a @ b).T
            return magnitude[:, None] * both / np.linalg.norm(both, axis=1, keepdims=True)

        return equation

    tensors = {f"{module}.lora_a": a, f"{module}.lora_b": b, f"{module}.m": m.astype(np.float32)}
    settings = {"rank": 4, "scale": 3.0}
    config = {"fine_tune_type": "dora", "lora_parameters": settings}
    wrong = {module: plus(3 * (a @ b).T)}
    return Case("llama", tensors, {module: scaled(m)}, wrong, config)


def olive() -> Case:
    """y = W x + (x A) B, with PEFT's names; B includes the scaling."""
    case = mlx()
    renamed = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    tensors = {}
    for key, values in case.tensors.items():
        module, _, half = key.rpartition(".")
        tensors[f"{module}.{renamed[half]}"] = values
    return Case("llama", tensors, case.wrong, case.right, file="adapter.safetensors")


def olive_int4() -> Arrays:
    parts = {"quant.weight": np.uint8, "quant.scale": np.float32}
    return {
        key.replace("weight", part): values.astype(dtype)
        for key, values in olive().tensors.items()
        for part, dtype in parts.items()
    }


def tune_order(heads: int, size: int) -> np.ndarray:
    """Return the rows of transformers' weight in torchtune's order, as its hf_to_tune permutes."""
    return np.arange(heads * size).reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(-1)


def torchtune(model: str = "llama") -> Case:
    """W' = W + α/r · B A in torchtune's row order, which differs for query and key of Llama."""
    tensors, right, wrong = {}, {}, {}
    for name, module, heads, shape in (
        ("layers.0.attn.q_proj", "model.layers.0.self_attn.q_proj", 4, (32, 32)),
        ("layers.1.attn.k_proj", "model.layers.1.self_attn.k_proj", 2, (32, 16)),
        ("layers.1.attn.output_proj", "model.layers.1.self_attn.o_proj", 0, (32, 32)),
        ("layers.1.mlp.w1", "model.layers.1.mlp.gate_proj", 0, (32, 48)),
        ("layers.0.mlp.w2", "model.layers.0.mlp.down_proj", 0, (48, 32)),
        ("layers.0.mlp.w3", "model.layers.0.mlp.up_proj", 0, (32, 48)),
        ("output", "lm_head", 0, (32, 64)),
    ):
        A, B = random(4, shape[0]), random(shape[1], 4)
        tensors |= {f"{name}.lora_a.weight": A, f"{name}.lora_b.weight": B}
        update = 2 * (B @ A)
        ordered = np.zeros_like(update)
        ordered[tune_order(heads, 8) if heads else slice(None)] = update
        llama = model == "llama"
        right[module] = plus(ordered if llama else update)
        wrong[module] = plus(update if llama else ordered)
    config = {"r": 4, "lora_alpha": 8, "peft_type": "LORA", "target_modules": ["q_proj", "w1"]}
    return Case(model, tensors, right, wrong, config, "adapter_model.safetensors", needs_base=True)


def litgpt(parts: str = "qkv", model: str = "llama") -> Case:
    """W' = W + α/r · B A; those of query, key and value are joined, with A and B of each."""
    rows, factors = {"q": 32, "k": 16, "v": 16}, {}
    for part in parts:
        factors[part] = (random(4, 32) + ord(part) / 500, random(rows[part], 4))
    joint = "transformer.h.1.attn.qkv"
    tensors = {
        f"{joint}.lora_{half}": np.concatenate([pair[i] for pair in factors.values()])
        for i, half in enumerate("AB")
    }
    right, wrong = {}, {}
    first = next(iter(factors.values()))[0]
    for part, (A, B) in factors.items():
        module = f"model.layers.1.self_attn.{part}_proj"
        right[module], wrong[module] = plus(2 * B @ A), plus(2 * B @ first[::-1])
    for name, module, shape in (
        ("transformer.h.0.attn.proj", "model.layers.0.self_attn.o_proj", (32, 32)),
        ("transformer.h.0.mlp.fc_1", "model.layers.0.mlp.gate_proj", (32, 48)),
        ("transformer.h.0.mlp.fc_2", "model.layers.0.mlp.up_proj", (32, 48)),
        ("transformer.h.1.mlp.proj", "model.layers.1.mlp.down_proj", (48, 32)),
        ("lm_head", "lm_head", (32, 64)),
    ):
        A, B = random(4, shape[0]), random(shape[1], 4)
        tensors |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
        right[module] = wrong[module] = plus(2 * B @ A)
    settings = {"r": 4, "alpha": 8, "dropout": 0.05}
    settings |= {
        name: str(name[0] in parts).lower() for name in ("query", "key", "value", "projection")
    }
    lines = [f"lora_{name}: {value}" for name, value in settings.items()]
    text = "\n".join(["checkpoint_dir: checkpoints/x", *lines, "train:", "  lora_r: 9", ""])
    return Case(
        model,
        tensors,
        right,
        wrong,
        file="lit_model_lora.safetensors",
        needs_base=True,
        beside={"hyperparameters.yaml": text},
    )


def litgpt_setting(old: str, new: str) -> Case:
    case = litgpt()
    name, text = next(iter(case.beside.items()))
    assert f"lora_{old}" in text
    return change(case, beside={name: text.replace(f"lora_{old}", f"lora_{new}" if new else "")})


def adapter_hub() -> Case:
    """W' = W + α/r · B A."""
    tensors, right, wrong = {}, {}, {}
    for module in ("encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.value"):
        A, B = random(4, 32), random(32, 4)
        for name, factor in (("sport", 1), ("tech", -1)):
            tensors |= {f"{module}.loras.{name}.lora_A": factor * A}
            tensors |= {f"{module}.loras.{name}.lora_B": B}
        right[module], wrong[module] = plus(4 * B @ A), plus(-4 * B @ A)
    inner = {"architecture": "lora", "alpha": 16, "r": 4, "attn_matrices": ["q", "v"]}
    config = {"config": inner, "model_name": "bert", "model_type": "bert", "hidden_size": 32}
    return Case(
        "bert", tensors, right, wrong, config, "adapter.safetensors", options=["--name", "sport"]
    )


def adapter_hub_fused() -> Case:
    """Query and value rows get α/r · B A of their own factors, key rows none; W is [in, out]."""
    module = "transformer.h.0.attn.c_attn"
    A, B = random(2 * 4, 32), random(2 * 32, 4)  # for query and value
    q, v = (B[32 * i : 32 * (i + 1)] @ A[4 * i : 4 * (i + 1)] for i in (0, 1))
    update, mixed = (2 * np.concatenate(parts).T for parts in ((q, 0 * q, v), (q, v, 0 * q)))
    tensors = {f"{module}.loras.sport.lora_A": A, f"{module}.loras.sport.lora_B": B}
    inner = {"architecture": "lora", "alpha": 8, "r": 4, "attn_matrices": ["q", "v"]}
    config = {"config": inner, "model_name": "gpt2"}
    right, wrong = {module: plus(update)}, {module: plus(mixed)}
    return Case("gpt2", tensors, right, wrong, config, "adapter.safetensors")


def jina() -> Case:
    """W' = W + α/r · B A of one task, α/r · A B for an embedding; fused query, key and value."""
    layer, stack = "roberta.encoder.layers.1", "parametrizations.weight.0"
    fused = (random(3, 4, 32), random(3, 96, 4))
    out = (random(3, 4, 48), random(3, 32, 4))
    words = (random(3, 64, 4), random(3, 4, 32))
    tensors = {
        f"{name}.{stack}.lora_{half}": values
        for name, pair in {
            f"{layer}.mixer.Wqkv": fused,
            f"{layer}.mlp.fc2": out,
            "roberta.embeddings.word_embeddings": words,
        }.items()
        for half, values in zip("AB", pair, strict=True)
    }
    tensors[f"{layer}.mlp.fc2.parametrizations.weight.original"] = random(32, 48)
    parts = ("q_proj", "k_proj", "v_proj")

    def of(task: int) -> dict[str, Equation]:
        A, B = (half[task] for half in fused)
        found = {
            f"layers.1.self_attn.{part}": plus(0.25 * B[32 * i : 32 * (i + 1)] @ A)
            for i, part in enumerate(parts)
        }
        found["layers.1.mlp.fc2"] = plus(0.25 * out[1][task] @ out[0][task])
        found["embeddings.word_embeddings"] = plus(0.25 * words[0][task] @ words[1][task])
        return found

    config = {
        "model_type": "xlm-roberta",
        "lora_adaptations": ["retrieval.query", "retrieval.passage", "text-matching"],
        "lora_rank": 4,
        "lora_alpha": 1,
    }
    return Case(
        "jina",
        tensors,
        of(2),
        of(1),
        config,
        "model.safetensors",
        "config.json",
        options=["--name", "text-matching"],
    )


TEXT = "encoder.layers"


def kohya() -> Case:
    """W' = W + alpha / rank · up down; the alpha of each module is in the file."""
    tensors: Arrays = {"lora_unet_mid_block.lora_down.weight": random(4, 8)}
    tensors["lora_unet_mid_block.lora_up.weight"] = random(8, 4)
    right, wrong = {}, {}
    for module, alpha in (("0.self_attn.q_proj", 2.0), ("1.mlp.fc2", None)):
        down, up = random(4, 2048 if "fc2" in module else 32), random(32, 4)
        key = f"lora_te_text_model.{TEXT}.{module}".replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{key}.alpha"] = np.array(alpha, np.float32)
        name = f"{TEXT}.{module}"
        right[name] = plus((1 if alpha is None else alpha / 4) * up @ down)
        wrong[name] = plus(up @ down)
    return Case(
        "clip",
        tensors,
        right,
        wrong,
        file="style.safetensors",
        options=["--name", "te"],
        needs_base=True,
    )


def diffusers() -> Case:
    """The same, with dots in the names and diffusers' names for A and B."""
    down, up = random(4, 32), random(32, 4)
    module = f"{TEXT}.1.self_attn.v_proj"
    key = f"text_encoder.text_model.{module}.lora_linear_layer"
    tensors = {f"{key}.down.weight": down, f"{key}.up.weight": up}
    right, wrong = {module: plus(up @ down)}, {module: plus(0.25 * up @ down)}
    return Case(
        "clip", tensors, right, wrong, file="pytorch_lora_weights.safetensors", needs_base=True
    )


def diffusers_ranks(first: int, second: int, *, alphas: int = 0) -> Case:
    """Two modules of these ranks, the first `alphas` of them with an alpha."""
    case, tensors = diffusers(), {}
    for number, rank in enumerate((first, second)):
        key = f"text_encoder.text_model.{TEXT}.{number}.self_attn.v_proj"
        tensors |= {f"{key}.lora_A.weight": random(rank, 32)}
        tensors |= {f"{key}.lora_B.weight": random(32, rank)}
        if number < alphas:
            tensors[f"{key}.alpha"] = np.array(2.0, np.float32)
    return change(case, tensors=tensors)


V_PROJ = f"text_encoder.text_model.{TEXT}.1.self_attn.v_proj"


def peft_header(**fields: Any) -> dict[str, str]:
    """Return the header metadata that diffusers (0.34) writes for two components."""
    own = {f"text_encoder.{name}": value for name, value in fields.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps({"unet.lora_alpha": 64, **own})}


def diffusers_header(expected: float = 8.0, **fields: Any) -> Case:
    """The scaling comes from PEFT's config in the header: not 1, and not of another component."""
    A, B = random(4, 32), random(32, 4)
    tensors = {f"{V_PROJ}.lora_A.weight": A, f"{V_PROJ}.lora_B.weight": B}
    module = f"{TEXT}.1.self_attn.v_proj"
    right, wrong = {module: plus(expected * B @ A)}, {module: plus(B @ A)}
    header = peft_header(**{"r": 4, "lora_alpha": 32, **fields})
    file = "pytorch_lora_weights.safetensors"
    return Case("clip", tensors, right, wrong, file=file, needs_base=True, header=header)


def with_alpha(case: Case, alpha: float) -> Case:
    alphas = {f"{V_PROJ}.alpha": np.array(alpha, np.float32)}
    return change(case, tensors=case.tensors | alphas)


def kohya_header() -> Case:
    """An alpha per module in the file takes precedence over the header."""
    case = kohya()
    found = {key for key in case.tensors if "fc2" not in key}
    module = f"{TEXT}.0.self_attn.q_proj"
    return change(
        case,
        tensors={key: case.tensors[key] for key in found},
        right={module: case.right[module]},
        wrong={module: case.wrong[module]},
        header={"ss_network_alpha": "16.0", "ss_network_dim": "4"},
    )


def state_dict() -> Case:
    """A state dict of PEFT layers, with the adapter name in the keys."""
    module = "model.layers.0.self_attn.q_proj"
    tensors: Arrays = {}
    for name, sign in (("sport", 1), ("tech", -1)):
        key = f"base_model.model.{module}.lora_"
        tensors |= {f"{key}A.{name}.weight": sign * random(4, 32)}
        tensors |= {f"{key}B.{name}.weight": random(32, 4)}
    tensors[f"base_model.model.{module}.base_layer.weight"] = random(32, 32)
    update = 2 * random(32, 4) @ random(4, 32)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    right, wrong = {module: plus(update)}, {module: plus(-update)}
    options = ["--name", "sport"]
    return Case("llama", tensors, right, wrong, config, "all.safetensors", options=options)


CASES: dict[str, Callable[[], Case]] = {
    "mlx-lm": mlx,
    "mlx-lm, DoRA": mlx_dora,
    "mlx-vlm": mlx_vision,
    "torchtune, rotary order": torchtune,
    "torchtune, Qwen2": lambda: torchtune("qwen2"),
    "litgpt": litgpt,
    "litgpt, query and value": lambda: litgpt("qv"),
    "litgpt, Qwen2, key": lambda: litgpt("k", "qwen2"),
    "AdapterHub": adapter_hub,
    "AdapterHub, fused projection": adapter_hub_fused,
    "jina-embeddings-v3": jina,
    "Olive": olive,
    "Olive, .onnx_adapter": lambda: change(olive(), file="a.onnx_adapter"),
    "kohya": kohya,
    "kohya, alpha in the header too": kohya_header,
    "diffusers": diffusers,
    "diffusers, config in the header": diffusers_header,
    "diffusers, rsLoRA": lambda: diffusers_header(16.0, use_rslora=True),
    "diffusers, alpha of one module": lambda: with_alpha(
        diffusers_header(4.0, alpha_pattern={"v_proj": 16}), 16
    ),
    "state_dict()": state_dict,
}


def written(case: Case, place: Path) -> Path:
    place.mkdir()
    if case.file.endswith(".onnx_adapter"):
        content = onnxruntime.AdapterFormat()
        to_value = onnxruntime.OrtValue.ortvalue_from_numpy
        content.set_parameters({name: to_value(array) for name, array in case.tensors.items()})
        content.export_adapter(str(place / case.file))
        return place / case.file
    write_arrays(place / case.file, case.tensors, case.header)
    if case.config is not None:
        (place / case.config_file).write_text(json.dumps(case.config))
    for name, text in case.beside.items():
        (place / name).write_text(text)
    return place


def model_of(case: Case) -> nn.Module:
    import torch

    torch.manual_seed(0)
    return models()[case.model]().eval()


def outputs(model: nn.Module) -> Tensor:
    import torch

    with torch.no_grad():
        first: Tensor = model(torch.arange(3, 27).reshape(2, 12))[0]
        return first


def with_weights(case: Case, equations: Mapping[str, Equation]) -> Tensor:
    """Return the outputs of the model with the weights computed by `equations`."""
    import torch

    model = model_of(case)
    for module, equation in equations.items():
        weight = model.get_parameter(f"{module}.weight")
        with torch.no_grad():
            weight.copy_(torch.from_numpy(equation(weight.numpy().astype(np.float64))))
    return outputs(model)


@pytest.mark.parametrize("name", CASES)
def test_a_converted_adapter_computes_the_same_as_in_its_library(name: str, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel

    case = CASES[name]()
    source, output = written(case, tmp_path / "theirs"), tmp_path / "peft"
    options = list(case.options)
    if case.needs_base:
        model_of(case).save_pretrained(tmp_path / "base")  # type: ignore[operator]
        options += ["--model", str(tmp_path / "base")]
    result = json.loads(call("convert", source, "--output", output, *options, "--json"))
    assert result["targets"] == len(case.right) == len(load_adapter(output).factors)

    found = outputs(PeftModel.from_pretrained(model_of(case), output).eval())
    right = with_weights(case, case.right)
    torch.testing.assert_close(found, right, atol=tolerance("merged-torch"), rtol=0)
    for unlike in (with_weights(case, case.wrong), outputs(model_of(case))):
        assert (found - unlike).abs().max() > 1e-3, "the test would not see a wrong conversion"


def change(case: Case, **changes: Any) -> Case:
    for name, value in changes.items():
        setattr(case, name, value)
    return case


REFUSED: dict[str, tuple[Callable[[], Case], str]] = {
    "which of several": (
        lambda: change(adapter_hub(), options=[]),
        "has 2 adapters: give `name`, one of sport, tech",
    ),
    "a name it lacks": (
        lambda: change(adapter_hub(), options=["--name", "art"]),
        "none is 'art': give `name`, one of sport, tech",
    ),
    "no settings": (lambda: change(mlx(), config=None), "no adapter_config.json .* its scale"),
    "alpha and scale": (
        lambda: change(mlx(), config={"lora_parameters": {"alpha": 16, "scale": 10}}),
        "alpha and scale, which versions of mlx-lm use differently",
    ),
    "full training": (
        lambda: change(mlx(), config={"fine_tune_type": "full"}),
        "fine_tune_type is 'full'",
    ),
    "swapped factors": (
        lambda: change(mlx(), tensors={k: v.T.copy() for k, v in mlx().tensors.items()}),
        "lora_a is .*, .in, rank. with the config's rank 4 is needed",
    ),
    "experts": (
        lambda: change(mlx(), tensors={k: v[None] for k, v in mlx().tensors.items()}),
        "factors for each expert",
    ),
    "mlx-vlm, another rank": (
        lambda: change(mlx_vision(), config={"rank": 8, "alpha": 1.5}),
        "lora_a is .*, 4., .in, rank. with the config's rank 8 is needed",
    ),
    "mlx-vlm, a trained projector": (
        lambda: change(
            mlx_vision(), tensors={**mlx_vision().tensors, "projector.weight": random(4, 4)}
        ),
        "projector.weight is not part of a LoRA",
    ),
    "half a module": (
        lambda: change(mlx(), tensors={"l.q.lora_a": random(8, 4)}),
        "l.q only has A",
    ),
    "an embedding": (
        lambda: change(
            mlx(),
            tensors={
                f"model.embed_tokens.lora_{half}": random(*shape)
                for half, shape in (("a", (64, 4)), ("b", (4, 32)))
            },
        ),
        "changes a tied output head too",
    ),
    "rotary order without a base": (
        lambda: change(torchtune(), needs_base=False),
        "give its base as `model`: its number of heads",
    ),
    "an architecture of unknown order": (
        lambda: change(torchtune(), model="bert"),
        "is a 'bert': torchtune's adapters are converted for llama",
    ),
    "gating": (
        lambda: change(
            adapter_hub(), config={"config": {"architecture": "lora", "use_gating": True}}
        ),
        "its use_gating is True, which is not supported",
    ),
    "torchtune's settings of another rank": (
        lambda: change(torchtune(), config={"r": 8, "lora_alpha": 16, "peft_type": "LORA"}),
        "lora_B is .*, 4.*its config states 8",
    ),
    "litgpt without its settings": (
        lambda: change(litgpt(), beside={}),
        "no hyperparameters.yaml beside it, which has its alpha",
    ),
    "litgpt's settings without alpha": (
        lambda: litgpt_setting("alpha: 8", "a: 8"),
        "lora_alpha in hyperparameters.yaml is missing, expected a positive integer",
    ),
    "litgpt's settings of another rank": (
        lambda: litgpt_setting("r: 4", "r: 8"),
        "lora_B is .*, 4.*its config states 8",
    ),
    "litgpt's settings of other parts": (
        lambda: litgpt_setting("key: true", "key: false"),
        r"attn.qkv has lora_A \[12, 32\] and lora_B \[64, 4\], .* need \[8, …\] and \[48, 4\]",
    ),
    "litgpt's settings without a part": (
        lambda: litgpt_setting("key: true", ""),
        "lora_key in hyperparameters.yaml is missing, expected true or false",
    ),
    "litgpt without a base": (
        lambda: change(litgpt(), needs_base=False),
        "give its base as `model`: the sizes of its query, key and value",
    ),
    "litgpt with a base of other names": (
        lambda: change(litgpt(), model="bert"),
        "is a 'bert': litgpt's adapters are converted for llama",
    ),
    "litgpt with rows in turns": (
        lambda: change(
            litgpt(),
            tensors={k.replace("qkv", "attn"): v for k, v in litgpt().tensors.items()},
        ),
        "attn.attn is of litgpt before 0.5.5, whose rows are in another order",
    ),
    "litgpt's MLP of another model": (
        lambda: change(
            litgpt(), tensors={k.replace("fc_1", "fc"): v for k, v in litgpt().tensors.items()}
        ),
        "mlp.fc is not a module of the decoders that are converted",
    ),
    "AdapterHub's settings of another rank": (
        lambda: change(
            adapter_hub_fused(),
            config={"config": {"architecture": "lora", "alpha": 8, "r": 8}},
        ),
        "lora_B is .*, 4.*its config states 8",
    ),
    "jina's settings of another rank": (
        lambda: change(jina(), config={**(jina().config or {}), "lora_rank": 8}),
        "lora_B is .*, 4.*its config states 8",
    ),
    "a header that contradicts alpha": (
        lambda: with_alpha(diffusers_header(), 4),
        "its alpha of 4 scales by 1, the config in its header by 8",
    ),
    "a header of another rank": (
        lambda: diffusers_header(r=8),
        "lora_A has 4 rows, the rank in its header is 8",
    ),
    "diffusers, several ranks without alpha": (
        lambda: diffusers_ranks(4, 8),
        "v_proj has no alpha, and the modules have ranks of 4, 8: .*takes that of another module",
    ),
    "diffusers, alpha of some modules": (
        lambda: diffusers_ranks(4, 4, alphas=1),
        "v_proj has no alpha, and 1 other modules have one",
    ),
    "a header without alpha": (
        lambda: change(diffusers_header(), header=peft_header(r=4)),
        "its header has no text_encoder.lora_alpha",
    ),
    "a header of DoRA": (
        lambda: diffusers_header(use_dora=True),
        "text_encoder.use_dora in its header is True",
    ),
    "a header with an unknown field": (
        lambda: diffusers_header(gate=2),
        "the field gate=2 is unknown",
    ),
    "a broken header": (
        lambda: change(diffusers_header(), header={"lora_adapter_metadata": "{"}),
        "lora_adapter_metadata in its header is not valid JSON",
    ),
    "kohya's alpha in the header alone": (
        lambda: change(kohya(), header={"ss_network_alpha": "1.0"}),
        "has no alpha, which means its rank of 4, but ss_network_alpha in the header is 1",
    ),
    "a header with patterns for underscores": (
        lambda: change(kohya(), header=peft_header(r=4, lora_alpha=8, alpha_pattern={"fc2": 1})),
        "patterns for names with dots",
    ),
    "a header that contradicts the settings": (
        lambda: change(state_dict(), header={"lora_alpha": "16"}),
        "lora_alpha in its header is 16, and its config gives .* alpha 8",
    ),
    "AdaLoRA by its settings": (
        lambda: change(
            state_dict(), config={**(state_dict().config or {}), "peft_type": "ADALORA"}
        ),
        "its peft_type is ADALORA, which is read as PEFT's save_pretrained writes it",
    ),
    "AdaLoRA by its singular values": (
        lambda: change(
            state_dict(),
            tensors=state_dict().tensors
            | {"base_model.model.model.layers.0.self_attn.q_proj.lora_E.sport": random(4, 1)},
        ),
        "its peft_type is ADALORA",
    ),
    "Olive's int4": (
        lambda: change(olive(), tensors=olive_int4(), file="a.onnx_adapter"),
        "quant.weight is uint8, .*give the PEFT directory that it was converted from",
    ),
    "another .onnx_adapter without its bundle": (
        lambda: change(olive(), tensors={"q.lora_A": random(8, 4)}, file="a.onnx_adapter"),
        "an adapter for one ONNX graph: .*--bundle",
    ),
    "a diffusion model": (
        lambda: change(kohya(), options=["--name", "unet"]),
        "unet is a diffusion model",
    ),
    "another base": (
        lambda: change(kohya(), model="llama"),
        "lora_te_|q_proj is not a module of",
    ),
    "a task too few": (
        lambda: change(jina(), tensors={k: v[:2] for k, v in jina().tensors.items()}),
        "a matrix for each of the 3 tasks",
    ),
    "a lower rank at once": (
        lambda: change(mlx(), options=["--rank", "2"]),
        "is an adapter of mlx-lm .*convert it",
    ),
    "a name where there is one adapter": (
        lambda: change(mlx(), options=["--name", "nosuch"]),
        "is converted without `name`: leave it out",
    ),
    "torchtune with a name": (
        lambda: change(torchtune(), options=["--name", "nosuch"]),
        "is converted without `name`: leave it out",
    ),
    "a base that is not needed": (
        lambda: change(adapter_hub(), needs_base=True),
        "is converted without `model`: leave it out",
    ),
    "PEFT's with square products and a rank above the inputs": (
        lambda: change(
            olive(),
            file="adapter_model.safetensors",
            tensors={
                "base_model.model.l.q.lora_A.weight": random(8, 4),
                "base_model.model.l.q.lora_B.weight": random(4, 8),
            },
            config={"peft_type": "LORA", "r": 8, "target_modules": ["q"]},
        ),
        "give one of `bundle`, `rank` and `model`",
    ),
    "a name for PEFT's": (
        lambda: change(
            state_dict(),
            file="adapter_model.safetensors",
            tensors={f"base_model.model.l.q.lora_{half}.weight": random(4, 4) for half in "AB"},
            options=["--name", "sport", "--model", "base"],
        ),
        "`name` is for another library's file",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_ambiguous_adapters_are_refused_by_name(what: str, tmp_path: Path) -> None:
    make, message = REFUSED[what]
    case = make()
    source = written(case, tmp_path / "theirs")
    options = list(case.options)
    if case.needs_base:
        model_of(case).save_pretrained(tmp_path / "base")  # type: ignore[operator]
        options += ["--model", str(tmp_path / "base")]
    with pytest.raises(LoraDeployError, match=message) as refusal:
        call("convert", source, "--output", tmp_path / "peft", *options)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("name", CASES)
def test_every_format_is_named_when_it_is_read_as_an_adapter(name: str, tmp_path: Path) -> None:
    source = written(CASES[name](), tmp_path / "theirs")
    with pytest.raises(LoraDeployError, match="loradeploy convert"):
        load_adapter(source)


def test_a_prediction_head_that_is_not_converted_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = written(adapter_hub(), tmp_path / "theirs")
    call("convert", source, "--output", tmp_path / "alone", "--name", "sport")
    assert not caplog.messages
    (source / "head_config.json").write_text("{}")
    call("convert", source, "--output", tmp_path / "peft", "--name", "sport")
    assert ["not the prediction head that head_config.json" in m for m in caplog.messages] == [True]


def torchtune_export(place: Path, base: str, *, dora: bool) -> Path:
    """Write a directory like torchtune's export for PEFT: few settings, and its own pickle."""
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors: Arrays = {f"{module}.lora_A.weight": random(4, 32)}
    tensors[f"{module}.lora_B.weight"] = random(32, 4)
    config = {"r": 4, "lora_alpha": 8, "peft_type": "LORA", "target_modules": ["q_proj"]}
    if dora:
        tensors[f"{module}.lora_magnitude_vector"] = random(32)
        config["use_dora"] = True
    config["base_model_name_or_path"] = base
    case = Case("llama", tensors, {}, {}, config, "adapter_model.safetensors")
    directory = written(case, place)
    (directory / "adapter_model.pt").write_bytes(b"a pickle")
    return directory


@pytest.mark.parametrize(
    ("base", "dora", "refused"),
    [
        ("Qwen/Qwen2.5-0.5B", False, True),
        ("meta-llama/Llama-3.2-1B", True, True),
        ("meta-llama/Llama-3.2-1B", False, False),
    ],
)
def test_torchtunes_export_with_misordered_rows_is_refused(
    base: str, dora: bool, refused: bool, tmp_path: Path
) -> None:
    directory = torchtune_export(tmp_path / "epoch_0", base, dora=dora)
    if refused:
        with pytest.raises(LoraDeployError, match=r"export of torchtune.* adapter_model\.pt"):
            load_adapter(directory)
        (directory / "adapter_model.pt").unlink()  # without it the export looks like PEFT's
    assert len(load_adapter(directory).factors) == 1
