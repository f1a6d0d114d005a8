"""Error messages are one line that names the first wrong item and counts the others.

An adapter of a thousand modules is broken in many ways and given to everything that takes adapters.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import loradeploy as ld
from loradeploy.adapter import Adapter, AdapterConfig, Factors, load_adapter
from loradeploy.adapter.files.peft import WEIGHTS_NAME
from loradeploy.adapter.files.tensors import write_arrays
from loradeploy.bundle.adapter_inputs.factors import check_side_inputs, side_inputs
from loradeploy.bundle.manifest import BaseIdentity, LoraTarget, Manifest
from loradeploy.errors import (
    AdapterMismatchError,
    LoraDeployError,
    ModelError,
    OutputError,
    first_line,
    listed,
    listed_names,
    prefixing_errors,
    shortened,
)
from loradeploy.export.match.linears import Linear, find_linears
from loradeploy.export.merge import merge_adapter
from tests.export.graphs import Builder

LONGEST = 320  # characters of a message, without paths
COUNT, SIZE, RANK = 1000, 4, 2
MODULES = [f"model.layers.{i}.self_attn.projection_of_queries_and_keys" for i in range(COUNT)]
PREFIX = "base_model.model."
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": 4,
    "target_modules": ["projection_of_queries_and_keys"],
}

Tensors = dict[str, np.ndarray[Any, Any]]


def ones(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


def good() -> Tensors:
    tensors = {}
    for module in MODULES:
        tensors[f"{PREFIX}{module}.lora_A.weight"] = ones(RANK, SIZE)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = ones(SIZE, RANK)
    return tensors


def one_refusal(refused: Callable[[], object], *, place: Path | None = None) -> str:
    """Call `refused` and return the message of its error, which must be one short readable line."""
    with pytest.raises(LoraDeployError) as refusal:
        refused()
    message = str(refusal.value).replace(str(place), "")
    assert "\n" not in message
    assert len(message) <= LONGEST, message
    return message


# -- read from disk ------------------------------------------------------------------------------


def nan(tensors: Tensors) -> None:
    for values in tensors.values():
        values[:] = np.nan


def integers(tensors: Tensors) -> None:
    for key in tensors:
        tensors[key] = tensors[key].astype(np.int32)


def halves(tensors: Tensors) -> None:
    for module in MODULES:
        del tensors[f"{PREFIX}{module}.lora_A.weight"]


def weights(tensors: Tensors) -> None:
    tensors.update({f"{PREFIX}{module}.weight": ones(SIZE, SIZE) for module in MODULES})


def ranks(tensors: Tensors) -> None:
    tensors.update({f"{PREFIX}{module}.lora_A.weight": ones(7, SIZE) for module in MODULES})


def vectors(tensors: Tensors) -> None:
    tensors.update({f"{PREFIX}{module}.lora_A.weight": ones(SIZE) for module in MODULES})


def empty(tensors: Tensors) -> None:
    tensors.update({key: ones(0) for key in tensors})


def names(tensors: Tensors) -> None:
    for key in list(tensors):
        for name in ("sport", "tech"):
            tensors[key.replace(".weight", f".{name}.weight")] = tensors[key]
        del tensors[key]


def magnitudes(tensors: Tensors) -> None:
    tensors.update({f"{PREFIX}{module}.lora_magnitude_vector": ones(SIZE) for module in MODULES})


def biases_of_factors(tensors: Tensors) -> None:
    tensors.update({f"{PREFIX}{module}.lora_B.bias": ones(SIZE) for module in MODULES})


def nothing_of_lora(tensors: Tensors) -> None:
    tensors.clear()
    weights(tensors)


@pytest.mark.parametrize(
    ("spoil", "offender"),
    [
        (nan, MODULES[0]),
        (integers, MODULES[0]),
        (halves, MODULES[0]),
        (weights, MODULES[0]),
        (ranks, MODULES[0]),
        (vectors, MODULES[0]),
        (empty, MODULES[0]),
        (names, "sport"),
        (magnitudes, MODULES[0]),
        (biases_of_factors, MODULES[0]),
        (nothing_of_lora, MODULES[0]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_tensors_are_reported_by_the_first_one(
    spoil: Callable[[Tensors], None], offender: str, tmp_path: Path
) -> None:
    tensors = good()
    spoil(tensors)
    write_arrays(tmp_path / WEIGHTS_NAME, tensors, {})
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert offender in one_refusal(lambda: load_adapter(tmp_path), place=tmp_path)
    one_refusal(lambda: ld.combine({str(tmp_path): 1.0}), place=tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"peft_type": "X" * 5000},
        {"target_modules": [*MODULES, 1]},
        {"target_modules": "(" * 4000},
        {"target_modules": "a" * 5000},
        {"exclude_modules": [None] * COUNT},
        {"rank_pattern": dict.fromkeys(MODULES, 0)},
        {"alpha_pattern": dict.fromkeys(MODULES, "1")},
        {"layers_to_transform": ["0"] * COUNT},
        {"modules_to_save": [1] * COUNT},
        {"init_lora_weights": "loftq" * COUNT},
        {"bias": MODULES},
        {"use_dora": MODULES},
        {"r": MODULES},
        {"lora_alpha": "1" * 5000},
        {"task_type": MODULES},
        {"use_qalora": MODULES},
        {"target_parameters": [*MODULES, 1]},
        {"layer_replication": [[0, 1]] * COUNT},
        {"a_field_of_tomorrow": MODULES},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_field_of_thousands_of_characters_is_reported_by_its_beginning(
    fields: dict[str, Any],
) -> None:
    message = one_refusal(lambda: AdapterConfig.from_peft({**CONFIG, **fields}))
    assert next(iter(fields)) in message


# -- compared with a model -----------------------------------------------------------------------


def adapter_of(
    size: int = SIZE, out: int = SIZE, modules: list[str] | None = None, **changes: Any
) -> Adapter:
    pair = Factors(ones(RANK, size), ones(out, RANK))
    config = AdapterConfig.from_peft({**CONFIG, **changes.pop("config", {})})
    return Adapter(config, dict.fromkeys(MODULES if modules is None else modules, pair), **changes)


def of_kind(kind: Any, *more: int) -> Adapter:
    last = (1,) * len(more)
    pair = Factors(ones(RANK, SIZE, *more), ones(SIZE, RANK, *last), kind=kind)
    return dataclasses.replace(adapter_of(), factors=dict.fromkeys(MODULES, pair))


def with_dora() -> Adapter:
    pair = Factors(ones(RANK, SIZE), ones(SIZE, RANK), ones(SIZE))
    config = AdapterConfig.from_peft({**CONFIG, "use_dora": True})
    return Adapter(config, dict.fromkeys(MODULES, pair))


def with_saved(ending: str, *shape: int, **config: Any) -> Adapter:
    saved = {f"{module}_head.{ending}": ones(*shape) for module in MODULES}
    return adapter_of(saved=saved, config=config)


MISFITS: dict[str, Callable[[], Adapter]] = {
    "other inputs": lambda: adapter_of(size=9),
    "other outputs": lambda: adapter_of(out=9),
    "other modules": lambda: adapter_of(
        modules=[f"{m}.other" for m in MODULES],
        config={"base_model_name_or_path": "somebody/a-model-with-a-rather-long-name-of-its-own"},
    ),
    "one module": lambda: adapter_of(modules=MODULES[:1]),
    "embeddings": lambda: of_kind("embedding"),
    "convolutions": lambda: of_kind("conv2d", 3, 3),
    "whole modules": lambda: with_saved("weight", 3, 3, modules_to_save=["_head"]),
    "biases": lambda: with_saved("bias", 3, bias="all"),
    "initialized": lambda: adapter_of(config={"init_lora_weights": "olora"}),
}
BASE = BaseIdentity("somebody/base", "sha256:" + "a" * 64, "checkpoint")


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """The manifest of a bundle with a target for each of the modules."""
    targets = [
        LoraTarget(m, SIZE, SIZE, f"{m}.lora_A", f"{m}.lora_B", f"{m}.weight", True, "checkpoint")
        for m in MODULES
    ]
    return Manifest("causal-lm", "side-inputs", BASE, "fp32", 23, (), (), targets=tuple(targets))


@pytest.fixture(scope="module")
def graph() -> tuple[ir.Model, dict[str, Linear]]:
    """A graph of all the modules in sequence."""
    model = chain(MODULES)
    return model, dict(find_linears(model).linears)


def chain(modules: list[str] | None) -> ir.Model:
    b = Builder()
    x = b.input("x", ["batch", "sequence", SIZE])
    for i in range(COUNT):
        shape: list[int | str] = ["batch", "sequence", SIZE]
        module = None if modules is None else modules[i]
        x = b.node("MatMul", [x, b.weight(f"w{i}", SIZE, SIZE)], shape, module=module, name=f"y{i}")
    return b.model(x)


@pytest.fixture(scope="module")
def torch_model() -> Iterator[Any]:
    """A PyTorch model of all the modules."""
    import torch

    layer = torch.nn.ModuleDict
    layers = [
        layer(
            {
                "self_attn": layer(
                    {"projection_of_queries_and_keys": torch.nn.Linear(SIZE, SIZE, bias=False)}
                )
            }
        )
        for _ in range(COUNT)
    ]
    yield layer({"model": layer({"layers": torch.nn.ModuleList(layers)})})


@pytest.mark.parametrize("misfit", [*MISFITS, "DoRA", "another base"])
def test_the_refusal_of_side_inputs_names_the_first_module_that_does_not_fit(
    misfit: str, manifest: Manifest
) -> None:
    more = {
        "DoRA": with_dora,
        "another base": lambda: adapter_of(
            base_digest="sha256:" + "b" * 64, config={"base_model_name_or_path": "x" * 500}
        ),
    }
    adapter = {**MISFITS, **more}[misfit]()
    one_refusal(lambda: side_inputs(adapter, manifest))


def test_the_refusal_of_native_side_inputs_names_the_first_module_that_does_not_fit(
    manifest: Manifest,
) -> None:
    arrays = {f"{m}.lora_A": ones(1, 9, RANK) for m in MODULES}
    one_refusal(lambda: check_side_inputs(arrays, manifest))
    others = {f"{m}.other": ones(1, 9, RANK) for m in MODULES}
    one_refusal(lambda: check_side_inputs(others, manifest))


@pytest.mark.parametrize("misfit", [m for m in MISFITS if m != "one module"])
def test_the_refusal_of_a_merge_names_the_first_module_that_does_not_fit(
    misfit: str, graph: tuple[ir.Model, dict[str, Linear]]
) -> None:
    model, linears = graph
    one_refusal(lambda: merge_adapter(model, linears, MISFITS[misfit]()))


@pytest.mark.parametrize("misfit", MISFITS)
def test_the_refusal_of_an_injection_in_pytorch_names_the_first_module_that_does_not_fit(
    misfit: str, torch_model: Any
) -> None:
    from loradeploy.lora.inject import load

    one_refusal(lambda: load(torch_model, MISFITS[misfit]()))


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_adapters_that_cannot_be_combined_are_reported_by_the_first_module(method: str) -> None:
    for other in (adapter_of(size=9), with_dora(), adapter_of(base_digest="sha256:" + "b" * 64)):
        one = adapter_of(base_digest="sha256:" + "a" * 64)
        one_refusal(lambda one=one, other=other: ld.combine({one: 1.0, other: 1.0}, method))  # type: ignore[misc]


# -- graphs and checkpoints ----------------------------------------------------------------------


def test_products_without_a_module_are_reported_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ir.save(chain(None), tmp_path / "m.onnx")
    with caplog.at_level(logging.WARNING, logger="loradeploy"):
        message = one_refusal(
            lambda: ld.export(tmp_path / "m.onnx", tmp_path / "b", task="feature-extraction"),
            place=tmp_path,
        )
    assert "y0" in message
    (record,) = caplog.records
    assert "y0" in record.getMessage() and "more" in record.getMessage()
    assert len(record.getMessage()) <= LONGEST


def test_weights_missing_from_a_checkpoint_are_reported_by_the_first(tmp_path: Path) -> None:
    import transformers

    from loradeploy.export.trace import load_model

    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=100,
        vocab_size=16,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    write_arrays(tmp_path / "model.safetensors", {"lm_head.weight": ones(16, 8)}, {"format": "pt"})
    message = one_refusal(lambda: load_model(tmp_path, "causal-lm"), place=tmp_path)
    assert "model.embed_tokens.weight" in message and "more" in message


# -- wording -------------------------------------------------------------------------------------


def test_lists_begin_with_the_first_and_count_the_others() -> None:
    assert listed_names("abc") == "a, b, c"
    assert listed_names([]) == "none"
    assert listed_names(MODULES[:1]) == MODULES[0]
    assert listed_names(MODULES).startswith(f"{MODULES[0]}, ")
    assert listed_names(MODULES).endswith(" more")
    assert listed(["a is b", "c is d"]) == "a is b; c is d"
    assert listed(["x" * 200, "y" * 200]) == f"{'x' * 200}; and 1 more"
    for text in (
        listed(["z" * 9000] * 9),
        listed_names(MODULES),
        first_line(ValueError("z" * 9000)),
    ):
        assert len(text) <= 260
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefghi", 6) == "abc…hi"


def test_the_line_of_another_library_has_no_colors() -> None:
    assert first_line(ValueError("\x1b[31mwrong\x1b[0m\nadvice")) == "wrong"


def test_an_error_is_prefixed_with_the_name_of_its_adapter_and_keeps_its_class(
    tmp_path: Path,
) -> None:
    with (
        pytest.raises(AdapterMismatchError, match=r"^sport: it does not fit$") as caught,
        prefixing_errors("sport"),
    ):
        raise AdapterMismatchError("it does not fit")
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    with pytest.raises(ModelError, match=r"^broken$"), prefixing_errors("sport"):
        raise ModelError("broken")
    full = OutputError(tmp_path / "a", "the disk is full", 28)
    with pytest.raises(OutputError) as found, prefixing_errors("sport", LoraDeployError):
        raise full
    assert found.value is full, "its message is about a file"
