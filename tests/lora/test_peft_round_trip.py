"""Adapters trained by PEFT compute the same here, and adapters trained here the same in PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from loradeploy.adapter import AdapterConfig, load_adapter, save_adapter
from loradeploy.adapter.algebra.reduce import reduce_rank
from loradeploy.adapter.files.roles import PARTS
from loradeploy.adapter.files.tensors import read_arrays
from loradeploy.errors import AdapterError, UsageError
from loradeploy.lora.inject import adapted, inject, load
from loradeploy.lora.standard import to_standard_lora
from tests.lora import tiny
from tests.tolerances import tolerance

peft = pytest.importorskip("peft")
# PEFT warns about tied embeddings and grouped convolutions.
pytestmark = pytest.mark.filterwarnings("ignore")

# By kind of layer: the model, the targets, the fully trained module, and a pattern.
KINDS: Final[dict[str, tuple[str, Any, str, str]]] = {
    "linear": ("llama", ["q_proj", "down_proj"], "lm_head", "down_proj"),
    "conv1d": ("gpt2", ["c_attn", "c_proj"], "lm_head", r"attn\.c_proj"),
    "embedding": ("llama", ["embed_tokens", "q_proj"], "lm_head", "embed_tokens"),
    "tied-embedding": ("llama-tied", ["embed_tokens", "o_proj"], "norm", "embed_tokens"),
    "conv2d": ("vit", ["projection", "q_proj"], "classifier", "projection"),
    "strided-conv2d": (
        "convnext",
        r".*(patch_embeddings|downsampling_layer\.1|pwconv1)",
        "classifier",
        "patch_embeddings",
    ),
    "grouped-conv2d": ("convnext", ["dwconv"], "classifier", "dwconv"),
}

METHODS: Final[dict[str, dict[str, Any]]] = {
    "lora": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa-dora": {"init_lora_weights": "pissa", "use_dora": True},
    "pissa-niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "bias-all": {"bias": "all"},
    "bias-lora-only": {"bias": "lora_only"},
    "lora-bias": {"lora_bias": True},
    "lora-bias-and-bias": {"lora_bias": True, "bias": "all", "use_rslora": True},
    "lora-bias-patterns": {"lora_bias": True, "alpha_pattern": {...: 3}, "rank_pattern": {...: 8}},
    "modules-to-save": {"modules_to_save": [...]},
    "whole-and-bias": {"modules_to_save": [...], "bias": "all"},
    "patterns": {"rank_pattern": {...: 8}, "alpha_pattern": {...: 3}},
    "patterns-rslora-dora": {"rank_pattern": {...: 8}, "use_rslora": True, "use_dora": True},
    "layers": {"layers_to_transform": [1]},
}

# Combinations that PEFT does not support: it does not decompose these weights (PiSSA, OLoRA), its
# norm for grouped convolutions has no meaning, and image models have no layer numbers.
_CHANGING: Final = ("pissa", "pissa-rslora", "pissa-dora", "pissa-niter", "olora")
_BIASED: Final = ("lora-bias", "lora-bias-and-bias", "lora-bias-patterns")
_GROUPED: Final = ("dora", "dora-rslora", "patterns-rslora-dora")
UNDEFINED: Final = {
    **{
        (kind, method): "PEFT begins so at linear layers only"
        for kind in KINDS
        if kind not in ("linear", "conv1d")
        for method in _CHANGING
    },
    **{
        (kind, method): "PEFT's embeddings have no lora_bias"
        for kind in ("embedding", "tied-embedding")
        for method in _BIASED
    },
    ("conv1d", "olora"): "PEFT's OLoRA confuses the sides of a Conv1D's weight",
    **{("grouped-conv2d", method): "the norm has no meaning" for method in _GROUPED},
    **{(kind, "layers"): "no layer numbers" for kind in ("strided-conv2d", "grouped-conv2d")},
}

TABLE: Final = [(k, m) for k in KINDS for m in METHODS if (k, m) not in UNDEFINED]


def fields(kind: str, method: str) -> dict[str, Any]:
    """Return the configuration of `method` for the layers of `kind`."""
    _, targets, whole, pattern = KINDS[kind]
    values: dict[str, Any] = {"r": 16 if kind == "grouped-conv2d" else 4, "lora_alpha": 8}
    values["target_modules"] = targets
    for name, value in METHODS[method].items():
        if value == [...]:
            values[name] = [whole]
        elif isinstance(value, dict):
            many = 2 if kind == "grouped-conv2d" and name == "rank_pattern" else 1
            (number,) = value.values()
            values[name] = {pattern: many * number}
        else:
            values[name] = value
    return values


def trained_by_peft(kind: str, method: str, place: Path) -> torch.Tensor:
    """Train and save an adapter by PEFT in `place`; return its logits in PEFT."""
    name = KINDS[kind][0]
    torch.manual_seed(1)
    options = fields(kind, method)
    options["fan_in_fan_out"] = name == "gpt2"
    theirs = peft.get_peft_model(tiny.model(name), peft.LoraConfig(**options))
    tiny.train(theirs, name, (p for p in theirs.parameters() if p.requires_grad))
    theirs.save_pretrained(place)
    return tiny.logits(theirs, name)


def without_blanks(config: Path) -> dict[str, Any]:
    """Return the fields of `config` without empty ones, with sorted targets."""
    values = json.loads((config / "adapter_config.json").read_text())
    return {
        name: sorted(value) if name == "target_modules" and isinstance(value, list) else value
        for name, value in values.items()
        if value not in (None, False, {}, [])
    }


@pytest.mark.breadth(2)
@pytest.mark.parametrize(("kind", "method"), TABLE)
def test_an_adapter_trained_by_peft_gives_pefts_logits(
    kind: str, method: str, tmp_path: Path
) -> None:
    theirs = trained_by_peft(kind, method, tmp_path / "theirs")
    name = KINDS[kind][0]
    base = tiny.model(name)
    before = tiny.logits(base, name)
    adapter = load_adapter(tmp_path / "theirs")
    if method == "pissa-niter":
        with pytest.raises(AdapterError, match="random approximation that was not saved"):
            to_standard_lora(adapter, base)
        return
    if method in _CHANGING:
        with pytest.raises(AdapterError, match="loradeploy convert ADAPTER --model"):
            load(base, adapter)
    with adapted(base, to_standard_lora(adapter, base)):
        ours = tiny.logits(base, name)

    assert tiny.difference(ours, theirs) <= tolerance("same-torch")
    assert tiny.difference(ours, before) > 100 * tolerance("same-torch"), "it does nothing"
    assert torch.equal(tiny.logits(base, name), before)


@pytest.mark.breadth(2)
@pytest.mark.parametrize(("kind", "method"), TABLE)
def test_an_adapter_trained_here_gives_the_same_logits_in_peft(
    kind: str, method: str, tmp_path: Path
) -> None:
    name = KINDS[kind][0]
    base = tiny.model(name)
    before = tiny.logits(base, name)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields(kind, method).items()}
    injection = inject(base, AdapterConfig(**values), seed=1)
    assert tiny.difference(tiny.logits(base, name), before) <= tolerance("same-torch")
    tiny.train(base, name, injection.parameters())
    ours = tiny.logits(base, name)
    save_adapter(injection.adapter(), tmp_path / "ours")

    theirs = peft.PeftModel.from_pretrained(tiny.model(name), tmp_path / "ours")
    assert tiny.difference(ours, tiny.logits(theirs, name)) <= tolerance("same-torch")
    assert tiny.difference(ours, before) > 100 * tolerance("same-torch"), "it does nothing"
    again = tiny.model(name)
    with adapted(again, load_adapter(tmp_path / "ours")):
        assert tiny.difference(ours, tiny.logits(again, name)) <= tolerance("same-torch")


@pytest.mark.breadth(2)
@pytest.mark.parametrize(("kind", "method"), TABLE)
def test_no_field_and_no_tensor_of_peft_is_lost(kind: str, method: str, tmp_path: Path) -> None:
    trained_by_peft(kind, method, tmp_path / "theirs")
    save_adapter(load_adapter(tmp_path / "theirs"), tmp_path / "ours")

    assert without_blanks(tmp_path / "ours") == without_blanks(tmp_path / "theirs")
    before, after = (
        read_arrays(tmp_path / side / "adapter_model.safetensors", error=AdapterError)[0]
        for side in ("theirs", "ours")
    )
    copies = {key for key in before if key.endswith("original_module.bias")}
    copies |= {key for key in before if ".modules_to_save." in key}
    assert set(before) - set(after) == copies
    for key, values in after.items():
        assert before[key].shape == values.shape
        assert (before[key] == values).all(), key


@pytest.mark.breadth(2)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("method", ["lora", "dora", "bias-all", "dora-rslora", "lora-bias"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "conv2d", "strided-conv2d"])
def test_the_gradients_are_pefts(kind: str, method: str, dropout: float, tmp_path: Path) -> None:
    if (kind, method) in UNDEFINED:
        pytest.skip(UNDEFINED[kind, method])
    trained_by_peft(kind, method, tmp_path / "theirs")
    config = tmp_path / "theirs" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_dropout": dropout}))
    name = KINDS[kind][0]
    theirs = peft.PeftModel.from_pretrained(
        tiny.model(name), tmp_path / "theirs", is_trainable=True
    )
    base = tiny.model(name)
    injection = load(base, load_adapter(tmp_path / "theirs"))
    for net in (theirs, base):
        net.train()
        torch.manual_seed(5)  # the same dropout mask
        tiny.loss(net, name).backward()

    expected = {
        n.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    ours: dict[str, Any] = {}
    for module, layer in injection.layers.items():
        half_A, half_B = PARTS[layer.kind]
        ours[f"{module}.{half_A}"], ours[f"{module}.{half_B}"] = layer.lora_A, layer.lora_B
        if layer.magnitude is not None:
            ours[f"{module}.lora_magnitude_vector.weight"] = layer.magnitude
        if layer.lora_bias is not None:
            ours[f"{module}.lora_B.bias"] = layer.lora_bias
    for parameter, values in injection.saved.items():
        module = parameter.removesuffix(".bias")
        ours[f"{module}.base_layer.bias" if module in injection.layers else parameter] = values
    assert ours.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        found = ours[key].grad.view_as(gradient)
        assert tiny.difference(found, gradient) <= tolerance("same-torch"), key


@pytest.mark.parametrize(
    "method", ["lora", "dora", "dora-rslora", "pissa", "bias-all", "lora-bias-and-bias"]
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grouped-conv2d"])
def test_a_merge_computes_the_same_and_unmerging_is_exact(kind: str, method: str) -> None:
    if method in _BIASED and (kind, method) in UNDEFINED:
        pytest.skip(UNDEFINED[kind, method])
    name = KINDS[kind][0]
    base = tiny.model(name)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields(kind, method).items()}
    injection = inject(base, AdapterConfig(**values), seed=1)
    tiny.train(base, name, injection.parameters())
    beside = tiny.logits(base, name)
    injection.merge()
    assert tiny.difference(tiny.logits(base, name), beside) <= tolerance("same-torch")

    injection.unmerge()
    assert torch.equal(tiny.logits(base, name), beside)
    injection.remove()
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_grouped_convolutions_cannot_be_merged(tmp_path: Path) -> None:
    trained_by_peft("grouped-conv2d", "lora", tmp_path)
    base = tiny.model("convnext")
    injection = load(base, load_adapter(tmp_path))
    with pytest.raises(UsageError, match=r"cannot be merged: .*dwconv is a convolution of 8 gr"):
        injection.merge()


@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("trainer", ["peft", "here"])
def test_a_fully_trained_tied_weight_is_untied_as_in_peft(
    trainer: str, whole: list[str], tmp_path: Path
) -> None:
    name, fields = "llama-tied", {"r": 4, "target_modules": ["o_proj"], "modules_to_save": whole}
    base = tiny.model(name)
    before = tiny.logits(base, name)
    if trainer == "peft":
        model = peft.get_peft_model(base, peft.LoraConfig(**fields))
        tiny.train(model, name, (p for p in model.parameters() if p.requires_grad))
        trained = tiny.logits(model, name)
        model.save_pretrained(tmp_path)
        again = tiny.model(name)
        with adapted(again, load_adapter(tmp_path)):
            found = tiny.logits(again, name)
        assert again.lm_head.weight is again.model.embed_tokens.weight
    else:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        injection = inject(base, AdapterConfig(**values), seed=1)
        tiny.train(base, name, injection.parameters())
        trained = tiny.logits(base, name)
        save_adapter(injection.adapter(), tmp_path)
        found = tiny.logits(peft.PeftModel.from_pretrained(tiny.model(name), tmp_path), name)
    assert tiny.difference(trained, found) <= tolerance("same-torch")
    assert tiny.difference(trained, before) > 0.1


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "patterns"])
@pytest.mark.parametrize("kind", ["linear", "tied-embedding", "strided-conv2d"])
def test_an_adapter_with_a_rank_per_module_is_read_by_peft(
    kind: str, method: str, tmp_path: Path
) -> None:
    name = KINDS[kind][0]
    trained_by_peft(kind, method, tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs")
    lower = (reduce_rank(adapter, energy=part / 50) for part in range(25, 50))
    reduced = next(made for made, report in lower if len(set(report.ranks.values())) > 1)
    save_adapter(reduced, tmp_path / "ours")
    base = tiny.model(name)
    before = tiny.logits(base, name)
    with adapted(base, reduced):
        ours = tiny.logits(base, name)
    theirs = peft.PeftModel.from_pretrained(tiny.model(name), tmp_path / "ours")
    assert tiny.difference(ours, tiny.logits(theirs, name)) <= tolerance("same-torch")
    assert tiny.difference(ours, before) > 100 * tolerance("same-torch"), "it does nothing"
