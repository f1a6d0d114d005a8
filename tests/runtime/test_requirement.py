"""What a session can ask of a certificate: that it covers all, how much was run, who signed it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from loradeploy.bundle.manifest import read_manifest
from loradeploy.bundle.proof.requirement import CertificateMinimum, Coverage
from loradeploy.bundle.proof.signature import private_key, sign
from loradeploy.errors import BundleError, UsageError
from loradeploy.runtime.session import AdapterSession
from tests.signing import key_pair

pytest.importorskip("cryptography")


@pytest.fixture
def bundle(certified_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(certified_bundle, tmp_path / "bundle")


def test_every_file_of_the_export_is_covered(bundle: Path) -> None:
    told = json.loads((bundle / "parity.json").read_text())["files"]
    assert {*told, "model.onnx", "model.onnx.data"} >= set(read_manifest(bundle).files)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: (b / "tokenizer.json").write_text("{}"),
        lambda b: (b / "chat_template.jinja").write_text("other"),
        lambda b: (b / "added_tokens.json").write_text("{}"),
        lambda b: (b / "config.json").unlink(),
        lambda b: (b / "adapters/one.onnx_adapter").write_bytes(b""),
        lambda b: (b / "adapters/one/chat_template.jinja").write_text("other"),
    ],
    ids=["tokenizer", "template", "added", "config gone", "native form", "an adapter's template"],
)
def test_what_changes_an_answer_is_refused(bundle: Path, change: Callable[[Path], object]) -> None:
    change(bundle)
    with pytest.raises(BundleError, match="since it was checked|not among the files"):
        AdapterSession(bundle, require_certificate=True)


COVERAGE = Coverage(
    frozenset({"decode"}), frozenset({"CPUExecutionProvider"}), frozenset(), 2, 9, 3
)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("prompts=3", "2 prompts, 3 are required"),
        ("generated=4,prompts=1", "3 generated, 4"),
        ("phases=decode+padded batch", "'?padded batch"),
        ("providers=cuda", "not checked on cuda"),
        ("precision=int8", "precision is fp32"),
    ],
)
def test_a_narrower_check_is_told(asked: str, said: str) -> None:
    told = CertificateMinimum.parse(asked).lacking(COVERAGE, "fp32")
    assert told is not None
    assert said.replace("'?", "") in told


def test_a_check_that_is_as_wide_will_do() -> None:
    least = CertificateMinimum.parse("prompts=2,phases=decode,providers=CPU,precision=fp32")
    assert least.lacking(COVERAGE, "fp32") is None


@pytest.mark.parametrize("asked", ["prompts", "prompts=x", "color=red", ""])
def test_a_minimum_that_means_nothing_is_refused(asked: str) -> None:
    with pytest.raises(UsageError, match="minimum of a certificate|a number is needed"):
        CertificateMinimum.parse(asked)


def test_a_session_asks_for_the_minimum(bundle: Path) -> None:
    AdapterSession(bundle, require_certificate=CertificateMinimum(phases=("decode",), prompts=1))
    with pytest.raises(BundleError, match="9999 are required"):
        AdapterSession(bundle, require_certificate=CertificateMinimum(prompts=9999))


def test_a_signature_is_verified_at_opening(bundle: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path, "mine")
    _, others = key_pair(tmp_path, "others")
    required = CertificateMinimum(public_key=public)
    with pytest.raises(BundleError, match="has no signature"):
        AdapterSession(bundle, require_certificate=required)
    sign(bundle, private_key(private))
    AdapterSession(bundle, require_certificate=required)
    with pytest.raises(BundleError, match="is no signature of parity"):
        AdapterSession(bundle, require_certificate=CertificateMinimum(public_key=others))
    with pytest.raises(UsageError, match="no public ed25519 key"):
        AdapterSession(bundle, require_certificate=CertificateMinimum(public_key=private))
    certificate = bundle / "parity.json"
    certificate.write_text(certificate.read_text().replace('"seed"', '"seed" '))
    with pytest.raises(BundleError, match="is no signature of parity"):
        AdapterSession(bundle, require_certificate=required)
