"""Synthetic reports with everything that a report can contain."""

from __future__ import annotations

import numpy as np

from loradeploy.bundle.proof.provider import Device, ProviderFacts
from loradeploy.parity.figures.metrics import Comparison
from loradeploy.parity.figures.tolerances import assumed
from loradeploy.parity.report.results import (
    AdapterFacts,
    Control,
    Counterexample,
    Environment,
    Heatmap,
    Inputs,
    Localization,
    ParityReport,
    Regression,
    Result,
    Score,
    Step,
    Variant,
)
from loradeploy.parity.verdict import judge

ALL = Variant("cpu", "all")
PLAIN = Variant("cpu", "disable")
LAYERS = 12
ON_CPU = ProviderFacts(
    "cpu",
    ("CPUExecutionProvider",),
    "1.31.1",
    Device("CPU", "Intel", 0x8086, 0, "Xeon"),
)


def result(
    title: str = "ONNX merged",
    adapter: str | None = "sport",
    phase: str = "prefill",
    *,
    error: float = 2e-6,
    variant: Variant | None = ALL,
) -> Result:
    """Return the result of a backend with random errors of size `error`."""
    random = np.random.default_rng(0)
    expected = random.normal(size=(20, 64)) * 6
    comparison = Comparison(scale=20.0, logits=True)
    actual = expected + random.normal(size=expected.shape) * error
    comparison.add(expected, actual, case=2, first_step=10)
    effect = None if adapter is None else 2.09
    verdict = judge(comparison.figures(), assumed("fp32", scale=20.0), effect=effect)
    return verdict.result(
        backend=title.lower().replace(" ", "-"),
        title=title,
        adapter=adapter,
        phase=phase,
        effect=effect,
        seconds=0.125,
        variant=variant,
    )


def _steps() -> tuple[Step, ...]:
    """Return localization steps of modules of which the second half diverges."""
    made = []
    for layer in range(LAYERS):
        for part in ("self_attn.q_proj", "mlp.down_proj"):
            share = (1e-7 if layer < LAYERS // 2 else 4e-3) * (1 + layer / 7)
            name = f"model.layers.{layer}.{part}"
            made.append(Step(name, layer, f"node_{len(made)}", "MatMul", share * 8, 8.0, share))
    return (*made, Step("lm_head", None, "node_head", "MatMul", float("nan"), 8.0, float("nan")))


STEPS = _steps()
FIRST = LAYERS
HEATMAP = Heatmap(
    tuple(step.module for step in STEPS),
    tuple(range(9)),
    tuple(tuple(step.share * (1 + position) for position in range(9)) for step in STEPS),
)
PASSED = ParityReport(
    bundle="bundles/news",
    task="causal-lm",
    mode="side-inputs",
    precision="fp32",
    base="SmolLM2",
    base_digest="sha256:" + "b" * 64,
    graph_digest="sha256:" + "9" * 64,
    data_digest="sha256:" + "d" * 64,
    inputs=Inputs("built-in prompts", 16, 512, 32, 7),
    environment=Environment({"torch": "2.13.0"}, {"cores": "2"}, (ON_CPU,)),
    created="2026-01-01T00:00:00+00:00",
    results=(
        *(result(title, "sport") for title in ("PyTorch merged", "ONNX merged", "ONNX mixed")),
        result("ONNX side inputs", None, "decode", error=0.0),
        Result("genai", "onnxruntime-genai", None, None, "not run", "it is not installed"),
    ),
    adapters=(AdapterFacts("sport", "sha256:" + "5" * 64, 2.09, 0.31),),
    controls=(Control("doubled alpha", "twice the scaling", "sport", True, 1.9, 2.09),),
    notes=("only a part of it was compared",),
    seconds=41.3,
    files={"loradeploy.json": "sha256:" + "7" * 64},
)
FULL = ParityReport(
    **{
        name: getattr(PASSED, name)
        for name in (
            "bundle", "task", "mode", "precision", "base", "base_digest", "graph_digest",
            "data_digest", "inputs", "environment", "created", "notes", "seconds", "files",
        )
    },
    results=(
        *PASSED.results,
        result("ONNX mixed", "tech", "padded batch", error=0.08),
        result("ONNX merged", "sport", "prefill", variant=PLAIN),
    ),
    adapters=(
        *PASSED.adapters,
        AdapterFacts("tech", "sha256:" + "6" * 64, 1.5, 0.2, True, "it changes nothing"),
    ),
    controls=(
        *PASSED.controls,
        Control("missing target", "one module has no update", "tech", False, 1.25e-05, 1.5),
    ),
    localizations=(
        Localization(
            "onnx-mixed", "ONNX mixed", "tech", 2, 9, STEPS, STEPS[FIRST], STEPS[FIRST - 1],
            STEPS[FIRST : FIRST + 3], HEATMAP, ("model.rotary_emb",), "the second half diverges",
        ),
        Localization("peft", "PEFT", None, 0, 3, (), message="no module is shown by both sides"),
    ),
    counterexamples=(
        Counterexample(
            "onnx-mixed", "ONNX mixed", "tech", (17, 402, 9), "Shares fell", 0.3125,
            "max abs 0.31 > 0.0002", 40, 23,
        ),
    ),
    scores=(
        Score("onnx", "ONNX merged", "sport", "accuracy", 400, 0.912, 0.9145, 0.0025, -0.006, 0.011,
              0.02, True),
        Score("onnx", "ONNX mixed", "tech", "perplexity", 120, 12.31, 14.02, 1.71, 1.2, 2.3, 0.25,
              False, "is worse by 1.71, at most 0.25 is allowed"),
    ),
    regressions=(
        Regression("ONNX merged, sport", "max_abs", 4.1e-06, 2.2e-05, "5.4 times what it was"),
        Regression("PEFT", "outcome", "passed", "not run", "it was run before"),
    ),
    baseline="main.json",
)  # fmt: skip
