"""Gemma 3 in two bundles: the tokens of an image attend to each other in both directions.

The reference is transformers with PEFT, which makes its masks from `token_type_ids`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import loradeploy as ld
from loradeploy.errors import AdapterMismatchError, ExportError, UsageError
from loradeploy.export.bases import checkpoint
from tests.conftest import once
from tests.export.reference import difference
from tests.inputs import gemma
from tests.inputs.gemma import BEGIN, END, IMAGE, RECIPE, pictures
from tests.parity.spoil import spoiled
from tests.runtime.feeds import feeds
from tests.tolerances import tolerance

_IMAGE: Final = (BEGIN, *[IMAGE] * gemma.TOKENS, END)
_TWO_IMAGES: Final = (5, *_IMAGE, 17, *_IMAGE, 44)
_ONE_IMAGE: Final = (*_IMAGE, 60, 61, 62, 63, 64, 65, 66, 67, 68)
BLOCKS: Final = "image_blocks/"  # prefix of the names of nodes for bidirectional attention
ALLOWED: Final = tolerance("torch-onnx-tiny")


@pytest.fixture(scope="session")
def made(shared: Path) -> Path:
    return once(shared / "images-Gemma3", gemma.make)


def _export(place: Path) -> None:
    model = place.parent / "images-Gemma3"
    own = {
        "d": ("causal-lm", ("all", "text")),
        "t": ("vision-tower", ("all", "vision")),
    }
    for name, (task, adapters) in own.items():
        given = {adapter: model / adapter for adapter in adapters}
        ld.export(model / "model", place / name, task=task, adapters=given)


@pytest.fixture(scope="session")
def bundles(made: Path) -> Path:
    """A directory with the decoder in `d` and the tower in `t`."""
    return once(made.parent / "images-Gemma3-bundles", _export)


def _embedded(ids: NDArray[np.int64], features: NDArray[Any]) -> dict[str, NDArray[Any]]:
    mask = ids == IMAGE
    embeds = np.zeros((*ids.shape, features.shape[-1]), np.float32)
    embeds[mask] = features.reshape(-1, features.shape[-1])
    return {"inputs_embeds": embeds, "inputs_embeds_mask": mask}


def _found(
    place: Path, rows: Sequence[Sequence[int]], images: Any, sees: Any, reads: Any
) -> NDArray[Any]:
    tower, decoder = ld.AdapterSession(place / "t"), ld.AdapterSession(place / "d")
    (features,) = tower.run(["image_features"], {"pixel_values": images}, sees)
    ids = np.array(rows)
    return decoder.run(
        ["logits"], {**feeds(decoder.manifest, ids), **_embedded(ids, features)}, reads
    )[0]


@pytest.mark.parametrize("name", [None, *gemma.FACTORS])
def test_two_bundles_compute_what_the_whole_model_computes(
    name: str | None, made: Path, bundles: Path
) -> None:
    images, rows = pictures(3), (_TWO_IMAGES, _ONE_IMAGE)
    model = gemma.whole(made / "model", name and made / name)
    sees, reads = (None if name == other else name for other in ("text", "vision"))
    found = _found(bundles, rows, images, sees, reads)
    expected = [
        gemma.logits(model, rows[0], images[:2]),
        gemma.logits(model, rows[1], images[2:]),
    ]
    for row, own in zip(found, expected, strict=True):
        assert difference(row, own) <= ALLOWED
    if name is not None:
        base_of = gemma.whole(made / "model", None)
        assert difference(found[1], gemma.logits(base_of, rows[1], images[2:])) > 100 * ALLOWED
    causal = gemma.given(rows[0], images[:2])
    del causal["token_type_ids"]
    assert difference(found[0], model(**causal).logits[0].detach().numpy()) > 100 * ALLOWED


def test_rows_of_one_batch_have_their_own_adapters(made: Path, bundles: Path) -> None:
    images, rows = pictures(3), (_TWO_IMAGES, _ONE_IMAGE)
    found = _found(bundles, rows, images, ["all", "all", None], ["all", "text"])
    whole = {name: gemma.whole(made / "model", made / name) for name in ("all", "text")}
    assert difference(found[0], gemma.logits(whole["all"], rows[0], images[:2])) <= ALLOWED
    assert difference(found[1], gemma.logits(whole["text"], rows[1], images[2:])) <= ALLOWED


def test_an_adapter_is_merged_into_both(made: Path, tmp_path: Path) -> None:
    for part, task in (("d", "causal-lm"), ("t", "vision-tower")):
        given = {"all": made / "all"}
        ld.export(made / "model", tmp_path / part, task=task, adapters=given, merge=True)
    found = _found(tmp_path, [_TWO_IMAGES], pictures(2), None, None)
    model = gemma.whole(made / "model", made / "all")
    assert difference(found[0], gemma.logits(model, _TWO_IMAGES, pictures(2))) <= ALLOWED


def test_a_fully_trained_projector_is_merged(made: Path, bundles: Path, tmp_path: Path) -> None:
    given = {RECIPE: made / RECIPE}
    with pytest.raises(AdapterMismatchError, match="is not a side input of .*: merge it instead"):
        ld.export(made / "model", tmp_path / "t", task="vision-tower", adapters=given)
    rows, images = [_TWO_IMAGES], pictures(2)
    expected = gemma.logits(gemma.whole(made / "model", made / RECIPE), rows[0], images)
    ld.export(made / "model", tmp_path / "d", task="causal-lm", adapters=given)
    for name, source in (("checkpoint", made / "model"), ("bundle", bundles / "t")):
        place = tmp_path / name
        shutil.copytree(tmp_path / "d", place / "d")
        ld.export(source, place / "t", task="vision-tower", adapters=given, merge=True)
        found = _found(place, rows, images, None, RECIPE)
        assert difference(found[0], expected) <= ALLOWED, name
        without = _found(place, rows, images, None, None)
        assert difference(without[0], expected) > 100 * ALLOWED, "the decoder's factors count"
    shutil.rmtree(place / "t")
    shutil.copytree(bundles / "t", place / "t")
    found = _found(place, rows, images, None, RECIPE)
    assert difference(found[0], expected) > 100 * ALLOWED, "the projector counts"


def _read_causally(graph: ir.Graph) -> None:
    """Change the mask so that image positions see only earlier positions."""
    joined = [node for node in graph if node.op_type == "Or" and str(node.name).startswith(BLOCKS)]
    assert joined
    for node in joined:
        seen, _ = node.inputs
        node.outputs[0].replace_all_uses_with(seen)


def test_text_without_images_is_bit_identical_to_a_text_only_graph(
    bundles: Path, tmp_path: Path
) -> None:
    plain = spoiled(bundles / "d", tmp_path / "d", _read_causally)
    ids = np.array([[5, 17, 3, 101, 5, 44, 60], [0, 0, 9, 8, 7, 6, 5]])
    found = []
    for bundle in (bundles / "d", plain):
        session = ld.AdapterSession(bundle)
        given = feeds(session.manifest, ids)
        given["attention_mask"][1, :2] = 0
        found.append(session.run(["logits"], given, ["all", None])[0])
    assert np.array_equal(*found)


def test_parity_fails_a_decoder_with_causal_attention_in_images(
    made: Path, bundles: Path, tmp_path: Path
) -> None:
    few: dict[str, Any] = {
        "model": made / "model",
        "tokens": 2,
        "certificate": False,
        "phases": ["embeddings"],
    }
    report = ld.parity(bundles / "d", controls=True, **few)
    assert not [result for result in report.results if result.outcome == "failed"]
    caught = {(c.name, c.adapter): c.caught for c in report.controls if "images" in c.name}
    assert caught == {("causal images", name): True for name in ("all", "text")}
    causal = spoiled(bundles / "d", tmp_path / "d", _read_causally)
    report = ld.parity(causal, backends=["onnx-side-inputs"], **few)
    assert {r.adapter for r in report.results if r.outcome == "failed"} >= {"all", "text"}


def test_an_export_with_causal_attention_in_images_is_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "join_image_blocks", lambda graph: None)
    with pytest.raises(ExportError, match=r"with inputs_embeds its output .* from PyTorch"):
        ld.export(made / "model", tmp_path / "d", task="causal-lm")


@pytest.mark.parametrize(("cut", "begins_within"), [(2, False), (5, True)])
def test_splitting_an_image_over_two_runs_is_refused(
    cut: int, begins_within: bool, bundles: Path
) -> None:
    decoder = ld.AdapterSession(bundles / "d")
    ids = np.array([[7, 8, *_ONE_IMAGE]])
    features = np.ones((gemma.TOKENS, 32), np.float32)
    whole = {**feeds(decoder.manifest, ids), **_embedded(ids, features)}
    past = {name: value for name, value in whole.items() if name.startswith("past")}
    new = {name: value for name, value in whole.items() if name not in past}
    names = [spec.name for spec in decoder.manifest.outputs]
    first = {name: value[:, :cut] for name, value in new.items()}
    kept = dict(zip(names, decoder.run(names, {**first, **past}), strict=True))
    rest = {name: value[:, cut:] for name, value in new.items()}
    rest["attention_mask"] = whole["attention_mask"]
    rest |= {name: kept[name.replace("past_key_values", "present")] for name in past}
    if begins_within:
        with pytest.raises(UsageError, match="inputs_embeds_mask begins within an image"):
            decoder.run(["logits"], rest)
        return
    (found,) = decoder.run(["logits"], rest)
    assert difference(found, decoder.run(["logits"], whole)[0][:, cut:]) <= ALLOWED


@pytest.mark.parametrize("form", [{"precision": "fp16"}, {"precision": "int8"}])
def test_parity_passes_in_other_precisions(
    form: dict[str, Any], made: Path, tmp_path: Path
) -> None:
    given = {"text": made / "text"}
    ld.export(made / "model", tmp_path / "d", task="causal-lm", adapters=given, **form)
    report = ld.parity(
        tmp_path / "d",
        model=made / "model",
        controls=True,
        tokens=2,
        certificate=False,
        phases=["embeddings"],
    )
    assert not [result for result in report.results if result.outcome == "failed"]
    assert any(result.outcome == "passed" for result in report.results)
    assert any(c.name == "causal images" and c.caught for c in report.controls)


def test_grouped_attention_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="a mask that is more than causal"):
        ld.export(made / "model", tmp_path / "d", task="causal-lm", attention="gqa")
