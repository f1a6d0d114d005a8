"""The towers of CLIP and SigLIP: vectors equal those of transformers and PEFT, per row."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.adapter.files.peft import load_adapter, save_adapter
from loradeploy.bundle.graph_form import form_of
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import (
    AdapterMismatchError,
    BundleError,
    DataError,
    ExportError,
    ModelError,
    UsageError,
)
from loradeploy.parity.checks.mistakes import wrong_adapter
from tests.cli.calling import call
from tests.inputs.edits import edited_json
from tests.inputs.towers import POSITIONS, TEXTS, make_adapter, make_clip, make_deit, make_siglip
from tests.inputs.vit import IMAGES
from tests.tolerances import tolerance

TEXT_TASK, IMAGE_TASK = "feature-extraction", "image-feature-extraction"
LONG = " ".join(["a photo of the sea"] * 9)
# Adapters by model: for both towers, and for one tower that PEFT wrapped as a separate model.
ADAPTERS = {
    "clip": {"both": "CLIPModel", "one": "CLIPTextModelWithProjection"},
    "siglip": {"both": "SiglipModel", "one": "SiglipVisionModel"},
    "metaclip_2": {"both": "MetaClip2Model"},
    "siglip2": {"both": "Siglip2Model"},
    "deit": {"both": "DeiTModel"},
}
MAKERS: dict[str, Callable[[Path], Path]] = {
    "clip": make_clip,
    "siglip": make_siglip,
    "metaclip_2": lambda place: make_clip(place, "MetaClip2"),
    "siglip2": lambda place: make_siglip(place, "Siglip2"),
    "deit": make_deit,
}
PROCESSORS = {"siglip": "SiglipImageProcessorPil", "deit": "DeiTImageProcessorPil"}
OF_ONE = {"clip": TEXT_TASK, "siglip": IMAGE_TASK}
THIN, RARE = pytest.mark.breadth(2), pytest.mark.breadth(4)
BUNDLES = [
    ("clip", TEXT_TASK),
    ("siglip", TEXT_TASK),
    pytest.param("clip", IMAGE_TASK, marks=THIN),
    pytest.param("siglip", IMAGE_TASK, marks=THIN),
    pytest.param("metaclip_2", TEXT_TASK, marks=RARE),
    pytest.param("metaclip_2", IMAGE_TASK, marks=RARE),
    pytest.param("siglip2", TEXT_TASK, marks=RARE),
    pytest.param("deit", IMAGE_TASK, marks=RARE),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, PEFT adapters for both towers and, for CLIP and SigLIP, for one."""
    import transformers

    place = tmp_path_factory.mktemp("towers")
    for name, make in MAKERS.items():
        make(place / name)
        for seed, (adapter, kind) in enumerate(ADAPTERS[name].items()):
            model = getattr(transformers, kind).from_pretrained(place / name)
            targets: Any = "all-linear" if adapter == "both" else ["q_proj", "fc1"]
            make_adapter(model, place / f"{name}-{adapter}", seed, target_modules=targets)
    return place


def bundle(place: Path, name: str, task: str) -> Path:
    """Return the bundle of a tower, exported at first use."""
    output = place / f"{name}.{task}"
    if not output.exists():
        adapters = {"both": place / f"{name}-both"}
        if OF_ONE.get(name) == task:
            adapters["one"] = place / f"{name}-one"
        ld.export(place / name, output, adapters=adapters, task=task)
    return output


def expected(place: Path, name: str, task: str, adapter: str | None, rows: Sequence[Any]) -> Any:
    """Return the normalized vectors of transformers and PEFT."""
    import peft
    import torch
    import transformers

    kind = ADAPTERS[name].get(str(adapter), ADAPTERS[name]["both"])
    model = getattr(transformers, kind).from_pretrained(place / name)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, place / f"{name}-{adapter}").get_base_model()
    if task == TEXT_TASK:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place / name)
        padding = "max_length" if name.startswith("siglip") else True
        feeds = tokenizer(list(rows), return_tensors="pt", truncation=True, padding=padding)
        features = "get_text_features"
    else:
        kind = PROCESSORS.get(name, "CLIPImageProcessorPil")
        processor = getattr(transformers, kind).from_pretrained(place / name)
        feeds = processor(list(rows), return_tensors="pt")
        features = "get_image_features"
    with torch.no_grad():
        found = getattr(model.eval(), features, model)(**feeds)
    vectors = found["text_embeds" if "text_embeds" in found else "pooler_output"].numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_wrong(adapter: Path, place: Path) -> Path:
    """Write another adapter with the same shapes."""
    wrong = wrong_adapter(load_adapter(adapter))
    assert wrong is not None
    save_adapter(wrong, place)
    return place


