"""The manifest is written and read without loss, and invalid manifests are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import loradeploy as ld
from loradeploy.bundle.manifest import (
    AdapterEntry,
    Manifest,
    OutputTarget,
    StoredWeight,
    read_manifest,
)
from loradeploy.errors import BundleError
from tests.bundle.manifests import a_manifest


def test_a_manifest_is_unchanged_by_a_round_trip() -> None:
    manifest = a_manifest()
    written = json.dumps(manifest.to_json())
    assert Manifest.from_json(json.loads(written)) == manifest
    assert json.dumps(a_manifest().to_json()) == written


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "other", "'format'"),
        (["format_version"], 3, "format version 3"),
        (["task"], "poetry", "the task 'poetry'"),
        (["mode"], "both", "mode is 'both'"),
        (["opset"], "23", "opset is '23'"),
        (["surprise"], 1, "surprise is unknown"),
        (["base"], None, "base is not an object"),
        (["base", "kind"], "guess", "base.kind is 'guess'"),
        (["inputs"], {}, "inputs is not a list"),
        (["inputs", 0, "shape"], "batch", r"inputs\[0\].shape"),
        (["targets", 0, "in_features"], 0, "not positive"),
        (["targets", 0, "in_features"], None, r"targets\[0\].in_features is None"),
        (["targets", 1, "lora_A"], "l.q.lora_A", "share the name"),
        (["targets", 0, "lora_B"], "l.o.lora_B", "l.q has the side input 'l.o.lora_B'"),
        (["targets", 0, "module"], "l.o", "l.o has the side input 'l.q.lora_A'"),
        (["targets", 1, "slice"], [1, 2, 3], r"targets\[1\].slice"),
        (["targets", 1, "slice"], [4, 7], "the slice of l.k has another size than the module"),
        (["targets", 2, "slice"], [2, 4], "the slice of l.v has another .* or overlaps another"),
        (["adapters", "sport"], "here", "adapters.sport is not an object"),
        (["adapters", "sport", "whole_digest"], 7, "adapters.sport.whole_digest is 7"),
        (["adapters", "sport", "split"], "yes", "adapters.sport.split is 'yes'"),
        (["mode"], "merged", "a merged graph has no side inputs"),
        (["factor_dtype"], "int8", "factor_dtype"),
        (["operators"], ["Conv"], "the operator 'Conv' is not one of LoraAdd, LoraAdd2"),
        (["operators"], True, "operators is True"),
        (["operator"], True, "operator is unknown"),
    ],
)
def test_a_manifest_edited_by_hand_is_refused_by_field(
    path: list[str | int], value: object, message: str
) -> None:
    edited = json.loads(json.dumps(a_manifest().to_json()))
    place = edited
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(edited)


def test_exchanged_names_of_side_inputs_are_refused() -> None:
    edited = a_manifest().to_json()
    q, k, _ = edited["targets"]
    q["lora_A"], k["lora_A"] = k["lora_A"], q["lora_A"]
    with pytest.raises(BundleError, match=r"l\.q has the side input 'l\.k\.lora_A', which is not"):
        Manifest.from_json(edited)


@pytest.mark.parametrize("field", ["task", "base", "inputs", "opset"])
def test_a_missing_field_is_named(field: str) -> None:
    edited = a_manifest().to_json()
    del edited[field]
    with pytest.raises(BundleError, match=f"{field} is missing"):
        Manifest.from_json(edited)


def test_a_directory_without_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="has no loradeploy.json"):
        read_manifest(tmp_path)
    (tmp_path / "loradeploy.json").write_text("{")
    with pytest.raises(BundleError, match="not readable as JSON"):
        read_manifest(tmp_path)


def test_whole_adapters_of_parts_are_unchanged_by_a_round_trip() -> None:
    part = AdapterEntry("sha256:01", "adapters/sport", whole_digest="sha256:02", split=True)
    manifest = a_manifest(adapters={"sport": part})
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_a_manifest_of_a_version_without_scales_and_offsets_is_read() -> None:
    older = a_manifest().to_json()
    del older["changed"]
    for target in older["targets"]:
        del target["kind"], target["stored"]
    for entry in older["adapters"].values():
        del entry["native_digest"], entry["whole_digest"], entry["split"]
    assert Manifest.from_json(json.loads(json.dumps(older))) == a_manifest()


@pytest.mark.parametrize(("given", "expected"), [(True, ("LoraAdd",)), (False, ())])
def test_a_manifest_of_a_version_with_one_operator_is_read(
    given: bool, expected: tuple[str, ...]
) -> None:
    older = a_manifest().to_json()
    del older["operators"]
    manifest = Manifest.from_json({**older, "operator": given})
    assert manifest == a_manifest(operators=expected)
    assert manifest.takes_ranks == given
    with pytest.raises(BundleError, match="operator is unknown"):
        Manifest.from_json({**older, "operator": "yes"})


def _with_changes(**stored: Any) -> Manifest:
    place = StoredWeight(**{"offset": 64, "length": 48, "dtype": "float32", **stored})
    target = dataclasses.replace(a_manifest().targets[0], stored=place)
    return a_manifest(
        targets=(target,), changed=(OutputTarget("l.q", 4, "l.q.scale", "l.q.offset"),)
    )


def test_scales_offsets_and_weight_locations_are_unchanged_by_a_round_trip() -> None:
    manifest = _with_changes()
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


@pytest.mark.parametrize(
    "wrong", [{"offset": -1}, {"length": 47}, {"length": 1 << 40}, {"dtype": "object"}]
)
def test_an_invalid_weight_location_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(
        BundleError, match=r"stored weight of l\.q has another size than the module"
    ):
        Manifest.from_json(json.loads(json.dumps(_with_changes(**wrong).to_json())))


def test_an_onnx_file_in_place_of_a_bundle_is_refused_with_the_command_that_makes_one(
    tmp_path: Path,
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    advice = r"model.onnx is an ONNX file, not a bundle: .* export --model model.onnx --output"
    with pytest.raises(BundleError, match=advice):
        read_manifest(tmp_path / "model.onnx")
    with pytest.raises(BundleError, match=advice):
        ld.parity(tmp_path / "model.onnx")
    with pytest.raises(BundleError, match=advice):
        ld.AdapterSession(tmp_path / "model.onnx")
