"""Parity as pytest tests. The fixture `assert_parity` comes with loradeploy.

MODEL=SmolLM2-135M-Instruct BUNDLE=bundle pytest test_parity_example.py --parity-report-dir parity
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime

MODEL, BUNDLE = os.environ["MODEL"], os.environ["BUNDLE"]
AssertParity = Callable[..., Any]


def test_the_bundle_computes_what_pytorch_computes(assert_parity: AssertParity) -> None:
    report = assert_parity(BUNDLE, MODEL, tokens=8, controls=True)
    assert report.mutation_score == 1.0


def test_the_service_computes_what_the_bundle_computes(assert_parity: AssertParity) -> None:
    """A model can also be a function of feeds: here plain onnxruntime, as a service may use it."""
    session = onnxruntime.InferenceSession(
        os.fspath(Path(BUNDLE) / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]

    def service(feeds: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(names, session.run(names, feeds), strict=True))

    assert_parity(service, BUNDLE)
