"""Qwen-VL in two bundles: a decoder with three-dimensional positions and a tower of patches.

The reference is transformers with PEFT, for images and text together.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

import loradeploy as ld
from loradeploy.bundle.names import MROPE_POSITION_IDS
from loradeploy.errors import ExportError, UsageError
from loradeploy.export import trace
from loradeploy.export.passes.tokens import mrope
from loradeploy.export.trace import module
from loradeploy.export.trace.architectures import qwen_vision
from loradeploy.parity.report.results import ParityReport
from loradeploy.runtime.decoding.graph import TokenEmbeds
from loradeploy.runtime.decoding.mrope import grid_positions
from tests.conftest import once
from tests.export.reference import difference
from tests.inputs.edits import edited_json
from tests.inputs.qwen_vl import (
    END,
    IMAGE,
    NEW,
    PARTS,
    START,
    TEXTS,
    VIDEO,
    VISION,
    Whole,
    image,
    make,
)
from tests.inputs.qwen_vl import tokens_of as tokens
from tests.runtime.feeds import feeds
from tests.tolerances import tolerance

# Larger and smaller than a window, with full and partial windows, one row, and one token.
GRIDS: Final = ((3, 3), (5, 4), (1, 7), (6, 3), (1, 1), (2, 5))
ALLOWED: Final = tolerance("torch-onnx-tiny")
DECODER_PHASES: Final = ("padded batch", "embeddings")


def _prepare(family: str, place: Path) -> None:
    make(family, place)
    adapters = {name: place / name for name in PARTS}
    for task, name, own in (
        ("causal-lm", "decoder", ("text", "all")),
        ("vision-tower", "tower", ("vision", "projector", "all")),
    ):
        given = {each: adapters[each] for each in own}
        ld.export(place / "model", place / name, task=task, adapters=given)


@pytest.fixture(scope="session", params=VISION)
def made(request: pytest.FixtureRequest, shared: Path) -> Path:
    """The model, its adapters, and both bundles with the adapters as side inputs."""
    return once(shared / f"qwen-{request.param}", lambda place: _prepare(request.param, place))


def _sessions(made: Path) -> tuple[ld.AdapterSession, ld.AdapterSession]:
    return ld.AdapterSession(made / "decoder"), ld.AdapterSession(made / "tower")


def _width(decoder: ld.AdapterSession) -> int:
    """Return the number of image feature values per token in the decoder's input."""
    return int(decoder.manifest.embeds[0].shape[-1])


def _features(tower: ld.AdapterSession, images: Any, adapters: Any = None) -> NDArray[Any]:
    return tower.run(["image_features"], {"pixel_values": np.stack(images)}, adapters)[0]


def _logits(
    decoder: ld.AdapterSession,
    ids: list[int],
    features: Sequence[NDArray[Any]],
    grids: Any,
    adapter: str | None = None,
) -> NDArray[Any]:
    """Return the logits [tokens, vocabulary] of one text with images."""
    given = np.array([ids])
    mask = given == IMAGE
    embeds = np.zeros((*given.shape, features[0].shape[-1]), np.float32)
    embeds[mask] = np.concatenate(features)
    fed = feeds(decoder.manifest, given)
    fed |= {"inputs_embeds": embeds, "inputs_embeds_mask": mask}
    fed[MROPE_POSITION_IDS] = grid_positions(mask[0], grids)[:, np.newaxis]
    return decoder.run(["logits"], fed, adapter)[0][0]