def embedder(place: Path, name: str, task: str) -> Any:
    session = ld.AdapterSession(bundle(place, name, task))
    return ld.TextEmbedder(session) if task == TEXT_TASK else ld.ImageEmbedder(session)


@pytest.mark.parametrize(("name", "task"), BUNDLES)
def test_each_row_has_the_vector_of_its_own_adapter(place: Path, name: str, task: str) -> None:
    embed = embedder(place, name, task)
    rows = [*TEXTS, LONG] if task == TEXT_TASK else IMAGES
    adapters = [None, *embed.session.adapters]
    given = [adapters[row % len(adapters)] for row in range(len(rows))]
    together = embed(rows, given)
    for adapter in adapters:
        right = expected(place, name, task, adapter, rows)
        found = embed(rows, adapter)
        limit = tolerance("torch-onnx-tiny")
        np.testing.assert_allclose(found, right, rtol=0, atol=limit)
        own = [row for row, its in enumerate(given) if its == adapter]
        np.testing.assert_allclose(together[own], right[own], rtol=0, atol=limit)
        if adapter is not None:
            assert np.abs(found - embed(rows)).max() > 0.02, f"{adapter} changed nothing"
    apart = embed(rows, given, batch_size=1)
    np.testing.assert_allclose(apart, together, rtol=0, atol=limit)


@pytest.mark.breadth(2)
@pytest.mark.parametrize(
    ("name", "task"),
    [("clip", IMAGE_TASK), ("clip", TEXT_TASK), ("siglip", TEXT_TASK), ("siglip", IMAGE_TASK)],
)
def test_parity_passes_for_a_tower_and_fails_wrong_adapters(
    place: Path, name: str, task: str
) -> None:
    report = ld.parity(
        bundle(place, name, task),
        model=place / name,
        controls=True,
        phases=["one row", "padded batch"],
        backends=["peft", "onnx-side-inputs", "onnx-mixed"],
        certificate=False,
    )
    assert report.passed, report.failures
    assert report.controls and all(control.caught for control in report.controls)


@pytest.mark.breadth(2)
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_scores_of_a_text_tower_are_those_of_transformers_and_peft(
    place: Path, name: str, tmp_path: Path
) -> None:
    first = ["a photo of a red cat", "the blue sea", "dog", "the sky"]
    second, scores = ["the red cat", "a blue sky", "a photo of a dog", "red"], [0.9, 0.2, 0.6, 0.1]
    data = tmp_path / "scored.jsonl"
    lines = zip(first, second, scores, strict=True)
    keys = ("text", "text_pair", "score")
    data.write_text("\n".join(json.dumps(dict(zip(keys, line, strict=True))) for line in lines))
    few: dict[str, Any] = {"model": place / name, "phases": ["padded batch"], "certificate": False}
    report = ld.parity(bundle(place, name, TEXT_TASK), evaluate=data, **few)
    assert report.passed, report.failures
    found = {s.adapter: s for s in report.scores if s.metric == "pearson"}
    for adapter in (None, "both"):
        sides = [expected(place, name, TEXT_TASK, adapter, texts) for texts in (first, second)]
        right = np.corrcoef((sides[0] * sides[1]).sum(axis=1), scores)[0, 1]
        assert found[adapter].reference == pytest.approx(right, abs=1e-5)
        assert found[adapter].value == pytest.approx(right, abs=1e-5)
    assert abs(found["both"].value - found[None].value) > 0.01, "the adapter changed nothing"

    adapters = {"both": place / f"{name}-both"}
    wrong = make_wrong(adapters["both"], tmp_path / "wrong")
    ld.export(place / name, tmp_path / "merged", adapters=[wrong], task=TEXT_TASK, merge=True)
    report = ld.parity(
        tmp_path / "merged", adapters=adapters, evaluate=data, backends=["onnx-merged"], **few
    )
    (score,) = [s for s in report.scores if s.metric == "pearson"]
    assert abs(score.difference) > 0.01, "another adapter scores the same"
    assert not report.passed


