"""Image-text models in two bundles: the decoder, and the vision tower with the projector.

The reference is transformers with PEFT, for images and text together.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.errors import AdapterMismatchError, ExportError, ModelError, UsageError
from loradeploy.export.passes.tokens import embeds as passes
from tests.conftest import once
from tests.export.reference import difference
from tests.inputs.edits import edited_json
from tests.inputs.vision_language import (
    CONFIGS,
    IMAGE,
    NEW,
    TEXT,
    TOWERS,
    VISION,
    generated_by_model,
    make_family,
    outputs_of_bundles,
    outputs_of_model,
    part_of,
    processed_ids,
    prompt_ids,
    random_images,
)
from tests.runtime.feeds import feeds
from tests.tolerances import tolerance


@pytest.fixture(scope="session")
def models(shared: Path) -> Any:
    return lambda family: once(
        shared / f"images-{family}", lambda place: make_family(family, place)
    )


@pytest.mark.breadth(3)
@pytest.mark.parametrize("family", CONFIGS)
def test_two_bundles_compute_what_the_whole_model_computes(
    family: str, models: Any, tmp_path: Path
) -> None:
    made = models(family)
    model, images = made / "model", random_images()
    given = {"adapters": {name: made / name for name in ("all", "vision", "projector")}}
    with pytest.raises(UsageError, match=r"`task='vision-tower'` its vision tower"):
        ld.export(model, tmp_path / "t")
    manifest = ld.export(model, tmp_path / "t", task="vision-tower", **given)
    assert [spec.name for spec in manifest.inputs] == ["pixel_values"]
    text = {"adapters": {name: made / name for name in ("all", "text")}}
    ld.export(model, tmp_path / "d", task="causal-lm", **text)
    tower, decoder = ld.AdapterSession(tmp_path / "t"), ld.AdapterSession(tmp_path / "d")

    ids = prompt_ids(tower.run(None, {"pixel_values": images})[0].shape[1])
    names = (None, "all", "text", "vision", "projector")
    expected = {
        name: outputs_of_model(family, model, None if name is None else made / name, images, ids)
        for name in names
    }
    allowed = tolerance("torch-onnx-tiny")
    for name in names:
        sees = name if name in tower.adapters else None
        reads = name if name in decoder.adapters else None
        found = outputs_of_bundles(tower, decoder, images, sees, reads)
        assert difference(found, expected[name]) <= allowed, name
        others = [expected[other] for other in names if other != name]
        assert min(difference(found, other) for other in others) > 100 * allowed, name
    # Each row of a batch has its own adapters.
    found = outputs_of_bundles(tower, decoder, images, ["vision", "all"], [None, "all"])
    assert difference(found[0], expected["vision"][0]) <= allowed
    assert difference(found[1], expected["all"][1]) <= allowed
    assert difference(outputs_of_bundles(tower, decoder, random_images(1)), expected[None]) > 0.1, (
        "the image counts"
    )

    for bundle, generated in (("t", None), ("d", 3)):
        phases = ["padded batch", *(["embeddings"] if bundle == "d" else [])]
        few: dict[str, Any] = {"tokens": generated, "certificate": False, "phases": phases}
        report = ld.parity(tmp_path / bundle, model=model, controls=bundle == "d", **few)
        assert report.passed, report.failures
        # All built-in prompts are one repeated token here, for which attention makes no difference.
        unseen = [note for note in report.notes if "do not show a mistake with" in note]
        assert {".q_proj" in note for note in unseen} == ({True} if bundle == "d" else set())
        _check_embedded(report, {"text", "all"} if bundle == "d" else set())
        ld.export(tmp_path / bundle, tmp_path / f"m{bundle}", adapters=[made / "all"], merge=True)
    merged = [ld.AdapterSession(tmp_path / name) for name in ("mt", "md")]
    assert difference(outputs_of_bundles(*merged, images), expected["all"]) <= allowed
    file = shutil.copytree(tmp_path / "md", tmp_path / "other") / "loradeploy.json"
    with edited_json(file) as changed:
        changed["merged_adapter"]["whole_digest"] = "0" * 64
    with pytest.raises(UsageError, match="have two adapters merged"):
        ld.ImageTextGenerator(ld.AdapterSession(tmp_path / "other"), merged[0])
    both = feeds(decoder.manifest, ids)
    embeds = np.zeros((*ids.shape, TEXT["hidden_size"]), np.float32)
    with pytest.raises(UsageError, match="inputs_embeds is given without inputs_embeds_mask"):
        decoder.run(None, {**both, "inputs_embeds": embeds})
    one = {"inputs_embeds": embeds[:, :1], "inputs_embeds_mask": ids == IMAGE}
    with pytest.raises(UsageError, match="give an entry for each token"):
        decoder.run(None, {**both, **one})
    words = _words_alone(made / "text", tmp_path / "words")
    with pytest.raises(AdapterMismatchError, match=r"all of its tensors are of .*, in another"):
        tower.load("words", words)
    _check_generation(family, made, tower, decoder, words)


def _words_alone(adapter: Path, place: Path) -> Path:
    """Copy the adapter with only the tensors of the text model."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(adapter, place)
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {name: values for name, values in tensors.items() if part_of(name) == "text"}
    save_file(kept, place / "adapter_model.safetensors")
    return place


