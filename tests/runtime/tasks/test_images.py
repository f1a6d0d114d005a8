"""Image classification: each row equals that of transformers and PEFT."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.adapter import load_adapter, save_adapter
from loradeploy.errors import BundleError, DataError, ModelError, UsageError
from tests.cli.calling import call
from tests.inputs.vit import COLORS, IMAGES, LABELS, color_folders, make_vit
from tests.tolerances import tolerance

# "second" was trained on two colors; "first" has the labels of its base.
LABELS_OF = {"first": LABELS, "second": sorted(COLORS)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT with its image processor, a PEFT adapter, a trained one, and their bundle."""
    import peft
    import torch
    import transformers

    place = tmp_path_factory.mktemp("images")
    model = make_vit(place / "model")
    settings = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"])
    auto = transformers.AutoModelForImageClassification
    adapted = peft.get_peft_model(auto.from_pretrained(model), settings)
    generator = torch.Generator().manual_seed(0)
    for key, values in adapted.named_parameters():
        if values.requires_grad:
            size = 0.1 if "lora_" in key else 0.3
            values.data = torch.randn(values.shape, generator=generator) * size
    adapted.save_pretrained(place / "first")
    colors = color_folders(place / "colors")
    task = {"task": "image-classification", "learning_rate": 2e-2, "max_steps": 20, "rank": 4}
    trained = ld.train(model, colors, place / "second", config=task)
    assert trained.accuracy_after == 1 and trained.loss_after < 0.5 * trained.loss_before
    adapters = {name: place / name for name in LABELS_OF}
    ld.export(model, place / "bundle", adapters=adapters)
    return place


def expected(place: Path, adapter: str | None, image: Any) -> Any:
    """Return the probabilities of transformers and PEFT."""
    import peft
    import torch
    import transformers

    labels = LABELS_OF.get(str(adapter), LABELS)
    model = transformers.AutoModelForImageClassification.from_pretrained(
        place / "model", num_labels=len(labels), ignore_mismatched_sizes=True
    )
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
    for image, name, result in zip(IMAGES, names, results, strict=True):
        right = expected(place, name, image)
        labels = LABELS_OF.get(str(name), LABELS)
        assert list(result.scores) == labels
        found = np.array(list(result.scores.values()))
        np.testing.assert_allclose(found, right, rtol=0, atol=tolerance("torch-onnx-tiny"))
        assert (result.label, result.adapter) == (labels[int(right.argmax())], name)
        assert result.labels == (result.label,)
    base = classify(IMAGES[0])[0].scores
    assert abs(base["cat"] - results[0].scores["cat"]) > 0.01, "the adapter changed nothing"
    apart = classify(IMAGES, names, batch_size=1)
    for one, other in zip(apart, results, strict=True):
        assert one.label == other.label


def test_trained_classes_are_recognized(place: Path) -> None:
    classify = ld.ImageClassifier(ld.AdapterSession(place / "bundle"))
    files = [place / "colors" / color / "0.png" for color in COLORS]
    assert [found.label for found in classify(files, "second")] == list(COLORS)


def test_parity_scores_a_classifier_on_held_out_images(place: Path, tmp_path: Path) -> None:
    colors = color_folders(tmp_path / "held-out", count=10)
    how: dict[str, Any] = {
        "model": place / "model",
        "phases": ["padded batch"],
        "certificate": False,
        "examples": 16,
    }
    report = ld.parity(place / "bundle", evaluate={"second": colors}, **how)
    assert report.passed, report.failures
    assert f"scores: 16 of 20 examples in {colors}" in report.notes
    scores = {score.backend: score for score in report.scores if score.metric == "accuracy"}
    assert scores.keys() == {"onnx-side-inputs", "onnx-merged"}
    for score in scores.values():
        assert (score.adapter, score.metric, score.examples) == ("second", "accuracy", 16)
        assert score.value == score.reference == 1.0
    # The labels decide: with every third one wrong, the accuracy is lower.
    rows = [
        {"image": str(file), "label": sorted(COLORS)[(file.parent.name == "red") ^ (n % 3 == 0)]}
        for n, file in enumerate(sorted(colors.glob("*/*.png")))
    ]
    (tmp_path / "wrong.jsonl").write_text("\n".join(map(json.dumps, rows)))
    few: dict[str, Any] = {**how, "examples": 20, "backends": ["onnx-side-inputs"]}
    score, f1 = ld.parity(
        place / "bundle", evaluate={"second": tmp_path / "wrong.jsonl"}, **few
    ).scores
    assert f1.metric == "macro_f1" and f1.value == f1.reference < 1.0
    assert score.value == score.reference == 13 / 20
    with pytest.raises(DataError, match="first: .*the label 'blue' is not one of those trained on"):
        ld.parity(place / "bundle", evaluate={"first": colors}, **few)


def test_a_graph_with_another_adapter_loses_its_accuracy_on_images(
    place: Path, tmp_path: Path
) -> None:
    right = load_adapter(place / "second")
    reversed_head = {name: -np.asarray(values) for name, values in right.saved.items()}
    save_adapter(dataclasses.replace(right, saved=reversed_head), tmp_path / "second")
    adapters = {"second": tmp_path / "second"}
    ld.export(place / "bundle", tmp_path / "merged", adapters=adapters, merge=True)
    report = ld.parity(
        tmp_path / "merged",
        model=place / "model",
        adapters={"second": place / "second"},
        evaluate=place / "colors",
        backends=["onnx-merged"],
        phases=["padded batch"],
        certificate=False,
        shrink=False,
        localize=False,
    )
    assert [score.metric for score in report.scores] == ["accuracy", "macro_f1"]
    for score in report.scores:
        assert score.reference == 1.0 and score.value == 0.0 and not score.passed
        assert "certainly worse" in str(score.message)


def test_data_without_images_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    task = {"task": "image-classification", "max_steps": 1}
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    data = tmp_path / "data.jsonl"
    for source, row, message in (
        (
            data,
            {"image": "text.png", "label": "a"},
            "line 1: .*text.png cannot be read",
        ),
        (data, {"image": "none.png", "label": "a"}, "line 1: .*none.png"),
        (data, {"label": "a"}, "line 1: image is None, expected a text"),
        (data, {"image": "text.png"}, "line 1: label is None, expected a name or a whole number"),
        (tmp_path, {}, "has no folder of images"),
    ):
        data.write_text("\n".join(json.dumps({**row, **more}) for more in ({}, {"label": "b"})))
        if "label" not in row:
            data.write_text(json.dumps(row))
        with pytest.raises(DataError, match=message):
            ld.train(place / "model", source, tmp_path / "adapter", config=task)
    bare = shutil.copytree(place / "model", tmp_path / "model")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="has no preprocessor_config.json"):
        ld.train(bare, place / "colors", tmp_path / "adapter", config=task)


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


def test_unsupported_images_are_refused_by_name(place: Path, tmp_path: Path) -> None:
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
