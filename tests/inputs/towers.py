"""Tiny text-image models (CLIP, SigLIP, …), their processors, and PEFT adapters for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = ["a", "photo", "of", "red", "blue", "cat", "dog", "the", "sky", "sea"]
TEXTS = ["a photo of a red cat", "the blue sea", "dog"]
_BODY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
POSITIONS = 12


def _tokenizer(place: Path, *, siglip: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<s>", "</s>", *WORDS]
    model = models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>" if siglip else "<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=POSITIONS,
        padding_side="right",
        **({"model_input_names": ["input_ids"]} if siglip else {}),
    ).save_pretrained(place)


def make_clip(place: Path, kind: str = "CLIP") -> Path:
    """Write a CLIP model with random weights, its tokenizer and its image processor.

    `kind` is the prefix of the class names in transformers: models of CLIP's structure work too.
    """
    import torch
    import transformers

    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    text = {**_BODY, **ids, "vocab_size": 14, "max_position_embeddings": POSITIONS}
    vision = {**_BODY, "image_size": 16, "patch_size": 4}
    sizes = {"projection_dim": 24, "initializer_factor": 3.0}
    config = getattr(transformers, f"{kind}Config")(
        text_config={**text, **sizes}, vision_config={**vision, **sizes}, **sizes
    )
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(place)
    _tokenizer(place, siglip=False)
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(place)
    return place


def make_siglip(place: Path, kind: str = "Siglip") -> Path:
    """Write the same for SigLIP, which pads texts to the full length."""
    import torch
    import transformers

    text = {**_BODY, "vocab_size": 14, "max_position_embeddings": POSITIONS, "projection_size": 32}
    sizes = {"num_patches": 16} if kind == "Siglip2" else {"image_size": 16}
    config = getattr(transformers, f"{kind}Config")(
        text_config={**text, "eos_token_id": 3, "bos_token_id": 2},
        vision_config={**_BODY, **sizes, "patch_size": 4},
    )
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(place)
    _tokenizer(place, siglip=True)
    size = {"height": 16, "width": 16}
    transformers.SiglipImageProcessorPil(size=size).save_pretrained(place)
    return place


def make_deit(place: Path) -> Path:
    """Write a DeiT model (one tower) with random weights, and its image processor."""
    import torch
    import transformers

    config = transformers.DeiTConfig(**_BODY, image_size=16, patch_size=4, initializer_range=0.15)
    torch.manual_seed(0)
    transformers.DeiTModel(config).save_pretrained(place)
    size = {"height": 16, "width": 16}
    transformers.DeiTImageProcessorPil(size=size, do_center_crop=False).save_pretrained(place)
    return place


def make_adapter(model: Any, place: Path, seed: int, **settings: Any) -> Path:
    """Write an adapter with random factors for `model`, by PEFT."""
    import peft
    import torch

    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings))
    generator = torch.Generator().manual_seed(seed)
    for key, values in adapted.named_parameters():
        if values.requires_grad:
            unused = "head.attention" in key  # reads the weight without the factors
            size = 0.0 if unused else 0.1
            values.data = torch.randn(values.shape, generator=generator) * size
    adapted.save_pretrained(place)
    return place
