"""PEFT's whole configuration space: the same logits as PEFT from the same directory, or a refusal.

FIELDS has a decision for every field of `peft.LoraConfig`. A release of PEFT with a new field fails
here until someone has decided how it affects the results of a trained adapter.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from loradeploy.adapter import AdapterConfig, load_adapter, save_adapter
from loradeploy.errors import AdapterError
from loradeploy.lora.inject import adapted
from tests.lora import tiny
from tests.tolerances import tolerance

# PEFT warns about tied embeddings.
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclasses.dataclass(frozen=True)
class Tried:
    """Values with which adapters are trained, saved and loaded by both, or values per model."""

    values: tuple[Any, ...] = ()
    by_model: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    def on(self, model: str) -> tuple[Any, ...]:
        return self.by_model.get(model, self.values)


@dataclasses.dataclass(frozen=True)
class Neutral:
    """A field about the training or origin of an adapter; `value` is read and kept."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Refused:
    """A field that affects results in an unsupported way: `value` is refused by name."""

    value: Any


LLAMAS: Final = ("llama", "llama-tied")
MODELS: Final = (*LLAMAS, "gpt2", "bert")


def on(llama: tuple[Any, ...], gpt2: tuple[Any, ...], bert: tuple[Any, ...]) -> Tried:
    return Tried(by_model={**dict.fromkeys(LLAMAS, llama), "gpt2": gpt2, "bert": bert})


FIELDS: Final[Mapping[str, Tried | Neutral | Refused]] = {
    "peft_type": Refused("IA3"),
    "task_type": on((None, "CAUSAL_LM"), (None, "CAUSAL_LM"), ("SEQ_CLS", None)),
    "auto_mapping": Neutral({"base_model_class": "LlamaForCausalLM"}),
    "peft_version": Neutral("0.21.2"),
    "base_model_name_or_path": Neutral("somebody/base"),
    "revision": Neutral("main"),
    "inference_mode": Neutral(True),
    "r": Tried((4, 1)),
    "target_modules": on(
        (
            ["q_proj", "v_proj"],
            r".*\.(self_attn\.o_proj|mlp\.down_proj)",
            "all-linear",
            ["model.layers.1.self_attn.k_proj", "gate_proj"],
            ["q_proj", "embed_tokens"],
            ["q_proj", "lm_head"],
            ["embed_tokens", "lm_head", "up_proj"],
        ),
        (["c_attn"], r".*\.c_(attn|fc)", "all-linear", ["c_fc", "wte"], ["c_attn", "lm_head"]),
        (["query", "value"], "all-linear", ["query", "word_embeddings"], ["pooler.dense", "key"]),
    ),
    "exclude_modules": on(
        (None, ["model.layers.0.self_attn.q_proj"], r".*layers\.1\..*"),
        (None, ["transformer.h.0.attn.c_attn"], r".*h\.1\..*"),
        (None, r".*layer\.1\..*"),
    ),
    "lora_alpha": Tried((8, 3.5)),
    "lora_dropout": Tried((0.0, 0.5)),
    "fan_in_fan_out": on((False,), (True, False), (False,)),
    "bias": Tried(("none", "all", "lora_only")),
    "use_rslora": Tried((False, True)),
    "modules_to_save": on(
        (
            None,
            ["norm"],
            ["model.norm"],
            ["embed_tokens"],
            ["lm_head"],
            ["embed_tokens", "lm_head"],
        ),
        (None, ["ln_f"], ["wte"], ["lm_head"]),
        (None, ["classifier"], ["pooler"], ["LayerNorm", "classifier"]),
    ),
    "init_lora_weights": Tried((True, False, "gaussian", "orthogonal", "pissa", "olora", "mica")),
    "layers_to_transform": Tried((None, 1, [0])),
    "layers_pattern": on((None, "layers", ["layers"]), (None, "h"), (None, "layer")),
    "rank_pattern": on(
        ({}, {"q_proj": 2}, {r"model\.layers\.0\..*": 6}, {"embed_tokens": 3}),
        ({}, {"c_attn": 2}, {r"^transformer.h.1.attn.c_attn": 6}),
        ({}, {"query": 2}),
    ),
    "alpha_pattern": on(
        ({}, {"q_proj": 16}, {r"layers\.1\..*": 5.5}),
        ({}, {"c_attn": 16}, {r"h\.1\..*": 5.5}),
        ({}, {r"layer\.1\..*": 5.5}),
    ),
    "megatron_config": Refused({"tensor_model_parallel_size": 2}),
    "megatron_core": Neutral("megatron.core"),
    "trainable_token_indices": on(
        (None, [3, 5], {"embed_tokens": [7, 4, 9]}, {"embed_tokens": [3], "lm_head": [5, 6]}),
        (None, [3, 5], {"wte": [7, 4]}),
        (None, [3, 5]),
    ),
    "loftq_config": Neutral({"loftq_bits": 4}),
    "eva_config": Neutral({"rho": 2.0}),
    "corda_config": Neutral({"corda_method": "ipm"}),
    "lora_ga_config": Neutral({"direction": "ArB2r"}),
    "use_dora": Tried((False, True)),
    "velora_config": Neutral({"num_groups": 4}),
    "alora_invocation_tokens": Refused([1, 2]),
    "use_qalora": Refused(True),
    "qalora_group_size": Neutral(16),
    "monteclora_config": Refused({"num_samples": 4}),
    "layer_replication": Refused([[0, 2], [0, 2]]),
    "runtime_config": Neutral({"ephemeral_gpu_offload": True}),
    "lora_bias": Tried((False, True)),
    # No model here has experts: tests/export/passes/side_inputs/test_experts.py.
    "target_parameters": Neutral(["experts.gate_up_proj"]),
    "use_bdlora": Refused({"nblocks": 2}),
    "arrow_config": Refused({"top_k": 2}),
    "kasa_config": Refused({"beta": 1e-4}),
    "ensure_weight_tying": Tried((False, True)),
}