def _check_generation(
    family: str, made: Path, tower: ld.AdapterSession, decoder: ld.AdapterSession, words: Path
) -> None:
    """Assert that greedy text for rows with their own images and adapters is transformers'."""
    generator = ld.ImageTextGenerator(decoder, tower)
    tokens = tower.run(None, {"pixel_values": random_images()[:1]})[0].shape[1]
    names = [None, "all", "text", "vision", "projector"]
    for name in names[1:]:
        generator.load(name, made / name, replace=True)
    words_alone = words
    generator.load("words", words)
    images = [*random_images(), *random_images(1), random_images(2)[0]]
    prompts = ["w1 w13 <image> w9", *["w5 <image> w56 w57"] * 4]
    results = generator.generate(
        prompts, [[image] for image in images], names, max_new_tokens=NEW, batch_size=5
    )
    for result, image, name, prompt in zip(results, images, names, prompts, strict=True):
        ids = processed_ids(family, prompt, tokens)
        assert result.prompt_tokens == len(ids)
        expected = generated_by_model(family, made / "model", name and made / name, image, ids)
        assert list(result.token_ids) == expected, name
        base = generated_by_model(family, made / "model", None, image, ids)
        assert name is None or base != expected, f"{name} does nothing"
    (alone,) = generator.generate([prompts[2]], [[images[2]]], "words", max_new_tokens=NEW)
    assert alone.token_ids == results[2].token_ids, "it is the adapter of the text"
    (other,) = generator.generate(prompts[:1], [[-images[0]]], max_new_tokens=NEW)
    assert other.token_ids != results[0].token_ids, "the image counts"
    with pytest.raises(UsageError, match="prompt 1 has 2 image tokens, and 1 images of together"):
        generator.generate(["<image> w1 <image>"], [[images[0]]])
    with pytest.raises(UsageError, match=r"prompt 1 is float32 \[3, 14, 28\], expected"):
        generator.generate(["<image>"], [[images[0][:, :14]]])
    with pytest.raises(UsageError, match="the adapter 'none' is not in"):
        generator.generate(["<image>"], [[images[0]]], "none")
    with pytest.raises(UsageError, match="the images of prompt 1 are None: give a list"):
        generator.generate(["<image>"], [None])
    _check_batches(family, made, generator, tokens)
    _check_loading(made, generator, images[0], words_alone)


def _check_loading(made: Path, generator: ld.ImageTextGenerator, image: Any, bad: Path) -> None:
    """Assert that an adapter that does not fit one part changes neither part."""
    from safetensors.numpy import load_file, save_file

    loaded = (generator.decoder.adapters, generator.tower.adapters)
    tensors = load_file(made / "all" / "adapter_model.safetensors")
    for name, values in tensors.items():  # other values for text, another size for vision
        cut = part_of(name) == "vision" and "lora_A" in name
        tensors[name] = (values[:, :-1] if cut else -values).copy()
    save_file(tensors, bad / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatchError):
        generator.load("all", bad, replace=True)
    assert (generator.decoder.adapters, generator.tower.adapters) == loaded


def _check_batches(family: str, made: Path, generator: ld.ImageTextGenerator, tokens: int) -> None:
    """Check a batch of prompts of different lengths, with 2, 1 and 0 images, several texts each."""
    first, second = random_images(3)
    prompts = ["w1 <image> w2 w3 <image> w4", "w5 w6 <image>", "w7 w8 w9"]
    images = [[first, second], [-first], []]
    few: Any = {"max_new_tokens": NEW, "num_beams": 2, "n": 2}
    together = generator.generate(prompts, images, **few)
    assert len(together) == 6
    alone = [generator.generate([p], [i], **few) for p, i in zip(prompts, images, strict=True)]
    assert [t.token_ids for t in together] == [t.token_ids for texts in alone for t in texts]
    ids = processed_ids(family, prompts[1], tokens)
    (found,) = generator.generate(prompts[1:2], images[1:2], max_new_tokens=NEW)
    assert list(found.token_ids) == generated_by_model(family, made / "model", None, -first, ids)
    swapped = generator.generate(prompts[:1], [[second, first]], max_new_tokens=NEW, num_beams=2)
    assert swapped[0].token_ids != together[0].token_ids, "the order of the images counts"


