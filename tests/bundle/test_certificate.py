"""A certificate is valid only for the checked files and for what the check actually ran."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loradeploy.bundle.manifest import read_manifest
from loradeploy.bundle.proof.certificate import FORMAT, check_certificate
from loradeploy.bundle.proof.record import RUN_THE_BUNDLE, Certificate
from loradeploy.errors import BundleError
from loradeploy.files import MAX_JSON_BYTES
from loradeploy.parity.backends.table import BACKENDS
from tests.conftest import MakeAdapter, export_and_check
from tests.inputs.edits import edited_json

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="session")
def merged_bundle(tiny_llama: Path, make_adapter: MakeAdapter, shared: Path) -> Path:
    """A merged bundle with a certificate."""
    place = shared / "bundle-certified-merged"
    adapters = {"one": make_adapter(tiny_llama)}
    return export_and_check(tiny_llama, place, adapters=adapters, merge=True)


def check(bundle: Path) -> Certificate:
    return check_certificate(bundle, read_manifest(bundle), None)


def edit(file: Path, change: Edit) -> None:
    with edited_json(file) as values:
        change(values)


def flip(file: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_certificate_is_valid_for_the_checked_files(certified: Path) -> None:
    certificate = check(certified)
    assert certificate.passed
    assert certificate.certified == {read_manifest(certified).adapters["one"].digest}
    assert json.loads((certified / "parity.json").read_text())["format"] == FORMAT


def test_the_certificate_of_a_merged_bundle_covers_its_adapter(merged_bundle: Path) -> None:
    merged = read_manifest(merged_bundle).merged_adapter
    assert merged is not None
    assert check(merged_bundle).certified == {merged.digest}


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_change_of_one_byte_is_detected(certified: Path, name: str) -> None:
    flip(certified / name)
    with pytest.raises(BundleError, match=f"{name} has changed since it was checked; run `lora"):
        check(certified)


@pytest.mark.parametrize("name", ["base.safetensors", "defaults.safetensors"])
def test_an_added_file_is_detected(certified: Path, name: str) -> None:
    (certified / name).write_bytes(b"")
    with pytest.raises(BundleError, match=f"{name} has changed"):
        check(certified)


def test_a_graph_without_its_data_is_detected(certified: Path) -> None:
    (certified / "model.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx\.data has changed"):
        check(certified)


def swap_weights(manifest: dict[str, Any]) -> None:
    """Exchange two weights: a merge would change another layer, with all shapes valid."""
    first, second = (t for t in manifest["targets"] if t["module"].endswith("o_proj"))
    first["weight"], second["weight"] = second["weight"], first["weight"]


def test_an_edited_manifest_is_detected(certified: Path) -> None:
    edit(certified / "loradeploy.json", swap_weights)
    with pytest.raises(BundleError, match=r"loradeploy\.json has changed"):
        check(certified)


def failed_result(values: dict[str, Any]) -> None:
    values["results"][-1]["outcome"] = "failed"


def failed_check(values: dict[str, Any]) -> None:
    values["results"][-1]["checks"][0]["passed"] = False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(passed=False), "its verdict is not `passed`"),
        (lambda v: v.update(passed="yes"), "its verdict is not `passed`"),
        (lambda v: v.update(failures=["ONNX: too far off"]), "failed: ONNX: too far off"),
        (failed_result, "the check failed: ONNX"),
        (failed_check, "the check failed: ONNX"),
        (lambda v: v["adapters"][0].update(failed=True), "an entry of adapters is a failure"),
        (lambda v: v.update(controls=[{"caught": False}]), "an entry of controls"),
        (lambda v: v.update(scores=[{}]), "an entry of scores"),
        (lambda v: v.update(regressions=[{}]), "an entry of regressions"),
        (lambda v: v.update(base_digest="sha256:00"), r"another base \(digest 00"),
        (lambda v: v.update(mode="merged"), "the mode is not the one that was checked"),
        (lambda v: v.update(precision="fp16"), "the precision is not"),
        (lambda v: v.update(adapters=[]), r"the adapter 'one' \(\w+\) was not checked"),
        (lambda v: v.update(results=[]), "the adapter 'one'"),
        (lambda v: v.update(results=[r for r in v["results"] if r["backend"] == "peft"]), "'one'"),
        (lambda v: v.update(results=7, adapters={"a": 1}, environment=[]), "'one'"),
    ],
)  # fmt: skip
def test_every_entry_of_a_certificate_must_have_passed(
    certified: Path, change: Edit, message: str
) -> None:
    edit(certified / "parity.json", change)
    with pytest.raises(BundleError, match=message):
        check(certified)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no certificate \(parity\.json\): run `loradeploy parity"),
        ("", "not readable as JSON"),
        ("{", "not readable as JSON"),
        ("[]", "has a JSON list, expected an object"),
        ("{}", "is not a certificate"),
        ('{"format": "another", "schema_version": 2}', "is not a certificate"),
        ('{"format": "loradeploy-parity", "schema_version": 1}', "schema version 1.*again"),
        ('{"format": "loradeploy-parity", "schema_version": 4}', "upgrade loradeploy, or run"),
        ('{"format": "loradeploy-parity", "schema_version": 3}', "model.onnx has changed"),
        (" " * (MAX_JSON_BYTES + 1), "more than the"),
    ],
    ids=["none", "empty", "cut off", "list", "object", "another", "1", "3", "bare", "oversized"],
)
def test_an_invalid_certificate_is_refused_in_one_line(
    certified: Path, content: str | None, message: str
) -> None:
    file = certified / "parity.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(BundleError, match=message) as refused:
        check(certified)
    assert "\n" not in str(refused.value)


def test_the_backends_that_run_a_bundle_exist() -> None:
    known = {(mode, backend.name) for backend in BACKENDS for mode in backend.modes}
    assert known >= {(mode, name) for mode, names in RUN_THE_BUNDLE.items() for name in names}
