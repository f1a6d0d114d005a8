"""Tiny vision-language models with their image processors, and transformers' results for files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

import loradeploy as ld
from tests.inputs import gemma, qwen_vl
from tests.inputs.vision_language import IMAGE, SIDE, make_family, tile_processor

NEW: Final = 6  # generated tokens
FAMILIES: Final = ("Idefics3", "Llava", "Gemma3", "Qwen2_5_VL")
# By family: a prompt with two images.
PROMPTS: Final[Mapping[str, str]] = {
    "Idefics3": "w11 <image> w12 <image> w13",
    "Llava": "w11 <image> w12 <image> w13",
    "Gemma3": "w10\n<start_of_image> w11 <start_of_image> w12",
    "Qwen2_5_VL": "w1 w102 w106 w103 w9 w102 w106 w103 w8",
}
# Heights and widths of images; Idefics 3 splits the first one into 2 × 2 tiles, not the last one.
SIZES: Final = ((50, 60), (31, 17), (20, 28))


def _llava() -> Any:
    import transformers

    tiled = tile_processor()
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE),
        tiled.tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _qwen() -> Any:
    import transformers

    size = {"shortest_edge": 256, "longest_edge": 1024}
    return transformers.Qwen2VLImageProcessorPil(patch_size=4, size=size)


def make(family: str, place: Path) -> None:
    """Write the model with its processor, an adapter for all parts, and the two bundles."""
    if family == "Gemma3":
        gemma.make(place)
    elif family == "Qwen2_5_VL":
        qwen_vl.make(family, place)
        _qwen().save_pretrained(place / "model")
    else:
        make_family(family, place)
        made = tile_processor() if family == "Idefics3" else _llava()
        made.tokenizer.save_pretrained(place / "model")
        made.image_processor.save_pretrained(place / "model")
    for name, task in (("decoder", "causal-lm"), ("tower", "vision-tower")):
        ld.export(place / "model", place / name, task=task, adapters={"all": place / "all"})


def image_file(place: Path, number: int) -> Path:
    """Write image `number` of `SIZES` in `place`, with noise in a few colors."""
    from PIL import Image

    random = np.random.default_rng(number)
    low = random.integers(0, 256, (4, 5, 3), np.uint8)
    height, width = SIZES[number]
    file = place / f"image{number}.png"
    Image.fromarray(low).resize((width, height), resample=Image.Resampling.NEAREST).save(file)
    return file


@dataclass(frozen=True)
class Made:
    """A family's model, adapter and bundles in `place`."""

    family: str
    place: Path

    def generator(self) -> ld.ImageTextGenerator:
        return ld.ImageTextGenerator(
            ld.AdapterSession(self.place / "decoder"), ld.AdapterSession(self.place / "tower")
        )

    def given(self, prompt: str, files: Sequence[Path]) -> dict[str, Any]:
        """Return the inputs that transformers' processor makes of a prompt and image files."""
        import torch
        from PIL import Image
        from transformers import AutoProcessor

        images = [Image.open(file) for file in files]
        if self.family == "Qwen2_5_VL":
            pixels = _qwen()(images, return_tensors="pt")
            grids = [
                (int(down) // 2, int(across) // 2) for _, down, across in pixels["image_grid_thw"]
            ]
            waiting = iter(grids)
            words = [4 + int(word[1:]) for word in prompt.split()]
            tokens = [
                each
                for word in words
                for each in ([word] * int(np.prod(next(waiting))) if word == IMAGE else [word])
            ]
            ids = torch.tensor([tokens])
            types = (ids == IMAGE).int()
            return {**pixels, **_text(ids), "mm_token_type_ids": types}
        if self.family == "Gemma3":
            processor = AutoProcessor.from_pretrained(self.place / "model")
        else:
            processor = tile_processor() if self.family == "Idefics3" else _llava()
        made = processor(text=[prompt], images=[images], return_tensors="pt")
        return {name: made[name] for name in made if name != "mm_token_type_ids"}

    def whole(self, adapter: str | None) -> Any:
        """Return transformers' model, with the adapter applied by PEFT."""
        return gemma.whole(self.place / "model", adapter and self.place / adapter)

    def greedy(self, prompt: str, files: Sequence[Path], adapter: str | None) -> list[int]:
        """Return the tokens that transformers generates."""
        given = self.given(prompt, files)
        model = self.whole(adapter)
        out = model.generate(**given, max_new_tokens=NEW, do_sample=False)
        ends = model.generation_config.eos_token_id
        new = out[0, given["input_ids"].shape[1] :].tolist()
        return [token for token in new if token not in np.atleast_1d(ends)]


def _text(ids: Any) -> dict[str, Any]:
    import torch

    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def prepared(shared: Path, family: str) -> Made:
    """Return the family's files, which are made once."""
    from tests.conftest import once

    return Made(family, once(shared / f"pictures-{family}", lambda place: make(family, place)))