@pytest.mark.parametrize(("name", "task"), [("clip", TEXT_TASK), ("siglip", IMAGE_TASK)])
def test_an_adapter_is_merged_into_a_tower(
    place: Path, name: str, task: str, tmp_path: Path
) -> None:
    adapters = {"one": place / f"{name}-one"}
    ld.export(bundle(place, name, task), tmp_path / "merged", adapters=adapters, merge=True)
    rows = TEXTS if task == TEXT_TASK else IMAGES
    session = ld.AdapterSession(tmp_path / "merged")
    embed = ld.TextEmbedder(session) if task == TEXT_TASK else ld.ImageEmbedder(session)
    right = expected(place, name, task, "one", rows)
    np.testing.assert_allclose(embed(rows), right, rtol=0, atol=tolerance("torch-onnx-tiny"))
    once: dict[str, Any] = {"model": place / name, "adapters": adapters, "certificate": False}
    report = ld.parity(tmp_path / "merged", phases=["padded batch"], **once)
    assert report.passed, report.failures


def test_siglip_pads_texts_to_the_full_length_and_clip_pools_at_the_end_token(
    place: Path,
) -> None:
    inputs = read_manifest(bundle(place, "siglip", TEXT_TASK)).inputs
    assert [(spec.name, spec.shape) for spec in inputs] == [("input_ids", ("batch", POSITIONS))]
    manifest = read_manifest(bundle(place, "clip", TEXT_TASK))
    assert [spec.name for spec in manifest.inputs] == ["input_ids", "attention_mask"]
    assert (manifest.tower, manifest.padding) == ("text", "right")
    config = json.loads((bundle(place, "clip", TEXT_TASK) / "config.json").read_text())
    assert config["architectures"] == ["CLIPTextModelWithProjection"]


def test_the_number_of_images_is_the_dimension_batch_and_can_be_fixed(
    place: Path, tmp_path: Path
) -> None:
    images = bundle(place, "clip", IMAGE_TASK)
    manifest = read_manifest(images)
    assert [spec.shape for spec in manifest.inputs] == [("batch", 3, 16, 16)]
    assert [spec.shape for spec in manifest.outputs] == [("batch", 24)]
    both = {"both": place / "clip-both"}
    fixed = ld.export(images, tmp_path / "fixed", adapters=both, fixed={"batch": len(IMAGES)})
    assert [spec.shape for spec in fixed.outputs] == [(len(IMAGES), 24)]
    assert form_of(fixed).static_shapes == {"batch": len(IMAGES)}
    found = ld.ImageEmbedder(ld.AdapterSession(tmp_path / "fixed"))(IMAGES, "both")
    right = embedder(place, "clip", IMAGE_TASK)(IMAGES, "both")
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-6)


def test_zero_shot_labels_are_those_of_the_whole_model(place: Path) -> None:
    import torch
    import transformers

    images = embedder(place, "clip", IMAGE_TASK)(IMAGES)
    texts = embedder(place, "clip", TEXT_TASK)(TEXTS)
    config = json.loads((bundle(place, "clip", IMAGE_TASK) / "config.json").read_text())
    found = np.exp(config["logit_scale"]) * images @ texts.T
    model = transformers.CLIPModel.from_pretrained(place / "clip").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "clip")
    processor = transformers.CLIPImageProcessorPil.from_pretrained(place / "clip")
    feeds = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        right = model(**feeds, **processor(IMAGES, return_tensors="pt")).logits_per_image
    np.testing.assert_allclose(found, right.numpy(), rtol=0, atol=1e-4)


