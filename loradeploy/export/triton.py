"""Write a bundle as a model in a repository of Triton Inference Server.

Triton's onnxruntime backend feeds only a graph's required inputs: with overridable initializers it
would compute the base model, whatever adapter was sent. So a model is either merged, or has
required side inputs (required.onnx), which clients send with each request; the model's folder
`side_inputs` has them, for the base and for each adapter of the bundle.

If every input and output has one row for each row of the batch, Triton may batch requests
(dynamic batching). For side inputs that is the layout of rows without branches.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from loradeploy.adapter.files.tensors import read_arrays, write_arrays
from loradeploy.adapter.tasks import SEQ2SEQ_LM
from loradeploy.bundle.dtypes import PROTOCOL_NAMES
from loradeploy.bundle.graph_form import GQA, SHARED_SCALE
from loradeploy.bundle.manifest import ADAPTERS, Manifest, TensorSpec
from loradeploy.bundle.names import (
    ADAPTER_RANKS,
    ADAPTERS_DIRECTORY,
    GRAPH_DATA_NAME,
    GRAPH_NAME,
    REQUIRED_NAME,
    REQUIRED_VALUES_NAME,
    ROWS,
)
from loradeploy.errors import BundleError, ExportError, UsageError
from loradeploy.export.passes.forms.required import of_least_rank
from loradeploy.files import atomic_directory
from loradeploy.paths import resolved

CONFIG_NAME: Final = "config.pbtxt"
SIDE_INPUTS: Final = "side_inputs"
# The largest batch; the operator of the server may change it.
MAX_BATCH: Final = 8
_VERSION: Final = "1"
_MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Triton's names of numpy's dtypes.
DATA_TYPES: Final = {dtype: f"TYPE_{name}" for dtype, name in PROTOCOL_NAMES.items()}
_NO_DEFAULTS: Final = (
    "Triton feeds no inputs that have defaults, and every adapter would answer as the base: give"
    " `required_inputs` or `merge` with `triton`"
)
_IN_PLACE: Final = (
    "a cache that is written in place is not bound by Triton: give `attention` standard with"
    " `triton`"
)


def write_repository(
    bundle: str | os.PathLike[str], repository: str | os.PathLike[str], manifest: Manifest
) -> Path:
    """Write `bundle` as a model of the Triton model `repository`, and return the model's folder.

    The model has the bundle's name. An earlier model of this name is replaced if it was written by
    this function; other models of the repository are not touched.

    Raises:
        UsageError: Triton would not run this form of the bundle correctly, or the folder has other
            content.
    """
    place = resolved(bundle)
    check_form(place, manifest)
    target = Path(repository) / place.name
    graph = GRAPH_NAME if manifest.mode == "merged" else REQUIRED_NAME
    config = model_config(place.name, place / graph, manifest)
    with atomic_directory(target, marker=CONFIG_NAME, own_files=_own_files) as temporary:
        version = temporary / _VERSION
        version.mkdir()
        shutil.copy2(place / graph, version / GRAPH_NAME)
        if (place / GRAPH_DATA_NAME).is_file():
            shutil.copy2(place / GRAPH_DATA_NAME, version / GRAPH_DATA_NAME)
        if manifest.mode != "merged":
            (temporary / SIDE_INPUTS).mkdir()
            _write_side_inputs(place, temporary / SIDE_INPUTS, manifest)
        (temporary / CONFIG_NAME).write_text(config, encoding="utf-8")
    return target


def _own_files(directory: Path) -> set[str]:
    parts = (directory / _VERSION, directory / SIDE_INPUTS)
    inner = (file for part in parts if part.is_dir() for file in part.iterdir())
    names = {GRAPH_NAME, GRAPH_DATA_NAME}
    return {
        file.relative_to(directory).as_posix()
        for file in inner
        if file.name in names or file.suffix == ".safetensors"
    }


def check_requested_form(form: Mapping[str, Any]) -> None:
    """Raise UsageError if `check_form` would refuse a bundle of this form, before the export."""
    if not (form["merge"] or form["required_inputs"]):
        raise UsageError(_NO_DEFAULTS)
    if form["attention"] == GQA:
        raise UsageError(_IN_PLACE)


def check_form(bundle: Path, manifest: Manifest) -> None:
    """Raise UsageError unless Triton's onnxruntime backend runs this form of bundle correctly."""
    if not _MODEL_NAME.fullmatch(bundle.name):
        raise UsageError(f"{bundle.name!a} cannot be the name of a model: rename the bundle")
    if manifest.task == SEQ2SEQ_LM:
        raise UsageError(
            f"{bundle} has two graphs, and a Triton model has one: `triton` is for bundles of other"
            " tasks"
        )
    if manifest.mode != "merged" and not (bundle / REQUIRED_NAME).is_file():
        raise UsageError(_NO_DEFAULTS)
    if manifest.cache_in_place:
        raise UsageError(_IN_PLACE)
    for spec in (*_inputs(manifest), *manifest.outputs):
        if spec.dtype not in DATA_TYPES:
            raise UsageError(f"{bundle}: {spec.name} is {spec.dtype}, which Triton does not have")


