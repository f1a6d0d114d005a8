"""Identify the modules of graphs of other exporters, and complete them from files beside them.

The onnxruntime-genai builder writes no config.json, and only a symbol for the size of a head; its
genai_config.json has both.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.names import (
    GENAI_CONFIG_NAME,
    LEFT,
    NO_PADDING,
    PAST,
    POSITION_IDS,
    RIGHT,
    present_of,
)
from loradeploy.errors import ExportError, ModelError, listed, listed_names
from loradeploy.export.graph.edit import constant_of, integer_of
from loradeploy.export.match.feature_order import reads_interleaved_pairs, reordering_node
from loradeploy.export.match.linears import Findings, Linear, annotate_modules, find_linears
from loradeploy.export.match.modules.identity import CheckpointWeights
from loradeploy.export.match.modules.mapping import ModuleMap
from loradeploy.export.match.modules.naming import Namer, by_graph, first_of, keeping_fused
from loradeploy.export.match.modules.wrappers import name_parts
from loradeploy.export.match.operators import GROUP_QUERY_ATTENTION, is_unreached, unreached_layers
from loradeploy.export.match.own_factors import own_factor
from loradeploy.export.match.products import products
from loradeploy.export.read.later_calls import similar_later_calls
from loradeploy.export.read.normalize import SCALE
from loradeploy.export.read.reach import check_reached
from loradeploy.export.read.source import read_config
from loradeploy.files import read_json
from loradeploy.lora.base.formats import check_unquantized
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.adapter.adapter import Adapter

logger = logger_of(__name__)

# Architectures whose checkpoints have a fused q, k, v weight, by onnxruntime-genai's names.
_FUSED_QKV: Final = ("phi3", "phi3small", "phi3v", "phimoe")
_LISTED: Final = 4
_TIED: Final = "tie_word_embeddings"
_CACHE_AXES: Final = 4
# transformers' models whose rotary embeddings rotate halves of a head, not interleaved pairs.
_HALVES: Final = (
    *("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "olmo2", "phi"),
    *("phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2"),
)
_INTERLEAVED: Final = {
    "RotaryEmbedding": "interleaved",
    GROUP_QUERY_ATTENTION: "rotary_interleaved",
}
_ROTATED: Final = ("q_proj", "k_proj", "qkv_proj")
_IN_DOUBT: Final = (
    "the graph rotates interleaved rows, where transformers' model has halves, so that the rows of"
    " q and k are likely in another order: give `checkpoint`, whose numbers show it"
)


@dataclass(frozen=True)
class Evidence:
    """The user's evidence for the modules of a graph.

    `checkpoint`: the checkpoint that the graph was exported from. `map`: a file, see mapping.py.
    """

    checkpoint: Path | None = None
    map: str | os.PathLike[str] | None = None


@dataclass(frozen=True)
class _Doubt:
    """Why a layer takes no adapters. `warning`: the warning if no adapter targets the layer."""

    reason: str
    warning: str | None = None


def find_modules(
    model: ir.Model,
    directory: Path,
    evidence: Evidence,
    adapters: Iterable[Adapter],
    *,
    proven: bool = False,
) -> Findings:
    """Identify the linear layers of a graph by all evidence, and annotate the graph.

    `proven`: whether the graph's annotations were made by an export with the checkpoint.

    Raises:
        UsageError: an invalid map, or an entry of it that matches nothing.
        ModelError: the checkpoint does not exist.
        ExportError: the graph is of another checkpoint, or a layer that an adapter targets cannot
            take adapters.
    """
    adapters = tuple(adapters)
    mapped = None if evidence.map is None else ModuleMap(evidence.map)
    given = list(adapters)
    if evidence.checkpoint is not None:
        check_unquantized(evidence.checkpoint)
    weights = (
        None
        if evidence.checkpoint is None
        else CheckpointWeights(evidence.checkpoint, _modules_of(given))
    )
    namers: list[Namer] = [] if mapped is None else [mapped]
    if weights is not None:
        findings = find_linears(model, weights.namer(first_of([*namers, by_graph])))
    else:
        namers += [keeping_fused(_fused_projections(directory, given)), by_graph]
        findings = find_linears(model, first_of(namers))
    if mapped is not None:
        mapped.check_used()
    check_reached(model.graph, findings, adapters)
    needed = _modules_of(adapters)
    unknown = _unknown_users(model.graph, findings)
    findings = _without(findings, needed, _scaled_by_module)
    findings = _without(findings, needed, partial(_called_elsewhere, unknown))
    similar = {
        linear.module: (first.module, later.module)
        for first, later in similar_later_calls(model.graph, findings.linears)
        for linear in (first, later)
        if later.module not in needed  # else two modules
    }
    findings = _without(findings, needed, partial(_called_with_other_weight, similar))
    if weights is None:
        findings = _without(findings, needed, _scaled)
        if not proven:
            findings = _without(findings, needed, _reordered)
            _warn_of_names(findings)
    else:
        _compare(model.graph, findings, weights)
        for node in (node for linear in findings.linears.values() for node in linear.nodes):
            node.metadata_props.pop(SCALE, None)  # the comparison proved that its weight is W
        name_parts(model, findings.linears)
    annotate_modules(findings.linears)
    if weights is None and not proven and _has_rows_in_doubt(model, directory, findings):
        _check_order_of_rows(adapters)
        return _without_rotated(findings)
    return findings


def _warn_of_names(findings: Findings) -> None:
    """Warn which evidence identified the layers, because no weights prove it."""
    found_by = Counter(linear.found_by for linear in findings.linears.values())
    for evidence, count in found_by.items():
        logger.warning(
            "identified by %s alone: %d layers. Weights that were scaled, reordered or merged have"
            " the same names: to prove them, give `checkpoint`, or compare the bundle with PyTorch"
            " (loradeploy parity --model)",
            evidence,
            count,
        )


def settings_beside(directory: Path, checkpoint: Path | None) -> dict[str, Any]:
    """The config of the graph, else of the checkpoint, else derived from onnxruntime-genai's."""
    config = read_config(directory)
    if not config and checkpoint is not None:
        config = read_config(checkpoint)
    return config or _from_genai(_genai_settings(directory))


