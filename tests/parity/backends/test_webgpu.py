"""Parity on a provider with its own memory: WebGPU, on a software GPU where there is no other.

A provider that ends its process (a crash) is reported as a failure by name.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

import loradeploy as ld
from loradeploy.bundle.proof.certificate import read_certificate
from loradeploy.errors import BundleError, UsageError
from loradeploy.parity import trial
from loradeploy.parity.trial import crash_of
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter
from tests.devices import swiftshader, unavailable
from tests.parity.conftest import CPU, Check

WEBGPU = "WebGpuExecutionProvider"
with_plugin = pytest.mark.skipif(
    find_spec("onnxruntime_ep_webgpu") is None, reason="the plugin is not installed"
)


@pytest.fixture
def webgpu(llama_with_adapter: Path) -> str:
    """The name of the WebGPU provider; skips where it does not start."""
    swiftshader()
    try:
        AdapterSession(llama_with_adapter, ["webgpu"], check_device=False).close()
    except UsageError as problem:
        unavailable(str(problem))
    return "webgpu"


def test_a_check_on_webgpu_passes_and_its_certificate_is_for_webgpu(
    webgpu: str,
    llama_bundle: Path,
    check: Check,
    tiny_llama: Path,
    make_adapter: MakeAdapter,
) -> None:
    part = make_adapter(tiny_llama, seed=2, target_modules=["q_proj"])
    report = check(
        llama_bundle,
        providers=[webgpu],
        adapters={"part": part},
        backends=["onnx-side-inputs", "onnx-native", "onnx-mixed"],
        phases=["prefill", "decode"],
        prompts=["The capital of France is", "Hi"],
        tokens=2,
        certificate=True,
    )
    assert report.passed, report.failures
    passed = {(r.backend, r.adapter) for r in report.results if r.outcome == "passed"}
    assert passed == {
        ("onnx-side-inputs", None),
        ("onnx-side-inputs", "one"),
        ("onnx-side-inputs", "part"),
        ("onnx-native", "one"),
        ("onnx-mixed", None),
        ("onnx-mixed", "one"),
        ("onnx-mixed", "part"),
    }
    # The plugin crashes on rank-0 inputs, which an adapter has for modules that it does not change.
    (left_out,) = (r for r in report.results if r.outcome == "not run")
    assert "part has no factors for" in str(left_out.message)
    assert "rank 0" in str(left_out.message)

    (facts,) = report.environment.providers
    assert (facts.provider, facts.chain) == ("webgpu", (WEBGPU, CPU))
    assert facts.version == report.environment.versions["onnxruntime-ep-webgpu"]
    assert facts.device is not None
    assert facts.device.kind in ("CPU", "GPU")
    assert any("nodes run on the CPU" in note for note in report.notes)

    assert read_certificate(llama_bundle).coverage.providers == (facts,)
    with AdapterSession(llama_bundle, [webgpu], require_certificate=True) as session:
        assert session.provider == facts
    with pytest.raises(BundleError, match=r"not certified for cpu.*--provider webgpu --provider"):
        AdapterSession(llama_bundle, require_certificate=True)
    minimum = ld.CertificateMinimum(providers=("webgpu",))
    AdapterSession(llama_bundle, require_certificate=minimum)


# -- a provider that ends its process ----------------------------------------------------------


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process of each trial run by a signal, as a segmentation fault does."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'loradeploy.parity.trial' in sys.orig_argv:\n"
        "    os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")


def test_a_trial_that_takes_too_long_is_killed(
    llama_with_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trial, "LONGEST", 1)
    assert crash_of(llama_with_adapter, [(CPU, {})]) == "it had not ended after 1 seconds"


def test_a_trial_that_finishes_is_not_a_crash(llama_with_adapter: Path) -> None:
    assert crash_of(llama_with_adapter, [(CPU, {})]) is None
    # Refusals are reported by the check itself.
    assert crash_of(llama_with_adapter / "missing", [(CPU, {})]) is None


@with_plugin
@pytest.mark.usefixtures("killed")
def test_a_provider_that_crashes_fails_by_name_and_the_check_continues(
    llama_with_adapter: Path, check: Check, tmp_path: Path
) -> None:
    bundle = shutil.copytree(llama_with_adapter, tmp_path / "bundle")
    report = check(
        bundle,
        providers=["webgpu", "cpu"],
        backends=["onnx-side-inputs"],
        phases=["prefill"],
        certificate=True,
        localize=True,
    )
    (failed,) = (r for r in report.results if r.outcome == "failed")
    assert failed.variant is not None
    assert failed.variant.provider == "webgpu"
    assert "it ended its process (SIGSEGV) when it ran the bundle" in str(failed.message)
    assert {r.variant.provider for r in report.results if r.outcome == "passed" and r.variant} == {
        "cpu"
    }
    assert not report.passed
    with pytest.raises(BundleError, match="the check failed: ONNX side inputs.*SIGSEGV"):
        AdapterSession(bundle, require_certificate=True)
