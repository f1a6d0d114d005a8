"""A tiny Gemma 3 for images and text, its processor, and PEFT adapters for each part of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tests.export.small import SMALL

IMAGE, BEGIN, END = 117, 118, 119  # token ids
TOKENS: Final = 4  # tokens per image
SIZE: Final = 28
_WORDS: Final = 120
_SPECIAL: Final = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}
# The template puts a newline before an image, which merges with the newlines of the processor.
_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}{{ '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
)
_TEXT: Final = {
    **SMALL,
    "vocab_size": _WORDS,
    "num_hidden_layers": 3,
    "head_dim": 8,
    # Smaller than an image; the other layers have full attention.
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_VISION: Final = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 7,
    "initializer_range": 0.3,
}
FACTORS: Final = ("text", "vision", "all")  # adapters with low-rank factors on these parts
RECIPE: Final = "recipe"  # a fully trained projector, and low-rank factors on the decoder
_TARGETS: Final = r".*(q_proj|down_proj|fc1)"


def write_processor(place: Path) -> None:
    """Write a processor that splits words at spaces and makes each run of newlines one token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import Gemma3ImageProcessor, Gemma3Processor, PreTrainedTokenizerFast

    newlines = ["\n" * count for count in range(1, 6)]
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *newlines]
    words += [f"w{index}" for index in range(len(words), IMAGE)]
    words += _SPECIAL.values()
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n+"), "isolated"),
            pre_tokenizers.Split(" ", "removed"),
        ]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=_SPECIAL,
    )
    size = {"height": SIZE, "width": SIZE}
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size=size),
        tokenizer,
        chat_template=_TEMPLATE,
        image_seq_length=TOKENS,
    )
    processor.save_pretrained(place)
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(place)


def make(place: Path) -> None:
    """Write the checkpoint to `place / "model"`, and the adapters beside it."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        tie_word_embeddings=False,  # a tied tiny model would repeat its last token
        text_config=_TEXT,
        vision_config=_VISION,
        mm_tokens_per_image=TOKENS,
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    projector = model.model.multi_modal_projector
    with torch.no_grad():  # a new projector is all zeros
        projector.mm_input_projection_weight.normal_()
        projector.mm_soft_emb_norm.weight.normal_(std=0.2)
    model.save_pretrained(place / "model")
    write_processor(place / "model")
    options = peft.LoraConfig(r=4, target_modules=_TARGETS, task_type="CAUSAL_LM")
    made = peft.get_peft_model(model, options)
    for seed, part in enumerate(FACTORS):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.requires_grad:
                    own = "vision" if "vision_tower" in name else "text"
                    # Training would leave zeros in the head, which comes after the features.
                    used = part in ("all", own) and "vision_tower.head" not in name
                    size = 0.3 if used or "lora_A" in name else 0.0
                    parameter.copy_(torch.randn_like(parameter) * size)
        made.save_pretrained(place / part)
    _train_projector(place)


def _train_projector(place: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForImageTextToText

    options = peft.LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q_proj|down_proj)",
        modules_to_save=["multi_modal_projector"],
        task_type="CAUSAL_LM",
    )
    base = AutoModelForImageTextToText.from_pretrained(place / "model")
    made = peft.get_peft_model(base, options)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    made.save_pretrained(place / RECIPE)


def pictures(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Return random pixel values [count, 3, height, width]."""
    values = np.random.default_rng(seed).standard_normal((count, 3, SIZE, SIZE))
    return values.astype(np.float32)


def processed(model: Path, prompt: Any, images: int) -> list[int]:
    """Tokenize a prompt or a chat with `images` images by transformers' processor."""
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    text = prompt
    if not isinstance(prompt, str):
        text = processor.apply_chat_template(prompt, tokenize=False)
    shown = [[Image.new("RGB", (SIZE, SIZE))] * images] if images else None
    inputs = processor(images=shown, text=[text], add_special_tokens=isinstance(prompt, str))
    return list(map(int, inputs["input_ids"][0]))


def whole(model: Path, adapter: Path | None) -> Any:
    """Load the checkpoint in transformers, with the adapter applied by PEFT."""
    import peft
    from transformers import AutoModelForImageTextToText

    made = AutoModelForImageTextToText.from_pretrained(model).eval()
    return made if adapter is None else peft.PeftModel.from_pretrained(made, adapter).eval()


def given(ids: Sequence[int], images: NDArray[np.float32]) -> dict[str, Any]:
    """Return the inputs of transformers' model for tokens and images."""
    import torch

    tokens = torch.tensor([list(ids)])
    feeds = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if len(images):
        feeds["pixel_values"] = torch.from_numpy(images)
        feeds["token_type_ids"] = (tokens == IMAGE).long()
    return feeds


def logits(model: Any, ids: Sequence[int], images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return transformers' logits [tokens, vocabulary]."""
    import torch

    with torch.no_grad():
        return model(**given(ids, images)).logits[0].numpy()  # type: ignore[no-any-return]


def greedy(model: Any, ids: Sequence[int], images: NDArray[np.float32], new: int) -> list[int]:
    """Return the tokens that transformers' greedy generation appends."""
    feeds = given(ids, images)
    out = model.generate(**feeds, max_new_tokens=new, do_sample=False)
    return list(map(int, out[0, len(ids) :]))
