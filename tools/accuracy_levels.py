"""Compare a quantized bundle's logits between accuracy levels of MatMulNBits, on the CPU.

    python -m tools.accuracy_levels BUNDLE

`accuracy_level` determines how the kernel rounds activations: 4, the level in bundles, rounds to
int8 in blocks; 0 and 1 keep float32. It is a hint that other execution providers may ignore, so the
differences show how far another provider may be from a verdict on the CPU.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime

from loradeploy.bundle.manifest import read_manifest
from loradeploy.bundle.names import GRAPH_NAME
from loradeploy.bundle.proof.provider import WEIGHTS_AT
from loradeploy.parity.backends.onnx_model import OnnxModel
from loradeploy.parity.figures.metrics import Comparison
from loradeploy.parity.inputs.tokens import make_cases
from loradeploy.runtime.devices.table import CPU

_LEVELS: Final = (4, 1, 0)


def logits(bundle: Path, level: int) -> list[Any]:
    """Return the base's logits for each prompt, [positions, vocabulary], at an accuracy level."""
    manifest = read_manifest(bundle)
    model = onnx.load(os.fspath(bundle / GRAPH_NAME), load_external_data=False)
    for node in _nodes(model.graph):
        if node.op_type == "MatMulNBits":
            kept = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", level)])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(WEIGHTS_AT, os.fspath(bundle.resolve()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    backend = OnnxModel(manifest, lambda names, feeds, _: session.run(list(names), dict(feeds)))
    cases = make_cases(bundle, manifest, prompts=None, generated=1, seed=0)
    found = []
    for prompt in cases.prompts[: len(cases.prompts) - cases.edges]:
        ids = np.array([prompt], np.int64)
        values, _ = backend.forward(ids, np.ones_like(ids), None, [None])
        found.append(values[0])
    return found


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def main() -> None:
    """Print a line for each level that is compared with the level in bundles."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="a decoder's bundle, int8 or int4")
    bundle = parser.parse_args().bundle
    usual, *others = _LEVELS
    expected = logits(bundle, usual)
    for level in others:
        comparison = Comparison(scale=max(float(np.abs(v).max()) for v in expected), logits=True)
        for case, (one, other) in enumerate(zip(expected, logits(bundle, level), strict=True)):
            comparison.add(one, other, case=case)
        figures = comparison.figures()
        print(
            f"level {usual} against {level}: max abs {figures.max_abs:.2g}, mean abs"
            f" {figures.mean_abs:.2g}, top-1 {figures.top1:.1%}, {figures.positions} positions"
        )


if __name__ == "__main__":
    main()