# Methods that modify the base; adapters of them are converted with the base first.
CHANGES_BASE: Final = ("pissa", "olora")
SAMPLES: Final = 20


def of(kind: type) -> list[str]:
    return [name for name, decision in FIELDS.items() if isinstance(decision, kind)]


def configurations(model: str) -> list[dict[str, Any]]:
    """Return every value once with defaults, then a seeded sample of combinations of all values."""
    tried = {name: d.on(model) for name, d in FIELDS.items() if isinstance(d, Tried)}
    first = {name: values[0] for name, values in tried.items()}
    found = [first]
    found += [{**first, name: value} for name, values in tried.items() for value in values[1:]]
    dice = random.Random(model)
    for _ in range(SAMPLES):
        changed = dice.sample(sorted(tried), 6)
        found.append({**first, **{name: dice.choice(tried[name]) for name in changed}})
    for values in found:
        if isinstance(values["target_modules"], str):
            values["layers_to_transform"] = None  # PEFT accepts it only with lists
        if values["layers_to_transform"] is None:
            values["layers_pattern"] = None
    return [values for n, values in enumerate(found) if values not in found[:n]]


CASES: Final = [
    pytest.param(model, values, id=f"{model}-{number}")
    for model in MODELS
    for number, values in enumerate(configurations(model))
]


def trained(model: str, values: Mapping[str, Any], place: Path) -> None:
    """Write a PEFT adapter with random trained values; skip configurations that PEFT refuses."""
    try:
        made = peft.get_peft_model(
            tiny.model(model), peft.LoraConfig(**json.loads(json.dumps(values)))
        )
    except (ValueError, TypeError, NotImplementedError, KeyError, AssertionError) as problem:
        pytest.skip(f"PEFT itself refuses it: {problem}")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad:
                size = 0.05 if "magnitude" in name or "lora_" not in name else 0.3
                parameter.add_(torch.randn_like(parameter) * size)
    made.save_pretrained(place)