def test_the_unused_part_for_the_other_tower_is_named(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = ld.AdapterSession(bundle(place, "clip", IMAGE_TASK))
    with caplog.at_level(logging.WARNING):
        session.load("late", place / "clip-both")
    (reported,) = (record.message for record in caplog.records)
    assert "only the adapter's part for the image tower is used: text_model." in reported
    assert "and 12 more are for the text tower" in reported
    embed = ld.ImageEmbedder(session)
    np.testing.assert_array_equal(embed(IMAGES, "late"), embed(IMAGES, "both"))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("clip-one", r"all of the adapter is for the text tower \(text_model.*export the other"),
        ("siglip-one", "does not fit|takes"),
        ("bare", "does not show its tower, .* put 'text_model.' or 'vision_model.'"),
    ],
)
def test_an_adapter_of_another_tower_is_refused(
    place: Path, adapter: str, message: str, tmp_path: Path
) -> None:
    source = place / adapter
    session = ld.AdapterSession(bundle(place, "clip", IMAGE_TASK))
    if adapter == "siglip-one":  # same names and shapes: only the text tower tells them apart
        session = ld.AdapterSession(bundle(place, "clip", TEXT_TASK))
        message = "all of the adapter is for the image tower"
    if adapter == "bare":
        source = shutil.copytree(place / "siglip-one", tmp_path / "bare")
        config = json.loads((source / "adapter_config.json").read_text())
        (source / "adapter_config.json").write_text(json.dumps({**config, "auto_mapping": None}))
    with pytest.raises(AdapterMismatchError, match=message):
        session.load("wrong", source)
    if adapter == "clip-one":
        with pytest.raises(AdapterMismatchError, match=message):
            ld.export(place / "clip", tmp_path / "b", adapters=[source], task=IMAGE_TASK)


@pytest.mark.parametrize(
    ("name", "task", "error", "message"),
    [
        (
            "clip",
            None,
            UsageError,
            'give `task="feature-extraction"` for its text tower or `task="image-feature-',
        ),
        ("siglip", "causal-lm", UsageError, "a tower for texts and one for images, each a bundle"),
        ("siglip", "sequence-classification", UsageError, "each a bundle of its own"),
    ],
)
def test_the_task_selects_the_tower(
    place: Path, name: str, task: str | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        ld.export(place / name, tmp_path / "b", task=task)


def test_a_model_that_cannot_be_a_tower_is_refused(place: Path, tmp_path: Path) -> None:
    left = shutil.copytree(place / "siglip", tmp_path / "left")
    settings = json.loads((left / "tokenizer_config.json").read_text())
    (left / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    with pytest.raises(ModelError, match="padding_side 'left'"):
        ld.export(left, tmp_path / "b", task=TEXT_TASK)
    config = json.loads((place / "clip" / "config.json").read_text())
    for change, message in (
        ({"model_type": "siglip2", "architectures": ["Siglip2Model"]}, "takes patches of images"),
        ({"model_type": "align", "architectures": ["AlignModel"]}, "AlignModel has a tower"),
        (
            {"model_type": "siglip_vision_model", "architectures": ["SiglipVisionModel"]},
            "is one tower of a model, which is exported from the directory of the whole",
        ),
    ):
        other = shutil.copytree(place / "clip", tmp_path / str(change["model_type"]))
        (other / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ExportError, match=message):
            ld.export(other, tmp_path / "b", task=IMAGE_TASK)


def test_feature_maps_instead_of_states_are_refused_by_name(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "image_size": 32}
    transformers.ConvNextModel(transformers.ConvNextConfig(**sizes)).save_pretrained(tmp_path / "m")
    with pytest.raises(ExportError, match="ConvNextModel gives last_hidden_state of 4 dimensions"):
        ld.export(tmp_path / "m", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.breadth(3)
@pytest.mark.parametrize("kind", ["Siglip"])
def test_a_classifier_on_an_image_tower_has_the_scores_of_peft(kind: str, tmp_path: Path) -> None:
    import peft
    import torch
    import transformers

    make = {"Siglip": make_siglip, "CLIP": make_clip}[kind]
    make(tmp_path / "towers")
    auto = transformers.AutoModelForImageClassification
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "towers", num_labels=3)
    getattr(transformers, f"{kind}ForImageClassification")(config).save_pretrained(tmp_path / "m")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "towers", backend="pil")
    processor.save_pretrained(tmp_path / "m")
    make_adapter(
        auto.from_pretrained(tmp_path / "m"),
        tmp_path / "it",
        1,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["classifier"],
    )
    manifest = ld.export(tmp_path / "m", tmp_path / "b", adapters={"it": tmp_path / "it"})
    assert manifest.task == "image-classification"
    classify = ld.ImageClassifier(ld.AdapterSession(tmp_path / "b"))
    feeds = processor(IMAGES, return_tensors="pt")
    for name in (None, "it"):
        model = auto.from_pretrained(tmp_path / "m")
        if name is not None:
            model = peft.PeftModel.from_pretrained(model, tmp_path / name)
        with torch.no_grad():
            right = model.eval()(**feeds).logits.softmax(-1).numpy()
        found = np.array([list(row.scores.values()) for row in classify(IMAGES, name)])
        np.testing.assert_allclose(found, right, rtol=0, atol=tolerance("torch-onnx-tiny"))
        if name is None:
            base = found
    assert np.abs(found - base).max() > 0.02, "the adapter changed nothing"


def test_the_command_prints_the_vector_of_an_image(place: Path, tmp_path: Path) -> None:
    from PIL import Image

    for number, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    lines = [{"text": str(tmp_path / f"{n}.png"), "adapter": "both"} for n in range(3)]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("\n".join(map(json.dumps, lines)))
    printed = call("run", bundle(place, "clip", IMAGE_TASK), "--input", asked, "--json")
    answers = [json.loads(line) for line in printed.splitlines()]
    assert [answer["image"] for answer in answers] == [line["text"] for line in lines]
    right = embedder(place, "clip", IMAGE_TASK)(IMAGES, "both")
    found = np.array([answer["embedding"] for answer in answers])
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-6)
    assert call("run", bundle(place, "clip", TEXT_TASK), TEXTS[0]).startswith("[")


