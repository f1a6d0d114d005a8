"""Images are classified as transformers and PEFT do, row by row."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.errors import BundleError, UsageError
from tests.cli.calling import call
from tests.tolerances import tolerance

LABELS = ["cat", "dog", "bird"]
IMAGES = [np.random.default_rng(n).integers(0, 256, (24, 30, 3), np.uint8) for n in range(3)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT with its processor, two adapters by PEFT, and the bundle of them."""
    import peft
    import torch
    import transformers

    place = tmp_path_factory.mktemp("images")
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
    auto = transformers.AutoModelForImageClassification
    auto.from_config(config).save_pretrained(place / "model")
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(place / "model")
    for seed, name in enumerate(("first", "second")):
        settings = peft.LoraConfig(
            r=2 + seed, target_modules="all-linear", modules_to_save=["classifier"]
        )
        model = peft.get_peft_model(auto.from_pretrained(place / "model"), settings)
        generator = torch.Generator().manual_seed(seed)
        for key, values in model.named_parameters():
            if values.requires_grad:
                size = 0.1 if "lora_" in key else 0.3
                values.data = torch.randn(values.shape, generator=generator) * size
        model.save_pretrained(place / name)
    adapters = {name: place / name for name in ("first", "second")}
    ld.export(place / "model", place / "bundle", adapters=adapters)
    return place


def expected(place: Path, adapter: str | None, image: Any) -> Any:
    """The probabilities by transformers and PEFT."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForImageClassification.from_pretrained(place / "model")
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, place / adapter)
    processor = transformers.ViTImageProcessorPil.from_pretrained(place / "model")
    with torch.no_grad():
        found = model.eval()(**processor(image, return_tensors="pt")).logits
    return found.softmax(-1)[0].numpy()


def test_each_image_is_classified_with_its_own_adapter(place: Path) -> None:
    classify = ld.ImageClassifier(ld.AdapterSession(place / "bundle"))
    names = ["first", None, "second"]
    results = classify(IMAGES, names)
    seen = []
    for image, name, result in zip(IMAGES, names, results, strict=True):
        right = expected(place, name, image)
        seen.append(right)
        found = np.array([result.scores[label] for label in LABELS])
        np.testing.assert_allclose(found, right, rtol=0, atol=tolerance("torch-onnx-tiny"))
        assert (result.label, result.adapter) == (LABELS[int(right.argmax())], name)
        assert result.labels == (result.label,)
    alone = classify(IMAGES[0], "second")[0].scores
    assert abs(alone["cat"] - results[0].scores["cat"]) > 0.01, "the adapter changed nothing"
    apart = classify(IMAGES, names, batch_size=1)
    for one, other in zip(apart, results, strict=True):
        assert one.label == other.label


def test_the_command_labels_images_by_their_paths(place: Path, tmp_path: Path) -> None:
    from PIL import Image

    files = []
    for number, image in enumerate(IMAGES[:2]):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(image).save(files[-1])
    asked = tmp_path / "asked.jsonl"
    rows = [{"prompt": str(file), "adapter": name} for file in files for name in ("first", None)]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = call("run", place / "bundle", "--input", asked, "--json").splitlines()
    classify = ld.ImageClassifier(ld.AdapterSession(place / "bundle"))
    for line, row in zip(printed, rows, strict=True):
        answer = json.loads(line)
        (right,) = classify(row["prompt"], row["adapter"])
        assert (answer["image"], answer["scores"]) == (row["prompt"], right.scores)
    plain = call("run", place / "bundle", files[0], "--adapter", "second")
    (right,) = classify(files[0], "second")
    assert plain == f"{right.label}\t{right.score:.4f}\n"


def test_what_does_not_fit_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    session = ld.AdapterSession(place / "bundle")
    with pytest.raises(UsageError, match="there are no images"):
        ld.ImageClassifier(session)([])
    with pytest.raises(UsageError, match="image 2 is 7: give a path"):
        ld.ImageClassifier(session)([IMAGES[0], 7])  # type: ignore[list-item]
    other = shutil.copytree(place / "bundle", tmp_path / "bundle")
    file = other / "preprocessor_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "size": {"height": 8, "width": 8}}))
    with pytest.raises(BundleError, match=r"makes pixel values \[3, 8, 8\], the graph takes"):
        ld.ImageClassifier(ld.AdapterSession(other))(IMAGES[0])
    file.unlink()
    with pytest.raises(BundleError, match="has no preprocessor_config"):
        ld.ImageClassifier(ld.AdapterSession(other))
    session.manifest = dataclasses.replace(session.manifest, task="sequence-classification")
    with pytest.raises(UsageError, match="no classifier of images"):
        ld.ImageClassifier(session)
