"""Image files in prompts: everything that transformers' processor and model make of them.

The reference is transformers with PEFT, from the same files.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loradeploy.errors import DataError, UsageError
from tests.inputs.pictures import FAMILIES, NEW, PROMPTS, Made, image_file, prepared
from tests.tolerances import tolerance


@pytest.fixture(params=FAMILIES)
def made(request: pytest.FixtureRequest, shared: Path) -> Made:
    return prepared(shared, request.param)


def test_texts_about_image_files_are_those_of_transformers(
    made: Made, pictures: list[Path]
) -> None:
    generator, prompt = made.generator(), PROMPTS[made.family]
    texts = {}
    for case, shown in (
        ("first", pictures[:2]),
        ("last", pictures[1:]),
        ("turned", pictures[1::-1]),
    ):
        for adapter in (None, "all"):
            expected = made.greedy(prompt, shown, adapter)
            (found,) = generator.generate([prompt], [shown], adapter, max_new_tokens=NEW)
            assert list(found.token_ids) == expected, (case, adapter)
            count = made.given(prompt, shown)["input_ids"].shape[1]
            assert (found.prompt_tokens, found.adapter) == (count, adapter)
            texts[case, adapter] = found.token_ids
    assert texts["first", None] != texts["first", "all"], "the adapter has an effect"


def test_the_same_image_is_read_from_a_file_and_from_memory(
    made: Made, pictures: list[Path]
) -> None:
    from PIL import Image

    generator, prompt = made.generator(), PROMPTS[made.family]
    opened = [Image.open(file) for file in pictures[:2]]
    forms: list[list[Any]] = [pictures[:2], list(map(str, pictures[:2])), opened]
    forms += [[np.asarray(image.convert("RGB")) for image in opened]]
    texts = {
        generator.generate([prompt], [form], max_new_tokens=NEW)[0].token_ids for form in forms
    }
    assert len(texts) == 1


def test_pieces_and_scores_are_those_of_whole_texts(made: Made, pictures: list[Path]) -> None:
    import torch

    generator, prompt = made.generator(), PROMPTS[made.family]
    prompts, images = [prompt, "w5 w6", prompt], [pictures[:2], [], pictures[1:]]
    adapters = ["all", None, None]
    options: Any = {"max_new_tokens": NEW, "temperature": 1.0, "n": 2, "seed": 3}
    whole = generator.generate(prompts, images, adapters, **options)
    pieces = list(generator.stream(prompts, images, adapters, **options))
    for row, result in enumerate(whole):
        own = [piece for piece in pieces if piece.row == row]
        assert "".join(piece.text for piece in own) == result.text
        assert own[-1].result == result

    async def read() -> list[Any]:
        stream = generator.astream(prompts, images, adapters, **options)
        return [piece.result async for piece in stream if piece.result is not None]

    assert sorted(asyncio.run(read()), key=str) == sorted(whole, key=str)
    shown: list[tuple[int, Any]] = []
    generator.generate(
        prompts, images, adapters, on_result=lambda row, one: shown.append((row, one)), **options
    )
    assert shown == list(enumerate(whole))

    for score, text, own, adapter in zip(
        generator.score(prompts, images, adapters), prompts, images, adapters, strict=True
    ):
        assert score.adapter == adapter
        if not own:
            assert len(score.logprobs) == len(score.token_ids) - 1
            continue
        given = made.given(text, own)
        with torch.no_grad():
            logits = made.whole(adapter)(**given).logits[0].double()
        ids = given["input_ids"][0]
        assert list(score.token_ids) == ids.tolist()
        places = [p for p in range(1, len(ids)) if ids[p] != generator.image_token]
        probable = torch.log_softmax(logits, -1)[[p - 1 for p in places], ids[places]]
        found = np.array([part.logprob for part in score.logprobs])
        assert [part.token_id for part in score.logprobs] == ids[places].tolist()
        assert np.abs(found - probable.numpy()).max() <= tolerance("torch-onnx-tiny") * 10
    scores = [generator.score([prompt], [own], "all")[0] for own in (pictures[:2], pictures[1::-1])]
    first, turned = (score.logprobs[-1].logprob for score in scores)
    assert abs(first - turned) > 100 * tolerance("torch-onnx-tiny"), "the images have an effect"


def test_images_that_do_not_fit_a_prompt_are_refused(made: Made, pictures: list[Path]) -> None:
    generator, prompt = made.generator(), PROMPTS[made.family]
    with pytest.raises(UsageError, match=r"prompt 1 has .* image tokens, and 1 images of together"):
        generator.generate([prompt], [pictures[:1]])
    with pytest.raises(UsageError, match=r"prompt 1 has 0 image tokens.*give .* once for each"):
        generator.generate(["w5 w6"], [pictures[:1]])
    text = pictures[0].parent / "text.png"
    text.write_text("no image")
    with pytest.raises(DataError, match=r"text.png cannot be read as an image"):
        generator.generate([prompt], [[text, pictures[0]]])
    with pytest.raises(DataError, match=r"none.png does not exist"):
        generator.generate([prompt], [[text.with_name("none.png"), pictures[0]]])
    with pytest.raises(UsageError, match="image 2 of prompt 1 is 7: give a path"):
        generator.generate([prompt], [[pictures[0], 7]])  # type: ignore[list-item]


def test_tokens_of_tiles_are_only_inserted_into_texts(shared: Path, tmp_path: Path) -> None:
    made = prepared(shared, "Idefics3")
    generator = made.generator()
    split = image_file(tmp_path, 0)
    ids = [11, generator.image_token, 12]
    with pytest.raises(UsageError, match="an image of prompt 1 is split into tiles"):
        generator.generate([ids], [[split]])
    complete = made.given("w11 <image> w12", [split])["input_ids"][0].tolist()
    texts = [
        generator.generate([prompt], [[split]], max_new_tokens=NEW)[0].token_ids
        for prompt in ("w11 <image> w12", complete)
    ]
    assert texts[0] == texts[1]


# By family: parts of the names of tensors, and the same in adapters that transformers 4 saved.
OLD_NAMES = {
    "Llava": (
        ("model.model.language_model.", "model.language_model.model."),
        ("model.model.vision_tower.", "model.vision_tower.vision_model."),
        ("model.model.multi_modal_projector.", "model.multi_modal_projector."),
    ),
    "Gemma3": (
        ("model.model.language_model.", "model.language_model.model."),
        ("model.model.vision_tower.", "model.vision_tower.vision_model."),
    ),
    "Qwen2_5_VL": (
        ("model.model.language_model.", "model.model."),
        ("model.model.visual.", "model.visual."),
    ),
}


@pytest.mark.parametrize("family", OLD_NAMES)
def test_an_adapter_saved_by_transformers_4_has_the_same_effect_on_each_part(
    family: str, shared: Path, tmp_path: Path, pictures: list[Path]
) -> None:
    made = prepared(shared, family)
    prompt, shown = [PROMPTS[family]], [pictures[:2]]
    tensors = load_file(made.place / "all" / "adapter_model.safetensors")
    generator, scores = made.generator(), {}
    for part in ("all", *(new for new, _ in OLD_NAMES[family])):
        kept = {}
        for name, values in tensors.items():
            own = part == "all" or part in name
            for new, old in OLD_NAMES[family]:
                name = name.replace(f"base_model.{new}", f"base_model.{old}")
            kept[name] = values if own else np.zeros_like(values)
        assert kept.keys() != tensors.keys()
        place = tmp_path / part
        shutil.copytree(made.place / "all", place)
        save_file(kept, place / "adapter_model.safetensors")
        generator.load(f"old {part}", place)
        scores[part] = _token_scores(generator, prompt, shown, f"old {part}")
    expected = _token_scores(generator, prompt, shown, "all")
    base = _token_scores(generator, prompt, shown, None)
    allowed = tolerance("torch-onnx-tiny")
    assert np.abs(scores.pop("all") - expected).max() <= allowed
    for part, found in scores.items():
        for other in (expected, base):
            assert np.abs(found - other).max() > 10 * allowed, part


def _token_scores(generator: Any, prompt: Any, shown: Any, adapter: str | None) -> Any:
    (score,) = generator.score(prompt, shown, adapter)
    return np.array([part.logprob for part in score.logprobs])
