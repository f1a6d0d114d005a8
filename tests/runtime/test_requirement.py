"""Requirements of a session for a certificate: full coverage, minimum checks, and a signature."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loradeploy as ld
from loradeploy.bundle.manifest import read_manifest
from loradeploy.bundle.proof.certificate import check_provider, read_certificate
from loradeploy.bundle.proof.provider import Device, ProviderFacts
from loradeploy.bundle.proof.requirement import CertificateMinimum, Coverage
from loradeploy.bundle.proof.signature import private_key, sign
from loradeploy.errors import BundleError, UsageError
from loradeploy.runtime.session import AdapterSession
from tests.cli.calling import command as cli_command
from tests.inputs.edits import edited_json
from tests.inputs.signing import key_pair

pytest.importorskip("cryptography")


def test_every_file_of_the_export_is_covered(certified: Path) -> None:
    result = json.loads((certified / "parity.json").read_text())["files"]
    assert {*result, "model.onnx", "model.onnx.data"} >= set(read_manifest(certified).files)


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
def test_changes_of_files_that_affect_results_are_refused(
    certified: Path, change: Callable[[Path], object]
) -> None:
    change(certified)
    with pytest.raises(BundleError, match="since it was checked|not among the files"):
        AdapterSession(certified, require_certificate=True)


CPU, CUDA, WEBGPU = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "WebGpu"))
DML = "DmlExecutionProvider"
ON_CPU = ProviderFacts("cpu", (CPU,), "1.31.1", Device("CPU", "Intel", 0x8086, 0))
COVERAGE = Coverage(frozenset({"decode"}), (ON_CPU,), frozenset(), 2, 9, 3)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("prompts=3", "2 prompts, 3 are required"),
        ("generated=4,prompts=1", "3 generated, 4"),
        ("phases=decode+padded batch", "'?padded batch"),
        ("phases=decode+padded-batch", "'?padded batch"),
        ("providers=cuda", "not checked on 'cuda'"),
        ("precision=int8", "precision is fp32"),
    ],
)
def test_a_check_below_the_minimum_is_reported(asked: str, message: str) -> None:
    reported = CertificateMinimum.parse(asked).lacking(COVERAGE, "fp32")
    assert reported is not None
    assert message.replace("'?", "") in reported


@pytest.mark.parametrize(
    ("checked", "asked"),
    [
        (ProviderFacts("cuda:1", (CUDA, CPU)), "cuda"),
        (ProviderFacts("cuda", (CUDA, CPU)), "cuda:1"),
        (ProviderFacts("cuda use_tf32=0", (CUDA, CPU)), "CUDA"),
        (ProviderFacts("cuda", (CUDA, CPU)), CUDA),
        (ProviderFacts("directml", (DML, CPU)), "directml"),
        (ProviderFacts("directml", (DML, CPU)), DML),
        (ProviderFacts("directml", (DML, CPU)), "dml"),
        (ProviderFacts("webgpu", (WEBGPU, CPU)), "webgpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.provider,
)
def test_a_provider_matches_by_each_of_its_names_and_on_any_device(
    checked: ProviderFacts, asked: str
) -> None:
    minimum = CertificateMinimum(providers=(asked,))
    coverage = dataclasses.replace(COVERAGE, providers=(checked,))
    assert minimum.lacking(coverage, "fp32") is None
    assert minimum.lacking(COVERAGE, "fp32") is not None


GPU, SOFTWARE = Device("GPU", "NVIDIA", 0x10DE, 0x2335, "H200"), Device("CPU", "Intel", 0x8086, 0)
ON_GPU = ProviderFacts("webgpu", (WEBGPU, CPU), "0.4.0", GPU)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"provider": "webgpu:1"}, None),
        ({"device": dataclasses.replace(GPU, device_id=1, name="A100")}, None),
        ({"device": None}, None),
        ({"version": "0.5.0"}, None),
        ({"device": SOFTWARE}, "its device is a CPU, not a GPU"),
        ({"chain": (CUDA, CPU)}, f"its provider is {CUDA}, not {WEBGPU}"),
        ({"chain": (WEBGPU, CUDA, CPU)}, f"its provider is {WEBGPU}, {CUDA}, not {WEBGPU}"),
        ({"options": {"use_tf32": "1"}}, "its option use_tf32 is 1, not not set"),
    ],
    ids=str,
)
def test_a_check_covers_sessions_with_the_same_provider_device_kind_and_options(
    change: dict[str, Any], difference: str | None
) -> None:
    assert ON_GPU.difference(dataclasses.replace(ON_GPU, **change)) == difference


def edit_providers(certified: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    file = certified / "parity.json"
    with edited_json(file) as values:
        change(values["environment"]["providers"])


def on_webgpu(providers: list[dict[str, Any]]) -> None:
    providers[0].update(chain=[WEBGPU, CPU])


def in_half_precision(providers: list[dict[str, Any]]) -> None:
    providers[0].update(options={"precision": "FP16"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (on_webgpu, r"not certified for cpu \(CPU, .*\): it was checked on cpu only.*run `lorad"),
        (in_half_precision, "its option precision is not set, not FP16"),
        (list.clear, "its graph was not run|it was checked on none"),
    ],
)
def test_a_session_on_a_provider_that_was_not_checked_is_refused_by_name(
    certified: Path, change: Any, message: str
) -> None:
    AdapterSession(certified, require_certificate=True)
    edit_providers(certified, change)
    with pytest.raises(BundleError, match=message):
        AdapterSession(certified, require_certificate=True)
    AdapterSession(certified)


TF32: dict[str, str] = {"use_tf32": "1"}
FP32: dict[str, str] = {"use_tf32": "0"}


@pytest.mark.parametrize(
    ("checked", "running", "providers"),
    [
        (ON_GPU, ON_CPU, ["webgpu", "cpu"]),
        (ProviderFacts("cuda", (CUDA,), options=FP32), ON_CPU, ["cuda", "cpu"]),
        (
            ProviderFacts("cuda use_tf32=1", (CUDA,), options=TF32),
            ON_CPU,
            [("cuda", TF32), "cpu"],
        ),
        (
            ProviderFacts("cuda", (CUDA,), options=FP32),
            ProviderFacts("cuda", (CUDA,), options=TF32),
            ["cuda", ("cuda", TF32)],
        ),
        (
            ProviderFacts("cuda use_tf32=1", (CUDA,), options=TF32),
            ProviderFacts("cuda", (CUDA,), options=FP32),
            [("cuda", TF32), ("cuda", FP32)],
        ),
        # Options that do not affect results.
        (ProviderFacts("webgpu:1 a=b c", (WEBGPU,)), ON_CPU, ["webgpu:1", "cpu"]),
    ],
    ids=["names", "defaults", "checked", "running", "both", "others"],
)
@pytest.mark.parametrize("captured", [False, True], ids=["", "captured"])
def test_the_command_suggested_by_a_refusal_works(
    checked: ProviderFacts,
    running: ProviderFacts,
    providers: list[Any],
    captured: bool,
    certified: Path,
) -> None:
    recorded = dataclasses.replace(checked, provider=f"{checked.provider} captured", captured=True)
    facts = (checked, recorded) if captured else (checked,)
    whole = read_certificate(certified)
    coverage = dataclasses.replace(whole.coverage, providers=facts)
    certificate = dataclasses.replace(whole, coverage=coverage)
    with pytest.raises(BundleError) as refused:
        check_provider(certified, read_manifest(certified), certificate, running, None)
    command = str(refused.value).rpartition("; run `")[2].rstrip("`")
    if all(isinstance(one, str) for one in providers):
        _, verb, *line = shlex.split(command)
        parsed = cli_command(verb).make_context(verb, line).params
        assert list(parsed["providers"]) == providers
        assert parsed["capture_graphs"] is captured
    else:
        function = ast.parse(command, mode="eval").body
        assert isinstance(function, ast.Call) and ast.unparse(function.func) == "loradeploy.parity"
        given = {own.arg: ast.literal_eval(own.value) for own in function.keywords}
        assert given["providers"] == providers
        assert given.get("capture_graphs", False) is captured
        inspect.signature(ld.parity).bind(str(certified), **given)


def test_providers_in_the_minimum_replace_those_of_the_session(certified: Path) -> None:
    edit_providers(certified, on_webgpu)
    AdapterSession(certified, require_certificate=CertificateMinimum(providers=("webgpu",)))
    with pytest.raises(BundleError, match="not checked on 'cuda'"):
        AdapterSession(certified, require_certificate=CertificateMinimum(providers=("cuda",)))


def test_checks_on_another_provider_do_not_count(certified: Path) -> None:
    """The session runs on the CPU, where only the base was checked; the adapter ran on the GPU."""
    file = certified / "parity.json"
    with edited_json(file) as values:
        (facts,) = values["environment"]["providers"]
        values["environment"]["providers"].append(
            {**facts, "provider": "gpu", "chain": [WEBGPU, CPU]}
        )
        for result in values["results"]:
            if result["adapter"] is not None and result["variant"] is not None:
                result["variant"]["provider"] = "gpu"
    with pytest.raises(
        BundleError, match=r"adapter 'one' .* was not checked; run .*--provider gpu"
    ):
        AdapterSession(certified, require_certificate=True)


def test_a_check_that_equals_the_minimum_is_sufficient() -> None:
    least = CertificateMinimum.parse("prompts=2,phases=decode,providers=CPU,precision=fp32")
    assert least.lacking(COVERAGE, "fp32") is None


@pytest.mark.parametrize("asked", ["prompts", "prompts=x", "color=red", ""])
def test_an_invalid_minimum_is_refused(asked: str) -> None:
    with pytest.raises(UsageError, match="minimum of a certificate|expected a number"):
        CertificateMinimum.parse(asked)


def test_a_session_enforces_the_minimum(certified: Path) -> None:
    AdapterSession(certified, require_certificate=CertificateMinimum(phases=("decode",), prompts=1))
    with pytest.raises(BundleError, match="9999 are required"):
        AdapterSession(certified, require_certificate=CertificateMinimum(prompts=9999))


def test_a_signature_is_verified_at_opening(certified: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path, "mine")
    _, others = key_pair(tmp_path, "others")
    required = CertificateMinimum(public_key=public)
    with pytest.raises(BundleError, match="has no signature"):
        AdapterSession(certified, require_certificate=required)
    sign(certified, private_key(private))
    AdapterSession(certified, require_certificate=required)
    with pytest.raises(BundleError, match="is not a signature of parity"):
        AdapterSession(certified, require_certificate=CertificateMinimum(public_key=others))
    with pytest.raises(UsageError, match="not a public ed25519 key"):
        AdapterSession(certified, require_certificate=CertificateMinimum(public_key=private))
    certificate = certified / "parity.json"
    certificate.write_text(certificate.read_text().replace('"seed"', '"seed" '))
    with pytest.raises(BundleError, match="is not a signature of parity"):
        AdapterSession(certified, require_certificate=required)
