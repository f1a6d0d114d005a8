"""An engine's requests with images join the batch, and get the texts of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import loradeploy as ld
from loradeploy.errors import UsageError
from tests.inputs.pictures import NEW, PROMPTS, Made, prepared


def _requests(generator: ld.ImageTextGenerator, made: Made, files: list[Path]) -> Any:
    """Return prompts with images and without, adapters, and how the engine takes them."""
    prompt = PROMPTS[made.family]
    prompts, images = [prompt, "w5 w6 w7", prompt], [files[:2], [], files[1:]]
    adapters = ["all", "all", None]
    read = generator.reader.read(prompts, images, adapters, chat=False, batch_size=1)
    return prompts, images, adapters, read


@pytest.mark.parametrize("family", ["Idefics3", "Gemma3", "Qwen2_5_VL"])
def test_texts_of_a_mixed_batch_are_those_of_transformers(
    family: str, shared: Path, pictures: list[Path]
) -> None:
    made = prepared(shared, family)
    generator = made.generator()
    prompts, images, adapters, read = _requests(generator, made, pictures)
    with ld.Engine(generator.decoder, prefill_chunk=4) as engine:
        submitted = [
            engine.submit(ids, name, embeds=embeds, max_new_tokens=NEW)
            for _ in range(2)  # the second time, prefixes are in the cache
            for ids, name, embeds in zip(read.ids, read.adapters, read.embeds, strict=True)
        ]
        found = [list(one.result(60).generations[0].token_ids) for one in submitted]
    expected = [
        made.greedy(prompt, own, name)
        if own
        else list(generator.generate([prompt], [[]], name, max_new_tokens=NEW)[0].token_ids)
        for prompt, own, name in zip(prompts, images, adapters, strict=True)
    ]
    assert found == expected * 2
    assert submitted[3].cached_tokens == 0, "the keys and values of other images are not used"


def test_rows_in_slots_continue_after_images(
    shared: Path, tmp_path: Path, pictures: list[Path]
) -> None:
    made = prepared(shared, "Qwen2_5_VL")
    ld.export(
        made.place / "model",
        tmp_path / "gqa",
        task="causal-lm",
        attention="gqa",
        adapters={"all": made.place / "all"},
    )
    decoder = ld.AdapterSession(tmp_path / "gqa")
    generator = ld.ImageTextGenerator(decoder, ld.AdapterSession(made.place / "tower"))
    prompts, images, adapters, read = _requests(generator, made, pictures)
    with ld.Engine(decoder, cache_budget=1 << 24) as engine:
        submitted = [
            engine.submit(ids, name, embeds=embeds, max_new_tokens=NEW)
            for ids, name, embeds in zip(read.ids, read.adapters, read.embeds, strict=True)
        ]
        found = [list(one.result(60).generations[0].token_ids) for one in submitted]
    for number in (0, 2):
        assert found[number] == made.greedy(prompts[number], images[number], adapters[number])


def test_embeddings_that_do_not_fit_the_prompt_are_refused(
    shared: Path, pictures: list[Path]
) -> None:
    made = prepared(shared, "Gemma3")
    generator = made.generator()
    *_, read = _requests(generator, made, pictures)
    engine = ld.Engine(generator.decoder)
    with pytest.raises(UsageError, match="the prompt has the token 117 0 times, and embeddings"):
        engine.submit([5, 6], embeds=read.embeds[0])
    with pytest.raises(UsageError, match="`embeds`: give the prompt as token ids"):
        engine.submit("w5", embeds=read.embeds[0])