def test_two_bundles_compute_what_the_whole_model_computes(made: Path) -> None:
    decoder, tower = _sessions(made)
    words: list[Any] = [5, GRIDS[1], 6, 7, GRIDS[5], 8]
    grids, ids = [GRIDS[1], GRIDS[5]], tokens(words)
    images = [image(grid) for grid in grids]
    names = (None, *PARTS)
    expected = {name: Whole(made, name).logits(ids, images) for name in names}
    for name in names:
        sees = name if name in tower.adapters else None
        reads = name if name in decoder.adapters else None
        features = [_features(tower, [each], sees)[0] for each in images]
        found = _logits(decoder, ids, features, grids, reads)
        assert difference(found, expected[name]) <= ALLOWED, name
        others = [expected[other] for other in names if other != name]
        assert min(difference(found, other) for other in others) > 100 * ALLOWED, name
    # Text positions, or positions with rows and columns exchanged, are wrong.
    features = [_features(tower, [each])[0] for each in images]
    for wrong in ([(1, 1)] * 30, [grid[::-1] for grid in grids]):
        found = _logits(decoder, ids, features, wrong)
        assert difference(found, expected[None]) > 100 * ALLOWED


@pytest.mark.breadth(2)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_images_of_any_grid_have_the_features_of_transformers(made: Path, grid: Any) -> None:
    import torch

    _, tower = _sessions(made)
    images = [image(grid, seed) for seed in range(3)]
    names = ["all", None, "vision"]
    found = _features(tower, images, names)
    for row, name in enumerate(names):
        model = Whole(made, name).model
        with torch.no_grad():
            patches = torch.from_numpy(images[row].reshape(-1, images[row].shape[-1]))
            shape = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
            expected = model.get_image_features(patches, shape).pooler_output[0].numpy()
        # The rounding error is relative to the features, which are larger than logits.
        assert difference(found[row], expected) <= ALLOWED * max(1, float(np.abs(expected).max()))
    if min(grid) > 1:
        other = images[0].transpose(1, 0, 2, 3).reshape(images[0].shape)
        changed = _features(tower, [other], "all")[0]
        assert difference(found[0], changed) > 100 * ALLOWED, "the order of the patches counts"


def test_text_alone_needs_no_positions_in_three_dimensions(made: Path) -> None:
    decoder, _ = _sessions(made)
    assert MROPE_POSITION_IDS not in {spec.name for spec in decoder.manifest.inputs}
    ids = np.array([[5, 17, 3, 101], [9, 60, 61, 62]])
    fed = feeds(decoder.manifest, ids)
    text = fed["position_ids"]
    plain = decoder.run(["logits"], fed)[0]
    three = decoder.run(["logits"], {**fed, MROPE_POSITION_IDS: np.stack([text] * 3)})[0]
    assert np.array_equal(plain, three)
    # A position of -1 selects the default positions, per token.
    none = np.full((3, *ids.shape), -1)
    assert np.array_equal(plain, decoder.run(["logits"], {**fed, MROPE_POSITION_IDS: none})[0])
    none[1, 1, 2:] = 0
    changed = decoder.run(["logits"], {**fed, MROPE_POSITION_IDS: none})[0]
    assert np.array_equal(plain[0], changed[0])
    assert not np.array_equal(plain[1], changed[1])


def test_inputs_that_would_give_wrong_results_are_refused(made: Path) -> None:
    decoder, _ = _sessions(made)
    ids = np.array([[5, IMAGE, 3]])
    fed = feeds(decoder.manifest, ids)
    embeds = {
        "inputs_embeds": np.zeros((1, 3, _width(decoder)), np.float32),
        "inputs_embeds_mask": ids == IMAGE,
    }
    with pytest.raises(UsageError, match="is given without mrope_position_ids"):
        decoder.run(None, {**fed, **embeds})
    with pytest.raises(UsageError, match="three positions for each token"):
        decoder.run(None, {**fed, MROPE_POSITION_IDS: np.zeros((3, 1, 2), np.int64)})
    with pytest.raises(UsageError, match="contains 64, the graph takes 0 to 63"):
        decoder.run(None, {**fed, MROPE_POSITION_IDS: np.full((3, 1, 3), 64)})


def test_one_adapter_is_merged_into_both(made: Path, tmp_path: Path) -> None:
    for part in ("decoder", "tower"):
        ld.export(made / part, tmp_path / part, adapters=[made / "all"], merge=True)
    decoder, tower = (ld.AdapterSession(tmp_path / part) for part in ("decoder", "tower"))
    ids, pixels = tokens([5, GRIDS[1], 6]), image(GRIDS[1])
    found = _logits(decoder, ids, [_features(tower, [pixels])[0]], [GRIDS[1]])
    assert difference(found, Whole(made, "all").logits(ids, [pixels])) <= ALLOWED


