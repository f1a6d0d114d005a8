"""Check that the inputs and outputs of an opened graph match the bundle's manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnxruntime

from loradeploy.bundle.dtypes import NUMPY_NAMES
from loradeploy.bundle.graph_form import is_packed
from loradeploy.bundle.manifest import Manifest, TensorSpec
from loradeploy.bundle.names import ENCODER_NAME, GRAPH_NAME
from loradeploy.errors import BundleError, listed

_LISTED: Final = 3


def check_graph(
    bundle: Path,
    manifest: Manifest,
    session: onnxruntime.InferenceSession,
    *,
    encoder: bool = False,
) -> None:
    """Raise BundleError unless the graph's inputs and outputs match the manifest.

    Also raised for a form of graph that onnxruntime computes incorrectly. The graph may have been
    opened without the defaults of its side inputs. `encoder`: whether it is encoder.onnx of an
    encoder-decoder; each of its two graphs has some of the inputs and outputs, and all side inputs.
    """
    if manifest.branches and is_packed(manifest.precision) and manifest.factor_dtype == "float16":
        raise BundleError(
            f"{bundle} has {manifest.precision} weights in branches and computes in fp16, which"
            " onnxruntime (1.31) computes incorrectly: export it again with --no-branches"
        )
    required = {node.name: node for node in session.get_inputs()}
    overridable = {node.name: node for node in session.get_overridable_initializers()}
    if lacks_defaults(manifest, session):
        optional = {spec.name for spec in optional_inputs(manifest)}
        overridable = {name: node for name, node in required.items() if name in optional}
        required = {name: node for name, node in required.items() if name not in optional}
    outputs = {node.name: node for node in session.get_outputs()}
    inputs, given, sides = manifest.inputs, manifest.outputs, optional_inputs(manifest)
    if (apart := manifest.encoder) is not None:
        inputs = tuple(spec for spec in inputs if (spec.name in apart.inputs) is encoder)
        given = tuple(spec for spec in given if (spec.name in apart.outputs) is encoder)
    problems = [
        *_mismatches("input", inputs, required),
        *_unknown("input", inputs, required),
        *_mismatches("output", given, outputs),
        *_unknown("output", given, outputs),
        *_mismatches("side input", sides, overridable),
        *_unknown("side input", sides, overridable),
    ]
    if problems:
        file = bundle / (ENCODER_NAME if encoder else GRAPH_NAME)
        raise BundleError(
            f"{file} does not fit the bundle's manifest: {listed(problems, _LISTED)}. Export again."
        )


def optional_inputs(manifest: Manifest) -> tuple[TensorSpec, ...]:
    """The inputs that have defaults in model.onnx."""
    return (*manifest.side_inputs(), *manifest.optional_inputs())


def lacks_defaults(manifest: Manifest, session: onnxruntime.InferenceSession) -> bool:
    """Whether the graph was opened without defaults, so that all inputs must be fed."""
    return bool(optional_inputs(manifest)) and not session.get_overridable_initializers()


def _mismatches(kind: str, specs: Sequence[TensorSpec], nodes: Mapping[str, Any]) -> list[str]:
    problems = []
    for spec in specs:
        node = nodes.get(spec.name)
        if node is None:
            problems.append(f"the graph has no {kind} {spec.name}")
        elif NUMPY_NAMES.get(node.type) != spec.dtype or not _fits(node.shape, spec.shape):
            problems.append(
                f"the {kind} {spec.name} is {node.type} {_shown(node.shape)},"
                f" the manifest says {spec.dtype} {_shown(spec.shape)}"
            )
    return problems


def _unknown(kind: str, specs: Sequence[TensorSpec], nodes: Mapping[str, Any]) -> list[str]:
    known = {spec.name for spec in specs}
    return [
        f"the graph's {kind} {name} is not in the manifest" for name in nodes if name not in known
    ]


def _fits(actual: Sequence[int | str | None], declared: Sequence[int | str]) -> bool:
    """Whether two shapes have equal lengths, and equal sizes where both are numbers."""
    return len(actual) == len(declared) and all(
        a == t
        for a, t in zip(actual, declared, strict=True)
        if isinstance(a, int) and isinstance(t, int)
    )


def _shown(shape: Sequence[int | str | None]) -> str:
    return f"[{', '.join(str(dimension) for dimension in shape)}]"
