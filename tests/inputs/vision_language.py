"""Tiny vision-language models, and what transformers and bundles compute of images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import loradeploy as ld
from tests.export.small import SMALL
from tests.inputs.words import write_tokenizer
from tests.runtime.feeds import feeds

IMAGE: Final = 110  # id of the image token
NEW: Final = 6  # generated tokens
TEXT: Final = {
    "model_type": "llama",
    **SMALL,
    "vocab_size": 120,
    "max_position_embeddings": 256,  # tiles have many tokens
    "initializer_range": 0.3,
}
VISION: Final = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "initializer_range": 0.3,
}
CONFIGS: Final[Mapping[str, dict[str, Any]]] = {
    "SmolVLM": {"scale_factor": 2, "image_token_id": IMAGE, "pad_token_id": 0},
    "Llava": {"image_token_index": IMAGE, "image_seq_length": 16},
    "Idefics3": {"scale_factor": 2, "image_token_id": IMAGE, "pad_token_id": 0},
}
TOWERS: Final = {"Llava": {"model_type": "clip_vision_model", "projection_dim": 32}}


# Words of the vocabulary that stand for the image token and the tokens around an image.
AROUND: Final = {"w90": "<fake_token_around_image>", "w91": "<global-img>", "w106": "<image>"}
UNUSED: Final = {"Llava": "vision_tower.encoder.layers.1"}  # after the features: never trained


def part_of(name: str) -> str:
    if "connector" in name or "projector" in name:
        return "projector"
    return "vision" if "vision" in name else "text"


def make_family(family: str, place: Path) -> None:
    """Write the checkpoint, an adapter for each part, and one for all three parts."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        text_config=TEXT, vision_config={**VISION, **TOWERS.get(family, {})}, **CONFIGS[family]
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    with torch.no_grad():  # a new projector has little effect
        for name, parameter in model.named_parameters():
            if "connector" in name or "projector" in name:
                parameter.mul_(3)
    model.save_pretrained(place / "model")
    write_tokenizer(place / "model", words=TEXT["vocab_size"])
    file = place / "model" / "tokenizer.json"
    written = file.read_text()
    for word, token in AROUND.items():
        assert f'"{word}"' in written
        written = written.replace(f'"{word}"', f'"{token}"')
    file.write_text(written)
    targets = r".*(q_proj|down_proj|fc1|modality_projection\.proj|projector\.linear_\d)"
    options = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    made = peft.get_peft_model(model, options)
    for part in ("text", "vision", "projector", "all"):
        torch.manual_seed(len(part))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.requires_grad:
                    used = part in ("all", part_of(name)) and UNUSED.get(family, " ") not in name
                    size = 0.3 if used or "lora_A" in name else 0.0
                    parameter.copy_(torch.randn_like(parameter) * size)
        made.save_pretrained(place / part)


def random_images(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((2, 3, 28, 28)).astype(np.float32)


def prompt_ids(tokens: int) -> NDArray[np.int64]:
    image = [IMAGE] * tokens
    return np.array([[5, 17, *image, 3, 44], [9, *image, 60, 61, 62]])


def outputs_of_model(family: str, model: Path, adapter: Path | None, images: Any, ids: Any) -> Any:
    import peft
    import torch
    from transformers import AutoModelForImageTextToText

    made = AutoModelForImageTextToText.from_pretrained(model).eval()
    if adapter is not None:
        made = peft.PeftModel.from_pretrained(made, adapter).eval()
    pixels = torch.from_numpy(images)
    with torch.no_grad():
        return made(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.ones(ids.shape, dtype=torch.int64),
            pixel_values=pixels if family == "Llava" else pixels[:, None],
        ).logits.numpy()


def outputs_of_bundles(
    tower: ld.AdapterSession,
    decoder: ld.AdapterSession,
    images: NDArray[np.float32],
    sees: Any = None,
    reads: Any = None,
) -> NDArray[Any]:
    """Return the logits of two texts with one image each, computed by both bundles."""
    (features,) = tower.run(["image_features"], {"pixel_values": images}, sees)
    ids = prompt_ids(features.shape[1])
    mask = ids == IMAGE
    embeds = np.zeros((*ids.shape, features.shape[2]), np.float32)
    embeds[mask] = features.reshape(-1, features.shape[2])
    given = {**feeds(decoder.manifest, ids), "inputs_embeds": embeds, "inputs_embeds_mask": mask}
    return decoder.run(["logits"], given, reads)[0]


def generated_by_model(
    family: str, model: Path, adapter: Path | None, image: Any, ids: list[int]
) -> Any:
    """Return the tokens that transformers generates after a prompt with an image."""
    import peft
    import torch
    from transformers import AutoModelForImageTextToText

    made = AutoModelForImageTextToText.from_pretrained(model).eval()
    if adapter is not None:
        made = peft.PeftModel.from_pretrained(made, adapter).eval()
    given, pixels = torch.tensor([ids]), torch.from_numpy(image)[None]
    out = made.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        pixel_values=pixels if family == "Llava" else pixels[:, None],
        max_new_tokens=NEW,
        do_sample=False,
    )
    return [token for token in out[0, len(ids) :].tolist() if token != TEXT["eos_token_id"]]


def processed_ids(family: str, prompt: str, tokens: int) -> list[int]:
    """Return the tokens of a prompt with an image from the family's processor in transformers."""
    import transformers

    image = "<image>" * tokens  # as LLaVA writes it
    if family != "Llava":
        # A real processor needs more files; these are the only attributes that are read here.
        processor = SimpleNamespace(
            fake_image_token=AROUND["w90"],
            global_image_tag=AROUND["w91"],
            global_image_token=AROUND["w91"],
            image_token="<image>",
            image_seq_len=tokens,
        )
        own = getattr(transformers, f"{family}Processor")
        image = own.replace_image_token(processor, {"rows": [[0]], "cols": [[0]]}, 0)
    words = re.findall(r"<[^>]+>|w\d+", prompt.replace("<image>", image))
    known = {token: word for word, token in AROUND.items()}
    return [4 + int(known.get(word, word)[1:]) for word in words]


SIDE: Final = 28  # pixels per side of a tile
TILE_TOKENS: Final = 4
_WORDS: Final = 120


def tile_processor() -> Any:
    """Return a processor with the image token of the tiny model and tokens around tiles."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Idefics3ImageProcessor, Idefics3Processor, PreTrainedTokenizerFast

    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    special = {
        "<fake_token_around_image>": 90,
        "<global-img>": 91,
        "<end_of_utterance>": 92,
        "<image>": IMAGE,
        **{name: 93 + number for number, name in enumerate(tiles)},
    }
    words = {"<unk>": 3, "\n": 4, "\n\n": 5, **special}
    free = [index for index in range(_WORDS) if index not in words.values()]
    words |= {f"w{index}": index for index in free}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        pad_token="<unk>",
        additional_special_tokens=list(special),
    )
    pixels = Idefics3ImageProcessor(
        size={"longest_edge": 2 * SIDE},
        max_image_size={"longest_edge": SIDE},
        do_image_splitting=True,
    )
    return Idefics3Processor(pixels, tokenizer, image_seq_len=TILE_TOKENS)
