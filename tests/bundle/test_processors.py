"""Images as vision-language models take them equal those of transformers' image processors."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loradeploy.bundle.image.opening import EncodedImage, opened
from loradeploy.bundle.image.processors import image_processor
from loradeploy.errors import BundleError, DataError

SMALL = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}
FEW = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 1024}}
# By case: the class in transformers without its suffix, and its settings.
PROCESSORS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llava": ("CLIPImageProcessor", {"size": {"shortest_edge": 20}, "crop_size": 16}),
    "llava of siglip": ("SiglipImageProcessor", {"size": {"height": 20, "width": 20}}),
    "llava's own": ("LlavaImageProcessor", {"size": {"shortest_edge": 9}, "crop_size": 9}),
    "gemma3": ("Gemma3ImageProcessor", {"size": {"height": 28, "width": 28}}),
    "idefics3": ("Idefics3ImageProcessor", SMALL),
    "smolvlm": ("SmolVLMImageProcessor", SMALL),
    "one size": ("Idefics3ImageProcessor", {**SMALL, "size": {"height": 40, "width": 24}}),
    "not resized first": ("SmolVLMImageProcessor", {**SMALL, "do_resize": False}),
    "not split": ("Idefics3ImageProcessor", {**SMALL, "do_image_splitting": False}),
    "qwen2_vl": ("Qwen2VLImageProcessor", FEW),
    "few pixels": ("Qwen2VLImageProcessor", {**FEW, "min_pixels": 4096, "max_pixels": 6000}),
    "usual": ("Qwen2VLImageProcessor", {}),
}
# Sizes of images: wide, tall, tiny, of exactly one tile, and with sides that round to others.
SIZES = ((37, 53), (61, 18), (3, 5), (16, 16), (64, 64), (33, 64))


def noise(height: int, width: int) -> Image.Image:
    random = np.random.default_rng([height, width])
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))


def by_transformers(name: str, values: Mapping[str, Any], image: Image.Image) -> Any:
    """Return the parts and the tiles that transformers' Pillow processor makes of an image."""
    import transformers

    processor = getattr(transformers, f"{name}Pil")(**values)
    if "max_image_size" in values:
        made = processor([[image]], return_row_col_info=True, return_tensors="np")
        return made["pixel_values"][0], (made["rows"][0][0], made["cols"][0][0])
    made = processor(image, return_tensors="np")
    pixels = made["pixel_values"]
    if "image_grid_thw" in made:
        _, down, across = made["image_grid_thw"][0]
        return pixels.reshape(1, down // 2, across // 2, 4, -1), (0, 0)
    return pixels, (0, 0)


@pytest.mark.parametrize("case", PROCESSORS)
def test_images_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    import transformers

    name, values = PROCESSORS[case]
    getattr(transformers, f"{name}Pil")(**values).save_pretrained(tmp_path)
    processor = image_processor(tmp_path)
    for size in SIZES:
        image = noise(*size)
        expected, tiles = by_transformers(name, values, image)
        found = processor.prepared(image, "it")
        assert found.tiles == tiles, size
        assert len(found.parts) == len(expected) == max(1, tiles[0] * tiles[1] + 1), size
        for part, own in zip(found.parts, expected, strict=True):
            assert part.shape == own.shape and part.dtype == np.float32, size
            np.testing.assert_allclose(part, own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "GIF"])
def test_the_colors_of_other_modes_are_those_of_transformers(mode: str, tmp_path: Path) -> None:
    import transformers

    size = {"height": 20, "width": 20}
    transformers.SiglipImageProcessorPil(size=size).save_pretrained(tmp_path)
    image = noise(30, 40).convert("P" if mode == "GIF" else mode)
    if mode in ("LA", "PA", "RGBA"):
        image.putalpha(noise(30, 40).convert("L"))
    elif mode == "GIF":
        image.info["transparency"] = 7  # a color of the palette
    expected, _ = by_transformers("SiglipImageProcessor", {"size": size}, image)
    (found,) = image_processor(tmp_path).prepared(opened(image), "it").parts
    np.testing.assert_allclose(found, expected[0], rtol=0, atol=1e-6)