def _grayscale(file: Path) -> None:
    from PIL import Image

    Image.fromarray(IMAGES[0][..., 0]).save(file)


def _transparent(file: Path) -> None:
    from PIL import Image

    Image.fromarray(IMAGES[0]).convert("RGBA").save(file)


def _animated(file: Path) -> None:
    from PIL import Image

    first, second = (Image.fromarray(image) for image in IMAGES[:2])
    first.save(file, save_all=True, append_images=[second], format="PNG")


@pytest.mark.parametrize("make", [_grayscale, _transparent, _animated])
def test_images_of_all_formats_are_read_like_the_processor_reads_them(
    place: Path, make: Callable[[Path], None], tmp_path: Path
) -> None:
    from PIL import Image

    make(tmp_path / "image.png")
    found = embedder(place, "clip", IMAGE_TASK)(tmp_path / "image.png", "both")
    with Image.open(tmp_path / "image.png") as image:
        right = expected(place, "clip", IMAGE_TASK, "both", [image.convert("RGB")])
    np.testing.assert_allclose(found, right, rtol=0, atol=tolerance("torch-onnx-tiny"))


def test_images_that_cannot_be_read_are_named(place: Path, tmp_path: Path) -> None:
    from PIL import Image

    embed = embedder(place, "clip", IMAGE_TASK)
    Image.fromarray(IMAGES[0][..., 0].astype(np.uint16) * 200).save(tmp_path / "deep.png")
    Image.fromarray(IMAGES[0]).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    for name, message in (
        ("deep.png", "deep.png has the mode I;16"),
        ("cut.png", "cut.png cannot be read as an image"),
        ("none.png", "none.png"),
    ):
        with pytest.raises(DataError, match=message):
            embed([IMAGES[0], tmp_path / name])
    with pytest.raises(UsageError, match="there are no images"):
        embed([])
    other = shutil.copytree(bundle(place, "clip", IMAGE_TASK), tmp_path / "other")
    with edited_json(other / "preprocessor_config.json") as settings:
        settings["crop_size"] = {"height": 12, "width": 12}
    with pytest.raises(BundleError, match=r"makes pixel values \[3, 12, 12\], the graph takes"):
        ld.ImageEmbedder(ld.AdapterSession(other))(IMAGES[0])
    with pytest.raises(UsageError, match="it gives no vectors of images"):
        ld.ImageEmbedder(ld.AdapterSession(bundle(place, "clip", TEXT_TASK)))
    with pytest.raises(UsageError, match="it gives no embeddings"):
        ld.TextEmbedder(ld.AdapterSession(bundle(place, "clip", IMAGE_TASK)))
