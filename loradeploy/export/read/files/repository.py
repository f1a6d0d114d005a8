"""Choose the graph in a directory of ONNX files, and find its config and tokenizer.

Repositories for transformers.js keep config and tokenizer at the top and the graphs in onnx/, one
for each precision (model.onnx, model_fp16.onnx, model_q4.onnx, …); optimum writes decoders in
parts (decoder_model.onnx, decoder_with_past_model.onnx, decoder_model_merged.onnx).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loradeploy.adapter.files.base_files import GRAPHS_FOLDER, graphs_in
from loradeploy.bundle.names import CONFIG_NAME, GENAI_CONFIG_NAME, GRAPH_NAME
from loradeploy.errors import ModelError, UsageError, listed_names
from loradeploy.paths import resolved
from loradeploy.printable import logger_of

logger = logger_of(__name__)

_TOKENIZERS: Final = ("tokenizer*", "vocab.txt", "vocab.json", "spiece.model")
# One decoder in several files: without the cache, with it, and both in one.
_MERGED_DECODER: Final = "decoder_model_merged.onnx"
_DECODER_PARTS: Final = ("decoder_model", "decoder_with_past_model", "decoder_model_merged")
_ENCODER_PART: Final = "encoder_model"
# Endings of the names that transformers.js gives to graphs of other precisions, longest first.
_ENDINGS: Final = (
    *("_quantized", "_q4f16", "_q8f16", "_q2f16", "_q1f16", "_uint8", "_fp16", "_int8", "_bnb4"),
    *("_q4", "_q8", "_q2", "_q1"),
)
# Suffixes of precisions in these names. fp16 needs such a graph; int8 and int4 are quantized from
# model.onnx if it exists.
_CALLED: Final = {"fp16": ("_fp16",), "int8": ("_quantized", "_int8"), "int4": ("_q4",)}
_LISTED: Final = 8
_WIDTH: Final = 400  # characters for their names


@dataclass(frozen=True)
class Parts:
    """The graphs of an encoder-decoder: its encoder, and its decoder without and with a cache.

    `first` and `further` are one file if that has both in an If.
    """

    encoder: Path
    first: Path
    further: Path


def find_parts(directory: Path, precision: str | None = None) -> Parts | None:
    """The parts of an encoder-decoder in `directory`; None if it has no encoder-decoder in parts.

    Those of full precision, or named after the requested `precision`, or the only ones.

    Raises:
        ModelError: the parts are not complete.
    """
    graphs = graphs_in(directory)
    by_name = {graph.name: graph for graph in graphs}
    kinds = {_part(graph) for graph in graphs}
    if _ENCODER_PART not in kinds or "model" in kinds or not kinds & {*_DECODER_PARTS}:
        return None
    named = _CALLED.get(precision or "", ())
    found = {
        ending: parts
        for ending in ("", *_ENDINGS)
        if (parts := _parts(by_name, ending)) is not None
    }
    order = [*named, ""] if precision == "fp16" else ["", *named]
    if len(found) == 1:
        order += found
    chosen = next((found[ending] for ending in order if ending in found), None)
    if chosen is None:
        raise ModelError(
            f"{directory} has an encoder-decoder in parts, but not {_ENCODER_PART}.onnx with a"
            f" decoder with a cache ({_MERGED_DECODER}, or decoder_model.onnx and"
            " decoder_with_past_model.onnx): export its PyTorch checkpoint, or give the file of one"
            " part"
        )
    return chosen


def _parts(by_name: Mapping[str, Path], ending: str) -> Parts | None:
    """The parts whose names have the `ending`; None if one is missing."""
    encoder, first, further, merged = (
        by_name.get(f"{part}{ending}.onnx") for part in (_ENCODER_PART, *_DECODER_PARTS)
    )
    if encoder is None:
        return None
    if first is not None and further is not None:
        return Parts(encoder, first, further)
    return None if merged is None else Parts(encoder, merged, merged)


def find_graph(directory: Path, precision: str | None = None) -> Path | None:
    """The ONNX file to use in `directory`; None if it has none.

    The only one, else model.onnx or a merged decoder, else the one named after the requested
    `precision`. If there are several, the choice is logged.

    Raises:
        UsageError: the choice is ambiguous.
    """
    graphs = graphs_in(directory)
    if len(graphs) < 2:
        return graphs[0] if graphs else None
    by_name = {graph.name: graph for graph in graphs}
    parts = {_part(graph) for graph in graphs}
    chosen = None
    complete = GRAPH_NAME if "model" in parts else _MERGED_DECODER
    if complete == GRAPH_NAME or parts <= set(_DECODER_PARTS):
        stem = complete.removesuffix(".onnx")
        named = [f"{stem}{ending}.onnx" for ending in _CALLED.get(precision or "", ())]
        order = [*named, complete] if precision == "fp16" else [complete, *named]
        chosen = next((by_name[name] for name in order if name in by_name), None)
    if chosen is not None:
        others = _names(directory, [graph for graph in graphs if graph != chosen])
        logger.warning(
            "%s: using %s of %d graphs; to use another, give its file: %s",
            directory,
            chosen.relative_to(directory),
            len(graphs),
            others,
        )
        return chosen
    raise UsageError(
        f"{directory} has several ONNX files, give one of them: {_names(directory, graphs)}"
    )


def config_directory(graph: Path) -> Path:
    """The directory of the config for the file `graph`: the same, or one level up."""
    return _nearest(graph, (CONFIG_NAME, GENAI_CONFIG_NAME))


def tokenizer_directory(graph: Path) -> Path:
    """The directory of the tokenizer for the file `graph`: the same, or one level up."""
    return _nearest(graph, _TOKENIZERS)


def _nearest(graph: Path, patterns: Sequence[str]) -> Path:
    """The directory of `graph`, or the one above if only that has files of these patterns."""
    for directory in (graph.parent, above(graph)):
        if directory is not None and any(True for name in patterns for _ in directory.glob(name)):
            return directory
    return graph.parent


def above(graph: Path) -> Path | None:
    """The repository that contains the folder of `graph`; None if the level up is not a repository.

    It is one if the folder is named onnx, or if the folder has no config and the level up has one.
    """
    folder = resolved(graph).parent
    has_config = any((folder / name).is_file() for name in (CONFIG_NAME, GENAI_CONFIG_NAME))
    if folder.name == GRAPHS_FOLDER or (not has_config and (folder.parent / CONFIG_NAME).is_file()):
        return folder.parent
    return None


def _names(directory: Path, graphs: Sequence[Path]) -> str:
    return listed_names(
        (str(graph.relative_to(directory)) for graph in graphs), _LISTED, width=_WIDTH
    )


def _part(graph: Path) -> str:
    """The name of `graph` without the suffix of its precision."""
    stem = graph.stem
    return next((stem.removesuffix(end) for end in _ENDINGS if stem.endswith(end)), stem)