def test_of_16_bit_colors_the_upper_8_bits_are_read_as_in_transformers() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)  # 1 x 1 pixels, 16 bits, RGB
    pixel = zlib.compress(b"\0" + struct.pack(">HHH", 0x12FF, 0x8000, 0xFFFF))
    parts = ((b"IHDR", header), (b"IDAT", pixel), (b"IEND", b""))
    content = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    assert np.asarray(EncodedImage(content, "it", 1).decoded()).tolist() == [[[0x12, 0x80, 0xFF]]]
    assert np.asarray(Image.open(BytesIO(content))).tolist() == [[[0x12, 0x80, 0xFF]]]


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_the_first_frame_of_an_animation_is_read(ending: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    file = tmp_path / f"moving.{ending}"
    frames[0].save(file, save_all=True, append_images=frames[1:], lossless=True)
    assert np.asarray(opened(file))[0, 0].tolist() == [255, 0, 0]
    assert np.asarray(EncodedImage(file.read_bytes(), "it", 64).decoded())[0, 0].tolist() == [
        255,
        0,
        0,
    ]


def test_images_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    file = tmp_path / "large.png"
    Image.new("1", (20_000, 20_000)).save(file)
    assert file.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"large.png .*decompression bomb|400,000,000|400000000"):
        opened(file)
    small = tmp_path / "small.png"
    Image.new("RGB", (9, 8)).save(small)
    with pytest.raises(DataError, match="it is 8 x 9 pixels, more than the 71 that are read"):
        EncodedImage(small.read_bytes(), "it", 71).decoded()


def test_only_some_formats_are_read_from_clients(tmp_path: Path) -> None:
    file = tmp_path / "image.ppm"
    noise(4, 4).save(file)
    opened(file)
    for content in (file.read_bytes(), b"", b"\x89PNG\r\n\x1a\n", b"<svg></svg>"):
        with pytest.raises(DataError, match="it cannot be read as an image"):
            EncodedImage(content, "it", 100).decoded()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_processor_type": "PixtralImageProcessor"}, "is 'PixtralImageProcessor', support"),
        ({}, "image_processor_type is None, supported are CLIPImageProcessor"),
        (
            {"image_processor_type": "Gemma3ImageProcessor", "do_pan_and_scan": True},
            "do_pan_and_scan is True, which is not supported",
        ),
        (
            {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
            "do_pad is True, which is not supported",
        ),
        (
            {"image_processor_type": "Idefics3ImageProcessor", "size": {"shortest_edge": 8}},
            "size is .*: give longest_edge, from 1 to 4096 pixels",
        ),
        (
            {"image_processor_type": "SmolVLMImageProcessor", "max_image_size": 8},
            "max_image_size is 8: give longest_edge",
        ),
        (
            {"image_processor_type": "SmolVLMImageProcessor", "do_image_splitting": 1},
            "do_image_splitting is 1: give true or false",
        ),
        (
            {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 0},
            "patch_size is 0: give a number above 0",
        ),
        (
            {"image_processor_type": "Qwen2VLImageProcessor", "max_pixels": "many"},
            "max_pixels is 'many': give a number of pixels",
        ),
        (
            {"image_processor_type": "Qwen2VLImageProcessor", "do_sample_frames": True},
            "do_sample_frames is True, which is not supported",
        ),
    ],
)
def test_unsupported_settings_are_refused_by_name(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(BundleError, match=message):
        image_processor(tmp_path)
    with pytest.raises(BundleError, match=r"none has no preprocessor_config.json"):
        image_processor(tmp_path / "none")


def test_the_settings_of_the_whole_processor_take_precedence(tmp_path: Path) -> None:
    import transformers

    transformers.SiglipImageProcessorPil().save_pretrained(tmp_path)
    own = transformers.SiglipImageProcessorPil(size={"height": 4, "width": 6}).to_dict()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": own}))
    (found,) = image_processor(tmp_path).prepared(noise(8, 8), "it").parts
    assert found.shape == (3, 4, 6)
    loaded = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert loaded.size["width"] == 6, "as in transformers"


def test_an_image_of_too_many_tiles_is_refused(tmp_path: Path) -> None:
    import transformers

    values = {"max_image_size": {"longest_edge": 512}, "do_resize": False}
    transformers.SmolVLMImageProcessorPil(**values).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="it is 1 x 200000 pixels, and 512 x 200192 after"):
        image_processor(tmp_path).prepared(Image.new("RGB", (200_000, 1)), "it")


def test_images_that_cannot_be_cut_into_patches_are_refused(tmp_path: Path) -> None:
    import transformers

    transformers.Qwen2VLImageProcessorPil(**FEW).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="it is 1 x 201 pixels, .* more than 200 times as long"):
        image_processor(tmp_path).prepared(noise(1, 201), "it")
    transformers.Qwen2VLImageProcessorPil(**FEW, do_resize=False).save_pretrained(tmp_path)
    image_processor(tmp_path).prepared(noise(8, 16), "it")
    with pytest.raises(DataError, match="it is 9 x 16 pixels, the model takes multiples of 8"):
        image_processor(tmp_path).prepared(noise(9, 16), "it")