def model_config(name: str, graph: Path, manifest: Manifest) -> str:
    """The text of the model's config.pbtxt."""
    inputs, outputs = _inputs(manifest), list(manifest.outputs)
    batched = shares_batches(graph, manifest, [*inputs, *outputs])
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {MAX_BATCH if batched else 0}",
    ]
    for kind, specs in (("input", inputs), ("output", outputs)):
        lines += [line for spec in specs for line in _tensor(kind, spec, batched=batched)]
    if batched:
        lines.append("dynamic_batching { }")
    for key, value in _parameters(manifest):
        text = f'key: "{key}" value {{ string_value: {json.dumps(value)} }}'
        lines.append(f"parameters {{ {text} }}")
    return "\n".join(lines) + "\n"


def _tensor(kind: str, spec: TensorSpec, *, batched: bool) -> Iterator[str]:
    shape = spec.shape[1:] if batched else spec.shape  # Triton adds the batch axis
    dims = ", ".join(str(size) if isinstance(size, int) else "-1" for size in shape)
    yield f"{kind} {{"
    yield f"  name: {json.dumps(spec.name)}"
    yield f"  data_type: {DATA_TYPES[spec.dtype]}"
    if dims:
        yield f"  dims: [ {dims} ]"
    else:  # one value for each row; dims may not be empty
        yield "  dims: [ 1 ]"
        yield "  reshape { shape: [ ] }"
    yield "}"


def _parameters(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """The model's origin, as parameters that the backend ignores."""
    yield "loradeploy.task", manifest.task
    yield "loradeploy.base", manifest.base.digest or ""
    if manifest.merged_adapter is not None:
        yield "loradeploy.adapter", manifest.merged_adapter.digest


def _inputs(manifest: Manifest) -> list[TensorSpec]:
    """The inputs of the graph that Triton runs: the base's and the side inputs.

    `adapter_ranks` is not an input of required.onnx.
    """
    sides = (spec for spec in manifest.side_inputs() if spec.name != ADAPTER_RANKS)
    return [*manifest.inputs, *sides]


def shares_batches(graph: Path, manifest: Manifest, specs: Sequence[TensorSpec]) -> bool:
    """Whether batching requests does not change their results."""
    side = {spec.name for spec in manifest.side_inputs()}
    if side and manifest.layout != ROWS:
        return False  # slots are shared by the whole batch
    # In this layout the first dimension of a side input is the rows.
    firsts = {
        spec.shape[0] if spec.shape else None
        for spec in specs
        if spec.name not in side or not _of_slots(spec)
    }
    return firsts == {"batch"} and not _has_shared_scale(graph)


def _of_slots(spec: TensorSpec) -> bool:
    return bool(spec.shape) and spec.shape[0] == ADAPTERS


def _has_shared_scale(graph: Path) -> bool:
    import onnx

    try:
        model = onnx.load(graph, load_external_data=False)
    except Exception as problem:
        raise ExportError(f"{graph} cannot be read: {problem}") from None
    waiting = [model.graph, *model.functions]
    while waiting:
        for node in waiting.pop().node:
            if node.op_type.startswith(SHARED_SCALE):
                return True
            for attribute in node.attribute:
                waiting += [attribute.g] if attribute.HasField("g") else []
                waiting += list(attribute.graphs)
    return False


def _write_side_inputs(bundle: Path, place: Path, manifest: Manifest) -> None:
    """Write the side inputs of the base and each adapter, with zeros in place of rank 0."""
    if "base" in manifest.adapters:
        raise UsageError(
            "an adapter is named base, as the side inputs of the base model are in a Triton"
            " repository: export it with another name"
        )
    files = {"base": bundle / REQUIRED_VALUES_NAME} | {
        name: bundle / ADAPTERS_DIRECTORY / f"{name}.safetensors" for name in manifest.adapters
    }
    for name, file in files.items():
        arrays, _ = read_arrays(file, error=BundleError)
        write_arrays(place / f"{name}.safetensors", of_least_rank(arrays, manifest), {})
