"""The table of graph forms by provider: the results of a session on each, or why it failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.tolerances import tolerance
from tools.device_forms import FORMS, measured, table
from tools.inputs.made_adapters import make_adapters


@pytest.fixture(scope="module")
def adapters(tiny_llama_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("forms")
    made = make_adapters(tiny_llama_bundle, place / "large", 1, rank=16)
    return {**made, **make_adapters(tiny_llama_bundle, place / "small", 1, rank=4)}


def test_a_row_has_the_errors_and_the_effect_of_the_adapter(
    tiny_llama_bundle: Path, adapters: dict[str, str]
) -> None:
    bundle = str(tiny_llama_bundle)
    found = measured("cpu", bundle, bundle, adapters)
    assert found["opens"] and found["runs"] and "error" not in found
    assert max(found[side] for side in ("base", "adapter", "mixed")) <= tolerance("rows")
    assert found["effect"] > 1 and found["off_device"] == {}
    (_, _, line, *_) = table([{"provider": "cpu", "form": "fp32 slots", "cpu_s": 2.0, **found}])
    assert line.startswith("| cpu | fp32 slots | yes | yes | ")
    assert f"| 0 of {sum(found['nodes'].values())} |" in line


def test_an_unavailable_provider_is_a_row_with_the_reason(
    tiny_llama_bundle: Path, adapters: dict[str, str]
) -> None:
    bundle = str(tiny_llama_bundle)
    found = measured("coreml", bundle, bundle, adapters)
    assert not found["opens"] and not found["runs"]
    lines = table([{"provider": "coreml", "form": "fp32 slots", "cpu_s": 1.0, **found}])
    assert lines[2].startswith("| coreml | fp32 slots | no | no |  |")
    assert lines[-1].startswith("coreml fp32 slots: this onnxruntime has no 'CoreML")


def test_the_documentation_has_every_row() -> None:
    text = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    for provider in ("cpu", "webgpu", "cuda"):
        assert all(f"| {provider} | {form} | yes |" in text for form in FORMS)
