"""A tiny Qwen-VL with adapters, and the outputs of transformers and PEFT for text with images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tests.export.small import SMALL
from tests.inputs.words import write_tokenizer

START, END, IMAGE, VIDEO = 106, 107, 110, 111  # token ids
SIDE: Final = 2  # a square of this many patches per side is merged into one token
VALUES: Final = 3 * 2 * 4 * 4  # values per patch
NEW: Final = 6  # generated tokens
PARTS: Final = ("text", "vision", "projector", "all")
# Prompts of words in the vocabulary.
TEXTS: Final = (
    "w5 w17 w3 w60 w61 w9",
    "w8",
    "w30 w31 w2 w77 w40 w41 w42 w12 w13 w15 w90 w91",
    "w50 w3 w50 w8 w66 w67 w68 w69 w70 w1 w2 w3 w4 w99 w98 w97 w23 w24 w25 w26",
    "w6 w7 w88",
    "w11 w22 w33 w44 w55",
)
_TEXT: Final = {
    **SMALL,
    "num_hidden_layers": 2,
    "vocab_size": 120,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 100.0},
}
_VISION: Final = {
    "depth": 3,
    "num_heads": 4,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": SIDE,
    "initializer_range": 0.2,
}
VISION: Final[Mapping[str, dict[str, Any]]] = {
    "Qwen2VL": {**_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    "Qwen2_5_VL": {
        **_VISION,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "window_size": 24,
        "fullatt_block_indexes": [1],  # 3 x 3 tokens
    },
}
Grid = tuple[int, int]  # rows and columns of tokens


def make(family: str, place: Path) -> None:
    """Write the checkpoint, an adapter for each part, and one for all three parts."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        text_config=_TEXT,
        vision_config=VISION[family],
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    model.save_pretrained(place / "model")
    write_tokenizer(place / "model", words=_TEXT["vocab_size"])
    targets = r".*(q_proj|down_proj|attn\.qkv|attn\.proj|fc1|merger\.mlp\.[02])"
    options = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    made = peft.get_peft_model(model, options)
    for part in PARTS:
        torch.manual_seed(len(part))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.requires_grad:
                    used = part in ("all", part_of(name))
                    size = 0.25 if used or "lora_A" in name else 0.0
                    parameter.copy_(torch.randn_like(parameter) * size)
        made.save_pretrained(place / part)


def part_of(name: str) -> str:
    """Return the part of the model that a module or parameter belongs to."""
    if ".merger." in name:
        return "projector"
    return "vision" if "visual" in name else "text"


def image(grid: Grid, seed: int = 0) -> NDArray[np.float32]:
    """Return an image as patches [rows, columns, merged patches, values]."""
    random = np.random.default_rng([seed, *grid])
    return random.standard_normal((*grid, SIDE**2, VALUES)).astype(np.float32)


def processed(images: Sequence[NDArray[np.float32]]) -> dict[str, Any]:
    """Return the images in the form of transformers' processor."""
    import torch

    if not images:
        return {}
    patches = np.concatenate([each.reshape(-1, VALUES) for each in images])
    grids = [[1, each.shape[0] * SIDE, each.shape[1] * SIDE] for each in images]
    return {"pixel_values": torch.from_numpy(patches), "image_grid_thw": torch.tensor(grids)}


def tokens_of(words: Sequence[int | Grid]) -> list[int]:
    """Return the tokens of a prompt, with the tokens that the processor puts around images."""
    made: list[int] = []
    for word in words:
        if isinstance(word, int):
            made.append(word)
        else:
            made += [START, *[IMAGE] * (word[0] * word[1]), END]
    return made


class Whole:
    """transformers' model, with an adapter applied by PEFT or without one."""

    def __init__(self, place: Path, adapter: str | None = None) -> None:
        import peft
        from transformers import AutoModelForImageTextToText

        self.model: Any = AutoModelForImageTextToText.from_pretrained(place / "model").eval()
        if adapter is not None:
            self.model = peft.PeftModel.from_pretrained(self.model, place / adapter).eval()

    def _given(self, rows: Sequence[list[int]], images: Sequence[NDArray[np.float32]]) -> Any:
        import torch

        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == IMAGE).int(),
            **processed(images),
        }

    def logits(self, ids: list[int], images: Sequence[NDArray[np.float32]]) -> NDArray[Any]:
        """Return the logits [tokens, vocabulary] of one text."""
        import torch

        with torch.no_grad():
            found: NDArray[Any] = self.model(**self._given([ids], images)).logits[0].numpy()
        return found

    def positions(
        self, rows: Sequence[list[int]], images: Sequence[NDArray[np.float32]]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return positions [3, rows, tokens], deltas [rows], mask [rows, tokens], padded left."""
        given = self._given(rows, images)
        mask = given["attention_mask"].numpy()
        given = {name: value for name, value in given.items() if name != "pixel_values"}
        positions, deltas = self.model.model.get_rope_index(**given)
        return positions.numpy(), deltas.numpy()[:, 0], mask

    def generated(self, ids: list[int], images: Sequence[NDArray[np.float32]]) -> list[int]:
        """Return the tokens that greedy generation appends to one text."""
        out = self.model.generate(**self._given([ids], images), max_new_tokens=NEW, do_sample=False)
        return [token for token in out[0, len(ids) :].tolist() if token != _TEXT["eos_token_id"]]