def ties_head(settings: Mapping[str, Any]) -> bool | None:
    """Whether a model with this config ties its output head to the embedding; None if unknown.

    transformers omits the field if it is true by default.
    """
    inner = settings.get("text_config")
    stated = (inner if isinstance(inner, Mapping) else settings).get(_TIED)
    if isinstance(stated := settings.get(_TIED, stated), bool):
        return stated
    return True if "architectures" in settings else None  # onnxruntime-genai's does not say


def assets_of(directory: Path, checkpoint: Path | None) -> Path:
    """The directory of the tokenizer: that of the graph, or the checkpoint."""
    if checkpoint is None or any(directory.glob("tokenizer*")):
        return directory
    return checkpoint


def complete_cache(model: ir.Model, directory: Path, checkpoint: Path | None = None) -> None:
    """Replace the symbol for the size of a head in the cache's shapes by its value.

    Raises:
        ExportError: no config specifies it.
    """
    import onnx_ir as ir

    symbols: dict[str, int] = {}
    unnamed: dict[str, int] = {}  # by input or output, for axes without a symbol
    for value in model.graph.inputs:
        if not str(value.name).startswith(PAST) or value.shape is None:
            continue
        if len(value.shape) != _CACHE_AXES or isinstance(value.shape[3], int):
            continue
        size = _genai_settings(directory).get("decoder", {}).get("head_size")
        if not isinstance(size, int):
            size = _head_size(settings_beside(directory, checkpoint))
        if size is None:
            raise ExportError(
                f"the graph does not specify the last size of {value.name}, and neither does a"
                f" config.json or {GENAI_CONFIG_NAME} beside it"
            )
        if value.shape[3].value is None:
            unnamed |= dict.fromkeys((str(value.name), present_of(str(value.name))), size)
        else:
            symbols[value.shape[3].value] = size
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None:
            continue
        sizes = [d if isinstance(d, int) else symbols.get(d.value or "", d) for d in value.shape]
        if str(value.name) in unnamed and len(sizes) == _CACHE_AXES:
            sizes[-1] = unnamed[str(value.name)]
        value.shape = ir.Shape(sizes)


def padding_of(model: ir.Model) -> str:
    """The side on which the rows of a batch are padded, if the graph cannot be run to measure it.

    GroupQueryAttention counts a row's tokens from its beginning (its input seqlens_k). A decoder
    without position_ids may count positions from the beginning of its cache, see
    trial/padding.py.
    """
    if any(node.op_type == GROUP_QUERY_ATTENTION for node in model.graph):
        return RIGHT
    inputs = {str(value.name) for value in model.graph.inputs}
    counted_by_input = POSITION_IDS in inputs or not any(name.startswith(PAST) for name in inputs)
    return LEFT if counted_by_input else NO_PADDING