def _as_older_versions_write(made: Path, place: Path) -> None:
    """Write the checkpoint and the adapter `all` in the format of transformers before 4.52."""
    from safetensors.numpy import load_file, save_file

    for name in ("model", "all"):
        shutil.copytree(made / name, place / name)
        (file,) = (place / name).glob("*.safetensors")
        tensors = load_file(file)
        older = {
            key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): one
            for key, one in tensors.items()
        }
        assert name == "model" or older.keys() != tensors.keys()
        save_file(older, file, {"format": "pt"})
    file = place / "model" / "config.json"
    with edited_json(file) as config:
        text, vision = config.pop("text_config"), config["vision_config"]
        del text["model_type"], vision["model_type"]
        rope = text.pop("rope_parameters")
        config |= text
        config["rope_theta"] = rope["rope_theta"]
        config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}


def test_checkpoints_and_adapters_of_older_versions_are_read(made: Path, tmp_path: Path) -> None:
    _as_older_versions_write(made, tmp_path)
    for task, name in (("causal-lm", "decoder"), ("vision-tower", "tower")):
        given = {"all": tmp_path / "all"}
        ld.export(tmp_path / "model", tmp_path / name, task=task, adapters=given)
    decoder, tower = _sessions(tmp_path)
    ids, pixels = tokens([5, GRIDS[1], 6]), image(GRIDS[1])
    for name in (None, "all"):
        features = _features(tower, [pixels], name)[0]
        found = _logits(decoder, ids, [features], [GRIDS[1]], name)
        assert difference(found, Whole(made, name).logits(ids, [pixels])) <= ALLOWED, name
    generator = ld.ImageTextGenerator(decoder, tower)
    (text,) = generator.generate([ids], [[pixels]], "all", max_new_tokens=NEW)
    assert list(text.token_ids) == Whole(made, "all").generated(ids, [pixels])


def _proved(bundle: Path, made: Path, **options: Any) -> ParityReport:
    """Run a parity check, assert that it passes with measured limits, and return the report."""
    given = {"prompts": TEXTS, "tokens": 2} if "decoder" in bundle.name else {}
    report = ld.parity(bundle, model=made / "model", certificate=False, **given, **options)
    assert report.passed, report.failures
    assert not [note for note in report.notes if note.startswith("the limits are assumed")]
    return report


def test_parity_passes_for_the_decoder_and_fails_wrong_positions(made: Path) -> None:
    report = _proved(made / "decoder", made, phases=DECODER_PHASES, controls=True)
    assert {result.adapter for result in report.results if result.phase == "embeddings"} == {
        *(None, "text", "all")
    }
    wrong = {"shifted places", "exchanged embeddings", "positions of text", "turned positions"}
    seen = {(c.name, c.adapter): c.caught for c in report.controls if c.name in wrong}
    assert seen == {(name, adapter): True for name in wrong for adapter in ("text", "all")}


def test_parity_passes_for_the_tower_and_fails_wrong_adapters(made: Path) -> None:
    report = _proved(made / "tower", made, phases=["padded batch"], controls=True)
    wrong = ("wrong adapter", "doubled alpha", "swapped factors", "missing target")
    seen = {(c.name, c.adapter): c.caught for c in report.controls if c.name in wrong}
    made_with = {(name, part) for name in wrong for part in ("vision", "projector", "all")}
    # The two layers of the projector have different shapes, so their factors cannot be swapped.
    assert seen == dict.fromkeys(made_with - {("swapped factors", "projector")}, True)


