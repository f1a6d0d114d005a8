"""Adapters with another vocabulary than the base, merged as PEFT merges them.

The reference is PEFT: `resize_token_embeddings`, load the adapter, `merge_and_unload`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import loradeploy as ld
from loradeploy.adapter.fitting.fit import MOST_ROWS
from loradeploy.errors import AdapterError, LoraDeployError
from loradeploy.export.files.texts import without_lost_ids
from loradeploy.export.graph.edit import constant_of, set_constant
from loradeploy.parity.report.results import ParityReport
from tests.export.adapters.vocabularies import BASE, CASES, WORDS, ids_of, resized
from tests.export.reference import difference, onnx_output
from tests.lora import tiny
from tests.parity.spoil import spoiled
from tests.runtime.feeds import feeds
from tests.tolerances import tolerance


@pytest.mark.parametrize("name", CASES)
def test_a_merged_bundle_has_the_adapters_vocabulary(
    name: str,
    bases: dict[str, tuple[Path, Path]],
    adapter_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    case, adapter = CASES[name], adapter_of(name)
    bundle = bases[case.model][1]
    manifest = ld.export(bundle, tmp_path / "m", adapters={"a": adapter}, merge=True)
    expected = np.load(adapter / "expected.npy")
    found = onnx_output(tmp_path / "m", ids_of(case))
    assert found.shape == expected.shape == (1, ids_of(case).size, case.size)
    assert difference(found, expected) <= tolerance("torch-onnx-tiny")
    known = np.where(ids_of(case) < BASE, ids_of(case), 0)
    shared = min(BASE, case.size)
    base = onnx_output(bundle, known)[..., :shared]
    merged = onnx_output(tmp_path / "m", known)[..., :shared]
    assert difference(base, merged) > 0.1, "the adapter does nothing"
    assert manifest.outputs[0].shape[-1] == case.size
    assert json.loads((tmp_path / "m" / "config.json").read_text())["vocab_size"] == case.size


def test_the_bundle_has_the_tokenizer_and_the_end_tokens_of_the_adapter(
    bases: dict[str, tuple[Path, Path]], adapter_of: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = adapter_of("a multiple of 64")
    ld.export(bases["llama"][1], tmp_path / "m", adapters={"a": adapter}, merge=True)
    generator = ld.TextGenerator(ld.AdapterSession(tmp_path / "m"))
    ids = generator.tokenizer.encode(f"a{WORDS[0]}{WORDS[1]}", special_tokens=False)
    assert list(ids)[-2:] == [BASE, BASE + 1]
    settings = [
        json.loads((tmp_path / "m" / name).read_text())
        for name in ("generation_config.json", "config.json")
    ]
    assert all(BASE + 1 in np.atleast_1d(each["eos_token_id"]) for each in settings)
    genai = json.loads((tmp_path / "m" / "genai_config.json").read_text())["model"]
    assert BASE + 1 in np.atleast_1d(genai["eos_token_id"])
    assert genai["vocab_size"] == BASE + 64


def test_special_tokens_beyond_the_smaller_vocabulary_are_removed_and_named(
    bases: dict[str, tuple[Path, Path]],
    adapter_of: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = shutil.copytree(bases["llama"][1], tmp_path / "b")
    _set_ids(bundle / "generation_config.json", eos_token_id=[2, BASE - 1])
    _set_ids(bundle / "config.json", pad_token_id=BASE - 2)
    adapters = {"a": adapter_of("fewer tokens")}
    ld.export(bundle, tmp_path / "m", adapters=adapters, merge=True)
    assert "a: the vocabulary has 503 tokens in place of the base's 512" in caplog.text
    assert "ends at 502: eos_token_id 511; pad_token_id 510" in caplog.text
    generation, config, genai = (
        json.loads((tmp_path / "m" / name).read_text())
        for name in ("generation_config.json", "config.json", "genai_config.json")
    )
    assert (generation["eos_token_id"], config["pad_token_id"]) == ([2], None)
    assert np.atleast_1d(genai["model"]["eos_token_id"]).tolist() == [2]
    assert genai["model"]["pad_token_id"] < 503
    assert ld.TextGenerator(ld.AdapterSession(tmp_path / "m")).tokenizer.eos_ids == {2}


@pytest.mark.parametrize(
    ("ids", "task", "message"),
    [
        ({"eos_token_id": 510}, "causal-lm", "eos_token_id of the base is 510, .* ends at 502"),
        ({"eos_token_id": [510, 511]}, "causal-lm", "eos_token_id of the base is 510"),
        ({"pad_token_id": 503}, "sequence-classification", "pad_token_id of the base is 503"),
    ],
)
def test_special_tokens_beyond_the_smaller_vocabulary_are_refused_if_no_others_remain(
    ids: dict[str, Any], task: str, message: str, tmp_path: Path
) -> None:
    for config in (ids, {"text_config": ids}):
        with pytest.raises(AdapterError, match=message):
            without_lost_ids(tmp_path, config, 503, task)
    assert without_lost_ids(tmp_path, ids, 512, task) == ids


def _set_ids(file: Path, **ids: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **ids}))


def test_the_checkpoint_is_merged_in_the_same_way(
    bases: dict[str, tuple[Path, Path]], adapter_of: Callable[[str], Path], tmp_path: Path
) -> None:
    case, adapter = CASES["tied"], adapter_of("tied")
    checkpoint = bases["gpt2"][0]
    ld.export(checkpoint, tmp_path / "m", adapters={"a": adapter}, merge=True)
    found = onnx_output(tmp_path / "m", ids_of(case))
    assert difference(found, np.load(adapter / "expected.npy")) <= tolerance("torch-onnx-tiny")
    report = ld.parity(
        tmp_path / "m", model=checkpoint, adapters={"a": adapter}, tokens=3, certificate=False
    )
    assert report.passed, report.failures
    doubled = _doubled(adapter, tmp_path / "doubled")
    wrong = ld.parity(
        tmp_path / "m", model=checkpoint, adapters={"a": doubled}, tokens=3, certificate=False
    )
    assert not wrong.passed
    broken = spoiled(tmp_path / "m", tmp_path / "broken", _zero_the_added_rows(BASE + 2))
    assert not _prefill_parity(broken, checkpoint, adapter).passed


def _prefill_parity(bundle: Path, checkpoint: Path, adapter: Path) -> ParityReport:
    return ld.parity(
        bundle,
        model=checkpoint,
        adapters={"a": adapter},
        tokens=1,
        backends=["onnx-merged"],
        phases=["prefill"],
        shrink=False,
        localize=False,
        certificate=False,
    )


def _zero_the_added_rows(size: int) -> Callable[[ir.Graph], None]:
    """Zero the rows of the added tokens in the embedding of a graph with `size` tokens."""

    def change(graph: ir.Graph) -> None:
        tables = {
            node.inputs[0]
            for node in graph
            if node.op_type == "Gather" and node.inputs[0] is not None
        }
        (table,) = (each for each in tables if each.shape is not None and each.shape[0] == size)
        values = constant_of(table).copy()
        values[BASE:] = 0
        set_constant(table, values)

    return change


@pytest.mark.parametrize("name", ["embeddings saved", "trained in full"])
def test_parity_fails_a_merge_that_lost_rows_of_tokens_that_occur_in_no_prompt(
    name: str,
    bases: dict[str, tuple[Path, Path]],
    adapter_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    checkpoint, bundle = bases["llama"]
    ld.export(bundle, tmp_path / "m", adapters={"a": adapter_of(name)}, merge=True)
    broken = spoiled(tmp_path / "m", tmp_path / "broken", _zero_the_added_rows(BASE + 2))
    whole = _prefill_parity(tmp_path / "m", checkpoint, adapter_of(name))
    assert whole.passed, whole.failures
    assert not _prefill_parity(broken, checkpoint, adapter_of(name)).passed


def _doubled(adapter: Path, place: Path) -> Path:
    """Copy the adapter with twice the alpha."""
    shutil.copytree(adapter, place)
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    return place


@pytest.mark.parametrize("changed", [3, 65])
def test_new_tokens_in_spare_embedding_rows_are_side_inputs_if_they_are_few(
    changed: int, bases: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    import peft
    import torch

    checkpoint, base = bases["llama"]
    model = resized(checkpoint, BASE)
    options = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    made = peft.get_peft_model(model, options).eval()
    ids = np.array([[5, BASE - 1, BASE - 2, BASE - 3, 44]])
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[-changed:] += torch.randn_like(table.weight[-changed:])
        expected = made(torch.from_numpy(ids)).logits.numpy()
    made.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    if changed > MOST_ROWS:
        with pytest.raises(AdapterError, match=r"differs from the base's: merge it instead"):
            ld.export(checkpoint, tmp_path / "b", adapters={"a": tmp_path / "a"})
        return
    ld.export(checkpoint, tmp_path / "b", adapters={"a": tmp_path / "a"})
    session = ld.AdapterSession(tmp_path / "b")
    given = feeds(session.manifest, np.repeat(ids, 2, axis=0))
    first, other = session.run(["logits"], given, ["a", None])[0]
    assert difference(first, expected[0]) <= tolerance("torch-onnx-tiny")
    assert difference(other, onnx_output(base, ids)[0]) <= tolerance("torch-onnx-tiny")
    assert difference(first, other) > 0.1


# -- refusals --------------------------------------------------------------------------------------


def _without(part: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def _shorter_head(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"][:-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("lm_head"), r"514 tokens, the base has 512, and the rows 512 to 513 of lm_head"),
        (_without("embed_tokens"), r"rows 512 to 513 of model.embed_tokens.weight are in neither"),
        (_shorter_head, r"lm_head.weight is \[513, 64\], the base has \[514, 64\]"),
    ],
)
def test_missing_rows_are_refused(
    change: Callable[[dict[str, Any]], None],
    message: str,
    bases: dict[str, tuple[Path, Path]],
    adapter_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    from safetensors.numpy import load_file, save_file

    adapter = shutil.copytree(adapter_of("embeddings saved"), tmp_path / "a")
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    for model in bases["llama"]:
        with pytest.raises(AdapterError, match=message):
            ld.export(model, tmp_path / "m", adapters={"a": adapter}, merge=True)


def test_a_tokenizer_with_more_tokens_than_embedding_rows_is_refused(
    bases: dict[str, tuple[Path, Path]], adapter_of: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = shutil.copytree(adapter_of("fewer tokens"), tmp_path / "a")
    for file in adapter_of("embeddings saved").glob("tokenizer*"):
        shutil.copy(file, adapter)
    with pytest.raises(LoraDeployError, match=r"'<\|tool\|>' as token 512.*vocabulary ends at 502"):
        ld.export(bases["llama"][1], tmp_path / "m", adapters={"a": adapter}, merge=True)


@pytest.mark.parametrize("name", ["embeddings saved", "trained rows"])
def test_a_bundle_without_rows_for_added_tokens_refuses_them_and_suggests_a_merge(
    name: str, bases: dict[str, tuple[Path, Path]], adapter_of: Callable[[str], Path]
) -> None:
    with pytest.raises(AdapterError, match="merge"):
        ld.AdapterSession(bases["llama"][1]).load("a", adapter_of(name))


def test_an_image_model_without_tokens_is_merged_like_peft(tmp_path: Path) -> None:
    import peft
    import torch

    model: Any = tiny.model("convnext")
    model.config.image_size = 16
    model.save_pretrained(tmp_path / "base")
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["pwconv1", "pwconv2"]))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        expected = made.eval()(pixel_values=pixels).logits.numpy()
        with made.disable_adapter():
            base = made(pixel_values=pixels).logits.numpy()
    made.save_pretrained(tmp_path / "a")
    adapters = {"a": tmp_path / "a"}
    task = "image-classification"
    ld.export(tmp_path / "base", tmp_path / "m", adapters=adapters, merge=True, task=task)
    session = ld.AdapterSession(tmp_path / "m")
    (found,) = session.run(["logits"], {"pixel_values": pixels.numpy()})
    assert difference(found, expected) <= tolerance("torch-onnx-tiny")
    assert difference(base, expected) > 0.1
