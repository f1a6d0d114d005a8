"""Pixel values of images equal those of transformers' processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loradeploy.bundle.image.pixels import pixel_settings
from loradeploy.errors import BundleError, DataError, UsageError

PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTImageProcessorPil", {"size": {"height": 20, "width": 24}}),
    "clip": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 20}, "crop_size": 16}),
    "siglip": ("SiglipImageProcessorPil", {"size": {"height": 20, "width": 20}}),
    "deit": (
        "DeiTImageProcessorPil",
        {"size": {"height": 24, "width": 24}, "crop_size": {"height": 20, "width": 20}},
    ),
    "unchanged": ("ViTImageProcessorPil", {"do_resize": False, "do_normalize": False}),
    "unscaled": ("ViTImageProcessorPil", {"do_rescale": False, "size": {"height": 8, "width": 8}}),
}
NOISE = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)


def settings_file(place: Path, **values: Any) -> Path:
    usual = {"size": {"height": 8, "width": 8}, "resample": 2}
    normal = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    file = place / "preprocessor_config.json"
    file.write_text(json.dumps({**usual, **normal, **values}))
    return place


@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixel_values_are_those_of_transformers(name: str, tall: bool, tmp_path: Path) -> None:
    import transformers

    kind, values = PROCESSORS[name]
    processor = getattr(transformers, kind)(**values)
    processor.save_pretrained(tmp_path)
    image = Image.fromarray(NOISE.transpose(1, 0, 2) if tall else NOISE)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    settings = pixel_settings(tmp_path)
    assert settings is not None
    found = settings.values(image)
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_an_image_is_the_same_from_a_file_and_in_memory(tmp_path: Path) -> None:
    settings = pixel_settings(settings_file(tmp_path))
    assert settings is not None and pixel_settings(tmp_path / "none") is None
    file = tmp_path / "image.png"
    Image.fromarray(NOISE).save(file)
    expected = settings.values(NOISE)
    assert (settings.values(file) == expected).all()
    assert (settings.values(Image.fromarray(NOISE)) == expected).all()
    turned = Image.Exif()
    turned[0x0112] = 6  # EXIF orientation: rotated by 90 degrees
    Image.fromarray(np.rot90(NOISE)).save(file, exif=turned)
    assert (settings.values(file) == expected).all(), "an image is read as it was held"
    gray = Image.fromarray(NOISE[:, :, 0])
    assert (settings.values(gray) == settings.values(NOISE[:, :, :1].repeat(3, 2))).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_pad": True}, "do_pad is True, which is not supported"),
        ({"crop_pct": 0.9}, "crop_pct is 0.9, which is not supported"),
        ({"do_resize": "yes"}, "do_resize is 'yes', expected true or false"),
        ({"crop_size": 4}, "has a crop_size, and no do_center_crop"),
        ({"size": 8, "do_center_crop": True, "crop_size": 4}, "size is 8: give height and width"),
        ({"size": {"longest_edge": 8}}, "size is .*: give height and width, or shortest_edge"),
        ({"size": {"shortest_edge": 0}}, "size is .*: give height and width, or shortest_edge"),
        ({"resample": None}, "resample is None, expected a number from 0 to 5"),
        ({"do_center_crop": True}, "crop_size is None: give height and width"),
        ({"image_mean": [0.5]}, "image_mean is .*, three numbers are needed"),
        ({"image_std": [1, 0, 1]}, "image_std is .*, expected numbers other than 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255', expected a number"),
    ],
)
def test_unsupported_settings_are_refused_by_name(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=message):
        pixel_settings(settings_file(tmp_path, **values))


def test_invalid_images_are_named(tmp_path: Path) -> None:
    crop = {"do_resize": False, "do_center_crop": True, "crop_size": 64}
    settings = pixel_settings(settings_file(tmp_path, **crop))
    assert settings is not None
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(NOISE).save(tmp_path / "drawing.eps")  # Pillow would let Ghostscript draw it
    for given, message in (
        (tmp_path / "drawing.eps", "drawing.eps cannot be read as an image: cannot identify"),
        (tmp_path / "text.png", "text.png cannot be read as an image: cannot identify"),
        (tmp_path / "missing.png", "missing.png"),
        (NOISE, r"image 1 is 37 x 53 pixels, smaller than the crop \[64, 64\]"),
    ):
        with pytest.raises(DataError, match=message):
            settings.values(given, "image 1")
    for wrong in (NOISE.astype(np.float32), NOISE[0], 7):
        with pytest.raises(UsageError, match="image 1 is "):
            settings.values(wrong, "image 1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "mode", "message"),
    [
        (NOISE[:, :, 0].astype(np.uint16) * 257, "I;16", r"asarray\(image\) >> 8"),
        (NOISE[:, :, 0].astype(np.int32) * 65537, "I", "scale its values to 0 to 255"),
        ((NOISE[:, :, 0] / 255).astype(np.float32), "F", "scale its values to 0 to 255"),
    ],
)
def test_images_with_more_than_8_bits_are_refused_with_advice(
    values: Any, mode: str, message: str, tmp_path: Path
) -> None:
    settings = pixel_settings(settings_file(tmp_path))
    assert settings is not None
    image, file = Image.fromarray(values), tmp_path / "image.tiff"
    assert image.mode == mode
    image.save(file)
    with pytest.raises(DataError, match=f"image.tiff has the mode {mode}, .*{message}"):
        settings.values(file)
    with pytest.raises(UsageError, match=f"image 1 has the mode {mode}, .*{message}"):
        settings.values(image, "image 1")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_images_of_other_8_bit_modes_are_read(mode: str, tmp_path: Path) -> None:
    settings = pixel_settings(settings_file(tmp_path))
    assert settings is not None
    image = Image.fromarray(NOISE).convert(mode)
    expected = settings.values(np.asarray(image.convert("RGB")))
    assert (settings.values(image) == expected).all()


@pytest.mark.parametrize("size", [(1, 200_000), (200_000, 1)], ids=["tall", "wide"])
def test_an_image_that_resizing_would_make_huge_is_refused(
    size: tuple[int, int], tmp_path: Path
) -> None:
    settings = pixel_settings(
        settings_file(tmp_path, size={"shortest_edge": 336}, do_center_crop=True, crop_size=336)
    )
    assert settings is not None
    with pytest.raises(DataError, match=r"after the model's resizing, more than 67,108,864: crop"):
        settings.values(Image.new("RGB", size))
    assert settings.values(Image.new("RGB", (1, 590))).shape == (3, 336, 336)
