"""Text generation from images with Gemma 3: prompts like its processor's, and greedy text.

The reference is transformers with PEFT and Gemma3Processor.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import pytest

import loradeploy as ld
from loradeploy.errors import UsageError
from loradeploy.inspection.bundle import inspect_bundle
from tests.conftest import once
from tests.inputs import gemma
from tests.inputs.edits import edited_json
from tests.inputs.gemma import IMAGE, pictures

NEW: Final = 6


def _export(place: Path) -> None:
    model = place.parent / "images-Gemma3"
    given = {"all": model / "all"}
    ld.export(model / "model", place / "d", task="causal-lm", adapters=given)
    ld.export(model / "model", place / "t", task="vision-tower", adapters=given)


@pytest.fixture(scope="session")
def made(shared: Path) -> Path:
    return once(shared / "images-Gemma3", gemma.make)


@pytest.fixture(scope="session")
def bundles(made: Path) -> Path:
    return once(made.parent / "images-Gemma3-text", _export)


@pytest.fixture
def generator(made: Path, bundles: Path) -> ld.ImageTextGenerator:
    found = ld.ImageTextGenerator(
        ld.AdapterSession(bundles / "d"), ld.AdapterSession(bundles / "t")
    )
    for name in ("text", "vision"):
        found.load(name, made / name)
    return found


_CHAT: Final = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "w20 w21"}, {"type": "image"}],
    }
]
# By case: the prompt and its number of images.
PROMPTS: Final[dict[str, tuple[Any, int]]] = {
    "between words": ("w10 <start_of_image> w11 w12", 1),
    "beside newlines": ("w10\n<start_of_image>\nw11", 1),
    "two beside each other": ("<start_of_image> <start_of_image> w13", 2),
    "in a chat": (_CHAT, 2),
    "none": ("w14 w15 w16", 0),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_generated_text_is_that_of_the_whole_model(
    case: str, made: Path, generator: ld.ImageTextGenerator
) -> None:
    prompt, count = PROMPTS[case]
    images = pictures(count, seed=len(case))
    ids = gemma.processed(made / "model", prompt, count)
    assert ids.count(IMAGE) == count * gemma.TOKENS
    texts = {}
    for name in (None, "all"):
        (found,) = generator.generate([prompt], [list(images)], name, max_new_tokens=NEW)
        texts[name] = list(found.token_ids)
        assert found.prompt_tokens == len(ids)
        model = gemma.whole(made / "model", name and made / name)
        assert texts[name] == gemma.greedy(model, ids, images, NEW), name
    assert texts[None] != texts["all"], "the adapter does nothing"


def test_rows_of_a_batch_have_their_own_images_and_adapters(
    made: Path, generator: ld.ImageTextGenerator
) -> None:
    names = [None, "all", "text", "vision", "all"]
    cases = [(prompt, pictures(n, seed)) for seed, (prompt, n) in enumerate(PROMPTS.values())]
    results = generator.generate(
        [prompt for prompt, _ in cases],
        [list(images) for _, images in cases],
        names,
        max_new_tokens=NEW,
        batch_size=len(cases),
    )
    for result, name, (prompt, images) in zip(results, names, cases, strict=True):
        ids = gemma.processed(made / "model", prompt, len(images))
        model = gemma.whole(made / "model", name and made / name)
        assert list(result.token_ids) == gemma.greedy(model, ids, images, NEW), name


def test_tokens_of_the_processor_are_used_unchanged(
    made: Path, generator: ld.ImageTextGenerator
) -> None:
    prompt, images = "w10\n<start_of_image>\nw11", [list(pictures(1))]
    ids = gemma.processed(made / "model", prompt, 1)
    written = (
        f"w10\n\n\n<start_of_image>{'<image_soft_token>' * gemma.TOKENS}<end_of_image>\n\n\nw11"
    )
    texts = [
        generator.generate([given], images, max_new_tokens=NEW)[0].token_ids
        for given in (prompt, ids, written)
    ]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ("w1 <start_of_image> w2", 2, "prompt 1 has 4 image tokens, and 2 images of together 8"),
        ("w1 <start_of_image> w2", 0, "prompt 1 has 4 image tokens, and 0 images of together 0"),
        ([2, IMAGE, 9], 1, "give a text with <start_of_image> for each image, or one image"),
    ],
)
def test_images_that_do_not_fit_a_prompt_are_refused(
    prompt: Any, count: int, message: str, generator: ld.ImageTextGenerator
) -> None:
    with pytest.raises(UsageError, match=message):
        generator.generate([prompt], [list(pictures(count))])


def test_a_chat_with_an_image_is_refused_without_it(generator: ld.ImageTextGenerator) -> None:
    text = ld.TextGenerator(generator.decoder)
    with pytest.raises(UsageError, match=r"a message of prompt 2 has an image \(image\), which is"):
        text.generate(["w1", _CHAT])
    url = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(UsageError, match=r"a message of prompt 1 has an image \(image_url\)"):
        text.generate([url])
    plain = [{"role": "user", "content": [{"type": "text", "text": "w20 w21"}]}]
    assert text.generate([plain], max_new_tokens=1)[0].completion_tokens == 1
    video = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "w20"}]}]
    with pytest.raises(UsageError, match="prompt 1 has a part of type video: not supported"):
        generator.generate([video], [[]])


def test_pixel_values_that_are_not_normalized_are_refused(
    generator: ld.ImageTextGenerator,
) -> None:
    (image,) = pictures(1)
    for wrong in (127 * (image + 1), -127 * image):
        with pytest.raises(UsageError, match="pixel values up to .*, expected normalized ones"):
            generator.generate(["w1 <start_of_image>"], [[wrong]])


def test_results_name_the_requested_adapter(generator: ld.ImageTextGenerator) -> None:
    names = ["vision", None, "text", "all"]
    images = [[image] for image in pictures(4)]
    few: Any = {"max_new_tokens": 1, "num_beams": 2, "n": 2}
    found = generator.generate(["w1 <start_of_image>"] * 4, images, names, **few)
    assert [one.adapter for one in found] == [name for name in names for _ in range(2)]


def test_sessions_that_do_not_belong_together_are_refused(
    bundles: Path, tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    decoder, tower = ld.AdapterSession(bundles / "d"), ld.AdapterSession(bundles / "t")
    with pytest.raises(UsageError, match="is a vision-tower bundle, no causal-lm"):
        ld.ImageTextGenerator(tower, decoder)
    with pytest.raises(UsageError, match="only takes text, no images"):
        ld.ImageTextGenerator(ld.AdapterSession(tiny_llama_bundle), tower)
    # A bundle of another checkpoint with the same sizes.
    file = shutil.copytree(bundles / "t", tmp_path / "t") / "loradeploy.json"
    with edited_json(file) as manifest:
        manifest["base"]["digest"] = "sha256:" + "0" * 64
    with pytest.raises(UsageError, match="are of two models: export both of one checkpoint"):
        ld.ImageTextGenerator(decoder, ld.AdapterSession(tmp_path / "t"))


def test_inspect_shows_that_a_decoder_reads_images(bundles: Path, tiny_llama_bundle: Path) -> None:
    found = inspect_bundle(bundles / "d")
    assert found.image_inputs == ["inputs_embeds", "inputs_embeds_mask"]
    assert inspect_bundle(bundles / "t").image_inputs is None
    assert inspect_bundle(tiny_llama_bundle).image_inputs is None