def test_every_field_has_a_decision() -> None:
    assert set(FIELDS) == {field.name for field in dataclasses.fields(peft.LoraConfig)}


@pytest.mark.parametrize("name", of(Neutral))
def test_a_field_about_training_is_kept(name: str) -> None:
    value = FIELDS[name].value  # type: ignore[union-attr]
    config = AdapterConfig.from_peft({"r": 4, "target_modules": ["q"], name: value})
    assert config.to_peft()[name] == value


@pytest.mark.parametrize("name", of(Refused))
def test_a_field_that_is_not_supported_is_refused_by_name(name: str) -> None:
    value = FIELDS[name].value  # type: ignore[union-attr]
    with pytest.raises(AdapterError, match=name):
        AdapterConfig.from_peft({"r": 4, "target_modules": ["q"], name: value})


@pytest.mark.breadth
@pytest.mark.parametrize(("model", "values"), CASES)
def test_the_logits_are_pefts_or_the_adapter_is_refused(
    model: str, values: dict[str, Any], tmp_path: Path
) -> None:
    trained(model, values, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.model(model), tmp_path)
    try:
        expected = tiny.logits(theirs, model)
    except (ValueError, RuntimeError) as problem:
        pytest.skip(f"PEFT itself cannot run it: {problem}")
    base = tiny.model(model)
    before = tiny.logits(base, model)
    try:
        adapter = load_adapter(tmp_path)
        with adapted(base, adapter):
            ours = tiny.logits(base, model)
    except AdapterError as refusal:
        tokens = values["trainable_token_indices"]
        untied = model == "llama-tied" and isinstance(tokens, dict) and len(tokens) > 1
        assert values["init_lora_weights"] in CHANGES_BASE or untied, refusal
        return
    assert tiny.difference(ours, expected) <= tolerance("same-torch")
    assert tiny.difference(ours, before) > 0.01, "it does nothing"
    assert torch.equal(tiny.logits(base, model), before)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": r".*(q_proj|embed_tokens)"},
        {"target_modules": ["q_proj", "embed_tokens"], "exclude_modules": ["lm_head"]},
    ],
    ids=["the embedding", "the head", "both", "an expression", "the head left out"],
)
def test_factors_of_an_embedding_apply_to_its_head_where_peft_ties_them(
    options: dict[str, Any], tmp_path: Path
) -> None:
    first = {name: d.on("llama")[0] for name, d in FIELDS.items() if isinstance(d, Tried)}
    trained(
        "llama-tied",
        {**first, **options, "ensure_weight_tying": True},
        tmp_path / "a",
    )
    expected = tiny.logits(
        peft.PeftModel.from_pretrained(tiny.model("llama-tied"), tmp_path / "a"), "llama-tied"
    )
    adapter = load_adapter(tmp_path / "a")
    assert {"model.embed_tokens", "lm_head"} <= adapter.factors.keys()
    base = tiny.model("llama-tied")
    before = tiny.logits(base, "llama-tied")
    with adapted(base, adapter):
        ours = tiny.logits(base, "llama-tied")
    assert tiny.difference(ours, expected) <= tolerance("same-torch")
    assert tiny.difference(ours, before) > 0.01, "it does nothing"
    assert save_adapter(adapter, tmp_path / "b") == load_adapter(tmp_path / "b").digest
    again = peft.PeftModel.from_pretrained(tiny.model("llama-tied"), tmp_path / "b")
    assert tiny.difference(tiny.logits(again, "llama-tied"), expected) <= tolerance("same-torch")


def test_other_factors_of_a_head_that_is_not_a_target_are_refused(tmp_path: Path) -> None:
    first = {name: d.on("llama")[0] for name, d in FIELDS.items() if isinstance(d, Tried)}
    values = {**first, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    trained("llama-tied", values, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.lora_B.weight"] *= 2
    save_file(tensors, file)
    with pytest.raises(AdapterError, match="lm_head: the file has factors, and target_modules"):
        load_adapter(tmp_path)