@pytest.mark.parametrize("mistake", ["ignored", "turned"])
def test_an_export_with_wrong_positions_is_refused(
    mistake: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        right = mrope.sample_positions(ids)[MROPE_POSITION_IDS]
        wrong = right[[0, 2, 1]] if mistake == "turned" else np.full_like(right, -1)
        return {MROPE_POSITION_IDS: wrong}

    from loradeploy.export.trial.opened import Trial

    run = Trial.run

    def mistaken(self: Any, fed: Any, side_inputs: Any) -> Any:
        if MROPE_POSITION_IDS in fed:
            fed = {**fed, **sample(fed["input_ids"])}
        return run(self, fed, side_inputs)

    monkeypatch.setattr(Trial, "run", mistaken)
    with pytest.raises(
        ExportError, match=r"with inputs_embeds its output logits differs by .* from"
    ):
        ld.export(made / "model", tmp_path / "d", task="causal-lm")


@pytest.mark.parametrize("mistake", ["turned", "no windows", "small windows"])
def test_an_export_of_a_tower_with_wrong_positions_or_windows_is_refused(
    mistake: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = qwen_vision._positions
    if mistake == "turned":
        monkeypatch.setattr(qwen_vision, "_positions", lambda *sizes: right(*sizes).flip(-1))
    elif "Qwen2VL" in made.name:
        pytest.skip("its tower has no windows")
    else:
        side = 2 if mistake == "small windows" else None
        monkeypatch.setattr(qwen_vision, "_window_side", lambda visual: side)
    monkeypatch.setattr(trace, "trace", module.trace)  # without the cache of traces
    with pytest.raises(
        ExportError, match=r"its output image_features differs by .* from the source"
    ):
        ld.export(made / "model", tmp_path / "t", task="vision-tower")


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_parity_passes_for_both_in_lower_precisions(
    precision: str, made: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"adapters": {"all": made / "all"}, "precision": precision}
    ld.export(made / "model", tmp_path / "decoder", task="causal-lm", **given)
    report = _proved(tmp_path / "decoder", made, phases=DECODER_PHASES)
    assert {result.phase for result in report.results if result.figures} >= {*DECODER_PHASES}
    ld.export(made / "model", tmp_path / "tower", task="vision-tower", **given)
    _proved(tmp_path / "tower", made, phases=["padded batch"])


def test_text_generated_from_images_is_that_of_transformers(made: Path) -> None:
    """One batch of rows with different adapters, image sizes and numbers of images."""
    decoder, tower = _sessions(made)
    generator = ld.ImageTextGenerator(decoder, tower)
    for name in PARTS:
        generator.load(name, made / name, replace=True)
    rows: list[tuple[str | None, list[Any]]] = [
        (None, [5, GRIDS[1], 6, 7]),
        ("all", [GRIDS[5], 9]),
        ("text", [8, 9, 10, 11, 12]),
        ("vision", [5, GRIDS[0], 6, GRIDS[2], 7]),
        ("projector", [5, 6, 7, GRIDS[4], 8, GRIDS[1]]),
    ]
    prompts = [tokens(words) for _, words in rows]
    images = [
        [image(w, s) for s, w in enumerate(words) if not isinstance(w, int)] for _, words in rows
    ]
    names = [name for name, _ in rows]
    results = generator.generate(prompts, images, names, max_new_tokens=NEW, batch_size=5)
    changed = set()
    for result, ids, own, name in zip(results, prompts, images, names, strict=True):
        assert list(result.token_ids) == Whole(made, name).generated(ids, own), name
        if Whole(made).generated(ids, own) != list(result.token_ids):
            changed.add(name)
    assert changed >= {"all", "text"}, "they do nothing"
    assert changed & {"vision", "projector"}, "neither does anything"
    short = [[each for each in ids if each != IMAGE] for ids in prompts]
    placed = [[w for i in ids for w in ([i, IMAGE] if i == START else [i])] for ids in short]
    again = generator.generate(placed, images, names, max_new_tokens=NEW, batch_size=2)
    assert [one.token_ids for one in again] == [one.token_ids for one in results]
    few: Any = {"max_new_tokens": NEW, "num_beams": 2, "n": 2}
    together = generator.generate(prompts, images, names, **few)
    alone = [
        generator.generate([p], [i], n, **few)
        for p, i, n in zip(prompts, images, names, strict=True)
    ]
    assert [t.token_ids for t in together] == [t.token_ids for texts in alone for t in texts]


@pytest.mark.breadth(2)
def test_a_cache_of_fixed_size_gives_the_same_text_after_images(made: Path, tmp_path: Path) -> None:
    given = {"all": made / "all"}
    ld.export(made / "model", tmp_path / "d", task="causal-lm", adapters=given, attention="gqa")
    decoder, tower = _sessions(made)
    in_place = ld.AdapterSession(tmp_path / "d")
    assert in_place.manifest.cache_in_place
    rows: list[list[Any]] = [[5, GRIDS[1], 6, 7], [8, 9, 10], [GRIDS[0], 6, GRIDS[2]]]
    prompts = [tokens(words) for words in rows]
    images = [[image(word) for word in words if not isinstance(word, int)] for words in rows]
    texts = []
    for session in (decoder, in_place):
        generator = ld.ImageTextGenerator(session, tower)
        found = generator.generate(prompts, images, ["all", None, None], max_new_tokens=NEW)
        texts.append([one.token_ids for one in found])
    assert texts[0] == texts[1]
    assert len({len(ids) for ids in prompts}) == len(prompts), "padding counts"


def test_the_output_of_a_processor_is_split(made: Path) -> None:
    generator = ld.ImageTextGenerator(*_sessions(made))
    images = [image(grid) for grid in GRIDS]
    patches = np.concatenate([each.reshape(-1, each.shape[-1]) for each in images])
    shapes = np.array([[1, 2 * rows, 2 * columns] for rows, columns in GRIDS])
    found = generator.split(patches, shapes)
    assert all(np.array_equal(a, b) for a, b in zip(found, images, strict=True))
    with pytest.raises(UsageError, match="image 1 has 2 frames: videos are not supported"):
        generator.split(patches[:72], np.array([[2, 6, 6]]))
    with pytest.raises(UsageError, match="image 1 is of 3 x 6 patches, expected multiples of 2"):
        generator.split(patches[:18], np.array([[1, 3, 6]]))
    with pytest.raises(UsageError, match="has 18 patches, image_grid_thw 36 together"):
        generator.split(patches[:18], np.array([[1, 6, 6]]))
    with pytest.raises(UsageError, match=r"expected \[patches, 96\] and \[images, 3\]"):
        generator.split(patches[:, :3], shapes)


def test_prompts_that_do_not_fit_their_images_are_refused(made: Path) -> None:
    generator = ld.ImageTextGenerator(*_sessions(made))
    pixels = image((2, 2))
    with pytest.raises(UsageError, match="prompt 1 has the token of a video: videos are not supp"):
        generator.generate([[5, START, VIDEO, END]], [[]])
    with pytest.raises(UsageError, match="prompt 1 has 3 image tokens, and 1 images of together 4"):
        generator.generate([[IMAGE] * 3], [[pixels]])
    apart = [IMAGE, IMAGE, 5, IMAGE, IMAGE]
    with pytest.raises(UsageError, match="has other tokens between its 2 x 2 tokens"):
        generator.generate([apart], [[pixels]])
    with pytest.raises(
        UsageError, match=r"expected pixel values of floats \[rows, columns, 4, 96\]"
    ):
        generator.generate([[IMAGE]], [[pixels[0]]])
    text = ld.TextGenerator(generator.decoder)
    with pytest.raises(UsageError, match="the embeddings of prompt 1 have no `grids`"):
        values = np.zeros((1, _width(generator.decoder)), np.float32)
        text.generate([[5, IMAGE]], embeds=[TokenEmbeds(IMAGE, values)])


def test_other_models_of_the_family_are_refused_by_name(made: Path, tmp_path: Path) -> None:
    model = shutil.copytree(made / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "qwen3_vl_moe"}))
    with pytest.raises(ExportError, match="tower of qwen3_vl_moe cannot be exported: only those"):
        ld.export(model, tmp_path / "t", task="vision-tower")