def _has_rows_in_doubt(model: ir.Model, directory: Path, findings: Findings) -> bool:
    """Whether the rows of q and k may be in another order than in transformers' model.

    Meta's layout, which llama.cpp uses too, interleaves the rows that transformers has in halves.
    """
    model_type = settings_beside(directory, None).get("model_type")
    if model_type is not None and model_type not in _HALVES:
        return False
    return any(
        node.op_type in _INTERLEAVED and integer_of(node, _INTERLEAVED[node.op_type])
        for node in model.graph.all_nodes()
    ) or any(
        reads_interleaved_pairs(linear)
        for module, linear in findings.linears.items()
        if module.endswith(_ROTATED)
    )


def _check_order_of_rows(adapters: Iterable[Adapter]) -> None:
    """Raise ExportError if an adapter targets projections whose rows are likely reordered."""
    modules = sorted(m for a in adapters for m in a.factors if m.endswith(_ROTATED))
    if modules:
        raise ExportError(f"{modules[0]}: {_IN_DOUBT}")


def _without_rotated(findings: Findings) -> Findings:
    """The findings without q and k, so that adapters for them are refused later too."""
    rotated = sorted(module for module in findings.linears if module.endswith(_ROTATED))
    if rotated:
        logger.warning("left without adapters, %s: %s", listed_names(rotated, _LISTED), _IN_DOUBT)
    kept = {m: linear for m, linear in findings.linears.items() if m not in rotated}
    return Findings(kept, findings.unidentified)


def _without(
    findings: Findings, needed: Container[str], doubt: Callable[[Linear], _Doubt | None]
) -> Findings:
    """The findings without the layers for which `doubt` gives a reason to take no adapters.

    Raises:
        ExportError: an adapter targets one of them.
    """
    kept, left = dict(findings.linears), list(findings.unidentified)
    for module, linear in findings.linears.items():
        if (found := doubt(linear)) is None:
            continue
        if module in needed:
            raise ExportError(f"{module}: {found.reason}")
        if found.warning:
            logger.warning("left without adapters, %s: %s", module, found.warning)
        del kept[module]
        left.append(f"{linear.nodes[0].name} [{linear.in_features} → {linear.out_features}]")
    return Findings(kept, tuple(left))


def _scaled(linear: Linear) -> _Doubt | None:
    """Doubt about a product with a factor, which names alone do not explain.

    With y = α x W, the adapter's update is scaled by α if W is the checkpoint's matrix, but not if
    W was divided by α.
    """
    node = linear.nodes[0]
    alpha = node.metadata_props.get(SCALE)
    if alpha is None:
        return None
    return _Doubt(
        f"{node.name} multiplies its product by {alpha}, and names do not show"
        " whether its weight is the checkpoint's or was divided by that: give `checkpoint`"
    )


def _reordered(linear: Linear) -> _Doubt | None:
    """Doubt about a layer whose features the graph reorders."""
    node = reordering_node(linear)
    if node is None:
        return None
    where = node.name or node.outputs[0].name
    return _Doubt(
        f"{where} ({node.op_type}) puts its features into another order, so that"
        " the rows of its weight are likely in another order too, unless the model itself"
        " orders them so: give `checkpoint`, whose numbers show it; a map does not",
        warning=f"{where} reorders its features",
    )


def _scaled_by_module(linear: Linear) -> _Doubt | None:
    """Doubt about a module with a factor, which would scale an adapter's update too."""
    factor = own_factor(linear)
    if factor is None:
        return None
    return _Doubt(
        f"its node {factor.name} scales the product {linear.nodes[0].name}, and"
        " would scale what an adapter adds to it: give the graph of a module without a"
        " factor of its own"
    )


def _unknown_users(graph: ir.Graph, findings: Findings) -> dict[ir.Value, ir.Node]:
    """A product of no known module by its weight."""
    linears = findings.linears.values()
    known = {node for linear in linears for node in linear.nodes}
    found = {p.weight: p.node for p in products(graph) if p.node not in known}
    for node in graph:  # a later call may be fused with others, as ALBERT's into Attention
        if is_unreached(node):
            for linear in linears:
                if any(v is not None and _contains(v, linear) for v in node.inputs):
                    found[linear.weight] = node
    return found