def _scaled(place: Path) -> Any:
    """Write a LLaVA with a Gemma decoder, which scales its token embeddings."""
    import torch
    import transformers

    torch.manual_seed(0)
    text = {**TEXT, "model_type": "gemma3_text", "head_dim": 8}
    vision = {**VISION, **TOWERS["Llava"]}
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, image_seq_length=16
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(place)
    return model


def _check_embedded(report: Any, adapters: set[str], *, merges: bool = True) -> None:
    """Assert that every backend with embeddings was compared and that mistakes in them failed."""
    found = {(r.backend, r.adapter) for r in report.results if r.phase == "embeddings"}
    kinds = ["onnx-side-inputs", "onnx-native", *(["onnx-merged"] if merges else [])]
    expected = {(kind, name) for kind in kinds for name in adapters}
    assert expected <= found
    wrong = {"shifted places", "exchanged embeddings"}
    seen = {(c.name, c.adapter): c.caught for c in report.controls if c.name in wrong}
    assert seen == {(name, adapter): True for name in wrong for adapter in adapters}


@pytest.mark.breadth(2)
@pytest.mark.parametrize("form", [{"precision": "fp16"}, {"precision": "int8", "attention": "gqa"}])
def test_parity_passes_for_embeddings_in_other_forms(
    form: dict[str, Any], models: Any, tmp_path: Path
) -> None:
    made = models("SmolVLM")
    adapters = {"text": made / "text"}
    ld.export(made / "model", tmp_path / "d", task="causal-lm", adapters=adapters, **form)
    few: dict[str, Any] = {"tokens": 2, "certificate": False, "phases": ["embeddings"]}
    report = ld.parity(tmp_path / "d", model=made / "model", controls=True, **few)
    assert not [result for result in report.results if result.outcome == "failed"]
    _check_embedded(report, {"text"}, merges=form["precision"] == "fp16")


@pytest.mark.parametrize("read", ["behind the scale", "before the scale"])
def test_image_embeddings_are_not_scaled_like_token_embeddings(
    read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    model = _scaled(tmp_path / "model")
    if read == "before the scale":
        monkeypatch.setattr(passes, "_end_of", lambda module, value: value)
        with pytest.raises(
            ExportError, match=r"with inputs_embeds its output logits differs by .* from"
        ):
            ld.export(tmp_path / "model", tmp_path / "d", task="causal-lm")
        return
    ld.export(tmp_path / "model", tmp_path / "d", task="causal-lm")
    decoder, ids = ld.AdapterSession(tmp_path / "d"), prompt_ids(3)
    given = np.random.default_rng(0).standard_normal((*ids.shape, 32)).astype(np.float32)
    own = {"inputs_embeds": given, "inputs_embeds_mask": ids == IMAGE}
    (found,) = decoder.run(["logits"], {**feeds(decoder.manifest, ids), **own})
    with torch.no_grad():
        tokens = model.get_input_embeddings()(torch.from_numpy(ids))
        places = torch.from_numpy(ids == IMAGE)[..., None]
        embeds = torch.where(places, torch.from_numpy(given), tokens)
        mask = torch.ones(ids.shape, dtype=torch.int64)
        expected = model(inputs_embeds=embeds, attention_mask=mask).logits.numpy()
    assert difference(found, expected) <= tolerance("torch-onnx-tiny")


def test_paligemma_is_refused_as_a_decoder_with_a_cache(models: Any, tmp_path: Path) -> None:
    import transformers

    model = shutil.copytree(models("SmolVLM") / "model", tmp_path / "model")
    transformers.PaliGemmaConfig().to_json_file(model / "config.json")
    with pytest.raises(ModelError, match="paligemma.*all tokens of a prompt attend to each other"):
        ld.export(model, tmp_path / "t", task="causal-lm")


def test_other_families_are_refused_by_name(models: Any, tiny_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(models("SmolVLM") / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "paligemma",
        "architectures": ["PaliGemmaForConditionalGeneration"],
    }
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ExportError, match="vision tower of paligemma cannot be exported: only those"
    ):
        ld.export(model, tmp_path / "t", task="vision-tower")
    config |= {"model_type": "llava", "vision_config": {"model_type": "pixtral"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="vision tower of llava cannot be exported where it is p"):
        ld.export(model, tmp_path / "t", task="vision-tower")
    with pytest.raises(UsageError, match="LlamaForCausalLM is not a model of images and text"):
        ld.export(tiny_llama, tmp_path / "t", task="vision-tower")
