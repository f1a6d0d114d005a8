"""`loradeploy.export`: write the bundle of a model and its adapters."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from loradeploy.errors import UsageError
from loradeploy.paths import expanded, takes_paths
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest

logger = logger_of(__name__)


@takes_paths("model", "output", "adapters", "checkpoint", "module_map", "triton")
def export(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    adapters: Mapping[str, str | os.PathLike[str]] | Iterable[str | os.PathLike[str]] | None = None,
    merge: bool = False,
    precision: str | None = None,
    task: str | None = None,
    side_inputs: Iterable[str] = (),
    layout: str | None = None,
    branches: bool | None = None,
    required_inputs: bool | None = None,
    requantize: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    module_map: str | os.PathLike[str] | None = None,
    fixed: Mapping[str, int] | None = None,
    attention: str | None = None,
    logits_to_keep: bool | None = None,
    quantize_embedding: bool = False,
    target: str | None = None,
    operator: bool | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = True,
    triton: str | os.PathLike[str] | None = None,
) -> Manifest:
    """Write the bundle `output` for `model` and return its manifest.

    Options set the form of the graph (precision, layout, …). For an option that is not given, a
    bundle that is exported again keeps its setting, and other models get the default (see the table
    in docs/bundles.md).

    Args:
        model: a Hugging Face directory or id, an ONNX file or directory, or a bundle.
        output: the bundle's directory. An existing bundle is replaced when the new one is complete.
        adapters: PEFT directories, by name or as a list of "[NAME=]DIR". If there is no such
            directory, DIR can be the name of an adapter in the bundle `model`.
        merge: merge the adapter into the weights. The graph then has no side inputs.
        precision: fp32 (the default for a checkpoint), fp16, bf16 (stored in bf16, computed in
            fp32), int8 or int4. An ONNX file keeps its own.
        task: one of `loradeploy.adapter.tasks` (causal-lm, sequence-classification,
            token-classification, feature-extraction, seq2seq-lm, image-classification,
            vision-tower, image-feature-extraction, question-answering). It is required if neither
            the adapters nor the model's architecture determine it, and selects the tower of CLIP
            and SigLIP.
        side_inputs: kinds of side inputs that every layer gets in addition to those that the given
            adapters need, for adapters that are loaded later: dora, bias, embedding, tokens,
            experts (lora is always included).
        layout: "rows", where slot i belongs to row i, which is faster, or "slots", where
            `adapter_ids` selects the slot of each row. The default is rows, and slots if embeddings
            have factors, which need the slot numbers.
        branches: give the base model its own branch of the graph, so that idle side inputs cost
            nothing. On by default for int8 and int4 only: in fp32 and fp16 each branch takes memory
            for its weights.
        required_inputs: also write required.onnx, the graph for clients that drop feeds of inputs
            with defaults (onnxruntime-node), and the base's side inputs as .safetensors.
        requantize: merge into int8, int4 or float8 weights and quantize them again; the manifest's
            merge_error is the part of the adapter that rounding lost.
        checkpoint: the directory that an ONNX model was exported from. Its weights identify the
            modules of the graph, regardless of node names, and the base model.
        module_map: a JSON file that identifies the modules instead, {"node name": "module"}. The
            names are regular expressions; a fused weight has a list of [module, outputs].
        fixed: sizes of dimensions by name (batch, sequence, past, total), for providers that
            compile a graph for its shapes.
        attention: "gqa" for ONNX Runtime's GroupQueryAttention, whose cache can be one buffer that
            is updated in place; batches are then padded on the right. "standard", the default, is
            ONNX's Attention. A graph with GroupQueryAttention cannot be converted back.
        logits_to_keep: give a decoder the optional input `logits_to_keep` [rows, kept], the
            positions to compute logits for. On by default if the graph has side inputs and supports
            it.
        quantize_embedding: store the token embedding of an int8 or int4 graph in 8 bits too, and
            once if the output head is tied to it. Adapters that change the embedding can then only
            be merged in the same export.
        target: the device that the bundle is for: "cpu", "cuda", "webgpu", "openvino" or "web".
            Sets the options that are not given to what runs on the device (see the table in
            docs/bundles.md), and refuses options that do not run there.
        operator: make low-rank updates, products of int8 and int4 weights and attention calls that
            the library of `loradeploy.build_operator` can replace (docs/bundles.md). Clients
            without the library run the same file. Low-rank updates need the layout "slots", which
            is then the default.
        trust_remote_code: run the Python files that a checkpoint's config names; they can do
            anything. Without it such a checkpoint is refused.
        overwrite: whether a bundle at `output` may be replaced.
        triton: a Triton model repository to which the bundle is also added as a model. The bundle
            must be merged or have `required_inputs`.

    Raises:
        UsageError: options that cannot be combined.
        ModelError: the model is missing or cannot be used.
        AdapterError: an adapter cannot be read, or (AdapterMismatchError) does not fit the model.
        ExportError: the model cannot be exported in this way, or the disk is full.
        MissingDependencyError: the model is a checkpoint, and torch is not installed.
    """
    from pathlib import Path

    from loradeploy.bundle.graph_form import check_form
    from loradeploy.bundle.manifest import own_files
    from loradeploy.bundle.names import MANIFEST_NAME
    from loradeploy.export.adapters.given import (
        adapter_directories,
        read_adapters,
        resolve_bundle_adapters,
        warn_of_omitted,
    )
    from loradeploy.export.bases.base import Options
    from loradeploy.export.building.content import build
    from loradeploy.export.read.files.source import check_options, resolve
    from loradeploy.export.read.modules.find import Evidence
    from loradeploy.export.requested import completed
    from loradeploy.export.tasks import check_task
    from loradeploy.export.triton import check_requested_form, write_repository
    from loradeploy.export.write import check_output, write_bundle
    from loradeploy.files import check_keeps_inputs, check_replaceable
    from loradeploy.lora.base.loading import custom_code

    destination = Path(output)
    check_output(destination, overwrite=overwrite)
    check_replaceable(destination, marker=MANIFEST_NAME, own_files=own_files)
    if task is not None:
        check_task(task)
    requested: dict[str, Any] = {
        "merge": merge,
        "precision": precision,
        "side_inputs": frozenset([side_inputs] if isinstance(side_inputs, str) else side_inputs),
        "layout": layout,
        "branches": branches,
        "required_inputs": required_inputs,
        "fixed": dict(fixed or {}),
        "attention": attention,
        "logits_to_keep": logits_to_keep,
        "quantize_embedding": quantize_embedding,
        "target": target,
        "operator": operator,
    }
    check_form(requested)
    if requantize and not merge:
        raise UsageError("`requantize` is for `merge`: side inputs do not change packed weights")
    directories = resolve_bundle_adapters(adapter_directories(adapters), model)
    evidence_paths = [path for path in (checkpoint, module_map) if path is not None]
    check_keeps_inputs(destination, [model, *directories.values(), *evidence_paths])
    loaded = read_adapters(directories)
    if merge and len(loaded) != 1:
        raise UsageError(f"`merge` takes exactly one adapter, {len(loaded)} are given")
    with custom_code(trust_remote_code):
        source = resolve(model, precision)
        check_options(
            source,
            trust_remote_code=trust_remote_code,
            evidence=bool(evidence_paths),
            adapters=directories.values(),
        )
        requested = completed(requested, source)
        if source.manifest is not None and not merge:
            warn_of_omitted(directories, source.directory, source.manifest, destination)
        if triton is not None:
            check_requested_form(requested)
        options = Options(
            adapters=loaded,
            **requested,
            task=task,
            requantize=requantize,
            evidence=Evidence(None if checkpoint is None else expanded(checkpoint), module_map),
            operator_kept=operator is None,
            directories=directories,
            scratch=next(place for place in destination.absolute().parents if place.is_dir()),
        )
        manifest, content = build(source, options)
        logger.info("writing %s", destination)
        written = write_bundle(destination, manifest, content)
    if triton is not None:
        logger.info("writing %s", write_repository(destination, triton, written))
    return written
