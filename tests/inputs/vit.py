"""A tiny ViT with its image processor, and images of two colors to train it on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

LABELS = ["cat", "dog", "bird"]
COLORS = {"red": (220, 30, 40), "blue": (30, 40, 220)}
IMAGES = [np.random.default_rng(n).integers(0, 256, (24, 30, 3), np.uint8) for n in range(3)]


def make_vit(place: Path) -> Path:
    """Write the model, with random weights and three labels, to the directory `place`."""
    import torch
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        id2label=dict(enumerate(LABELS)),
        label2id={label: n for n, label in enumerate(LABELS)},
    )
    config.initializer_range = 0.15
    torch.manual_seed(0)
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(place)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(place)
    return place


def color_folders(place: Path, count: int = 6) -> Path:
    """Write one directory of images per color; images of one color differ by noise."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for name, color in COLORS.items():
        (place / name).mkdir(parents=True)
        for number in range(count):
            noise = draw.integers(-30, 31, (20, 26, 3))
            pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / name / f"{number}.png")
    return place
