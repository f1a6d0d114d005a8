"""A session that requires a certificate runs only bundles and adapters that were checked."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from loradeploy.errors import AdapterError, BundleError
from loradeploy.runtime.session import AdapterSession
from tests.cli.calling import call
from tests.conftest import MakeAdapter, export_and_check
from tests.runtime.feeds import logits, random_ids

IDS = random_ids(2, 6)


@pytest.fixture
def session(certified: Path) -> AdapterSession:
    return AdapterSession(certified, require_certificate=True)


def test_a_certified_session_computes_the_same_as_any_other(
    session: AdapterSession, certified: Path
) -> None:
    expected = logits(AdapterSession(certified), IDS, ["one", None])
    np.testing.assert_array_equal(logits(session, IDS, ["one", None]), expected)


def test_a_bundle_that_has_changed_is_refused(certified: Path) -> None:
    with (certified / "model.onnx.data").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match=r"model\.onnx\.data has changed since it was checked"):
        AdapterSession(certified, require_certificate=True)


def test_a_bundle_without_a_certificate_is_refused(tiny_llama_bundle: Path) -> None:
    with pytest.raises(BundleError, match="has no certificate"):
        AdapterSession(tiny_llama_bundle, require_certificate=True)


def test_a_checked_adapter_is_loaded_from_any_directory_under_any_name(
    session: AdapterSession, certified: Path, tmp_path: Path
) -> None:
    elsewhere = shutil.copytree(certified / "adapters/one", tmp_path / "elsewhere")
    assert session.load("another", elsewhere) == session.load("one")


def test_an_adapter_that_was_not_checked_is_refused(
    session: AdapterSession, tiny_llama: Path, make_adapter: MakeAdapter
) -> None:
    place = make_adapter(tiny_llama, seed=7)
    with pytest.raises(AdapterError, match=r"is not among the adapters.*parity .* --adapter DIR"):
        session.load("two", place)
    assert set(session.adapters) == {"one"}
    session.register("two", place)
    with pytest.raises(AdapterError, match=f"{place.name} .* is not among the adapters"):
        logits(session, IDS, ["one", "two"])
    with pytest.raises(AdapterError, match="is not among the adapters"):
        session.pin("two")


def test_a_replaced_adapter_of_the_bundle_is_refused(
    certified: Path, tiny_llama: Path, make_adapter: MakeAdapter
) -> None:
    shutil.rmtree(certified / "adapters/one")
    shutil.copytree(make_adapter(tiny_llama, seed=7), certified / "adapters/one")
    with pytest.raises(BundleError, match=r"adapters/one.* since it was checked"):
        AdapterSession(certified, require_certificate=True)
    with pytest.raises(BundleError, match="its digest has changed"):
        logits(AdapterSession(certified), IDS, "one")


def test_a_native_file_is_refused_with_the_advice_to_load_the_peft_directory(
    session: AdapterSession, certified: Path
) -> None:
    with pytest.raises(AdapterError, match="load its PEFT directory"):
        session.load("native", certified / "adapters/one.onnx_adapter")


def test_run_requires_a_certificate_on_request(certified: Path) -> None:
    (certified / "parity.json").unlink()
    with pytest.raises(BundleError, match="has no certificate"):
        call("run", certified, "Hi", "--require-certificate")


def test_an_adapter_with_fewer_labels_than_the_bundle_is_certified(
    tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    task = "sequence-classification"
    adapters = {
        f"n{count}": make_adapter(tiny_bert, task=task, num_labels=count, seed=count, scale=0.1)
        for count in (2, 3)
    }
    bundle = export_and_check(tiny_bert, tmp_path / "bundle", adapters=adapters, task=task)
    session = AdapterSession(bundle, require_certificate=True)
    assert {session.load(name) for name in adapters} == set(session.adapters.values())