def _contains(value: ir.Value, linear: Linear) -> bool:
    """Whether a constant [in, outputs of several layers] has the weight of `linear` as a part."""
    size, constant = linear.out_features, value.const_value
    if linear.quantized or constant is None or linear.weight.const_value is None:
        return False
    shape = constant.shape.numpy()
    if len(shape) != 2 or shape[0] != linear.in_features or shape[1] % size:
        return False
    weight, columns = constant_of(linear.weight), constant_of(value)
    weight = weight.T if linear.transposed else weight
    return any(
        np.array_equal(columns[:, at : at + size], weight) for at in range(0, shape[1], size)
    )


def _called_elsewhere(unknown: Mapping[ir.Value, ir.Node], linear: Linear) -> _Doubt | None:
    """Doubt about a layer whose weight another product, of no known module, uses too.

    It may be another call of the layer, which would not get the adapter.
    """
    other = unknown.get(linear.weight)
    if other is None:
        return None
    where = other.name or other.outputs[0].name
    return _Doubt(
        f"{where} has the same weight, and no name says whether it is another call of this module:"
        " identify it in `module_map`",
        warning=f"{where}, of no known module, has the same weight",
    )


def _called_with_other_weight(
    similar: Mapping[str, tuple[str, str]], linear: Linear
) -> _Doubt | None:
    """Doubt about a layer that may be called twice, with two copies of its weight that differ."""
    if linear.module not in similar:
        return None
    first, later = similar[linear.module]
    return _Doubt(
        f"{later} may be another call of it, with a copy of its weight that differs, as if only"
        " one was quantized: give the graph before that",
        warning=f"{first} and {later} may be one module with two different weights",
    )


def _fused_projections(directory: Path, adapters: Iterable[Adapter]) -> set[str]:
    """The fused projections that are modules of the checkpoint, as far as known."""
    return {
        module for adapter in adapters for module in adapter.factors if module.endswith(".qkv_proj")
    } | (_all_projections(directory) if _fuses_qkv(directory) else set())


def _fuses_qkv(directory: Path) -> bool:
    return _genai_settings(directory).get("type") in _FUSED_QKV


def _all_projections(directory: Path) -> set[str]:
    layers = _genai_settings(directory).get("decoder", {}).get("num_hidden_layers", 0)
    return {f"model.layers.{layer}.self_attn.qkv_proj" for layer in range(layers)}


def _modules_of(adapters: Iterable[Adapter]) -> set[str]:
    """The modules that adapters change."""
    saved = {name.rpartition(".")[0] for adapter in adapters for name in adapter.saved}
    return saved.union(*(adapter.factors for adapter in adapters))


def _compare(graph: ir.Graph, findings: Findings, weights: CheckpointWeights) -> None:
    missing = weights.missing()
    if not findings.linears:
        seen = f" (seen: {weights.reasons[0]})" if weights.reasons else ""
        why = (
            unreached_layers(graph) or "it is of another model, or the exporter changed the weights"
        )
        raise ExportError(
            f"no product of the graph has the weight of a matrix in the checkpoint: {why}{seen}"
        )
    if weights.reasons:
        logger.warning(
            "similar to modules of the checkpoint, and left without adapters: %s",
            listed(weights.reasons, _LISTED),
        )
    if missing:
        names = listed_names(missing, _LISTED)
        logger.warning("modules of the checkpoint that were not found in the graph: %s", names)


def _genai_settings(directory: Path) -> dict[str, Any]:
    file = directory / GENAI_CONFIG_NAME
    if not file.is_file():
        return {}
    model = read_json(file, error=ModelError).get("model")
    return model if isinstance(model, dict) else {}


def _from_genai(model: Mapping[str, Any]) -> dict[str, Any]:
    decoder = model.get("decoder")
    if not isinstance(decoder, Mapping):
        return {}
    named = {
        "model_type": model.get("type"),
        "vocab_size": model.get("vocab_size"),
        "max_position_embeddings": model.get("context_length"),
        "hidden_size": decoder.get("hidden_size"),
        "head_dim": decoder.get("head_size"),
        "num_hidden_layers": decoder.get("num_hidden_layers"),
        "num_attention_heads": decoder.get("num_attention_heads"),
        "num_key_value_heads": decoder.get("num_key_value_heads"),
        **{f"{token}_token_id": model.get(f"{token}_token_id") for token in ("bos", "eos", "pad")},
    }
    return {name: value for name, value in named.items() if value is not None}


def _head_size(config: Mapping[str, Any]) -> int | None:
    size, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if isinstance(config.get("head_dim"), int):
        return int(config["head_dim"])
    return size // heads if isinstance(size, int) and isinstance(heads, int) and heads else None
