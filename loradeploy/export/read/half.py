"""Graphs of one half of an encoder-decoder, as optimum exports them.

encoder_model             input_ids or input_features → states; its modules have no path
decoder_model             states of the encoder → first tokens, and keys and values of the states
decoder_with_past_model   these keys and values → further tokens

Each is a bundle of its own. An adapter for the whole model is split: factors of modules that a
graph does not have act in another one. A classifier, and a model without a head, make the decoder's
input from input_ids: the graph takes what an encoder takes, but is the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.tasks import LM_HEAD
from loradeploy.bundle.names import DECODER_INPUT_IDS, ENCODER_HIDDEN_STATES, is_cross
from loradeploy.export.graph.scopes import NAME_SCOPES

if TYPE_CHECKING:
    import onnx_ir as ir

# The path of the halves by model type; in others they are below `model`.
_BARE: Final = ("longt5", "mt5", "t5", "umt5")
# The projections of the encoder's states to keys and values, by layer.
_CROSS: Final = {True: "block.{}.layer.1.EncDecAttention.", False: "layers.{}.encoder_attn."}
_WHISPERS_HEAD: Final = "proj_out"
_KEYS_AND_VALUES: Final = {True: ("k", "v"), False: ("k_proj", "v_proj")}
_DECODER: Final = re.compile(r"\bdecoder\b")  # in the path of a module


def other_half(graph: ir.Graph, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules of an encoder-decoder that are in another graph; () for a whole model."""
    taken = {str(value.name) for value in graph.inputs}
    if not config.get("is_encoder_decoder") or DECODER_INPUT_IDS in taken:
        return ()
    bare = config.get("model_type") in _BARE
    path = "" if bare else "model."
    cached = any(map(is_cross, taken))
    if ENCODER_HIDDEN_STATES in taken:
        return (f"{path}encoder",)
    if not cached:
        return () if _has_decoder(graph) else (f"{path}decoder", LM_HEAD, _WHISPERS_HEAD)
    layers = config.get("num_decoder_layers") or config.get("decoder_layers") or 0
    projections = (
        f"{path}decoder.{_CROSS[bare].format(layer)}{name}"
        for layer in range(int(layers))
        for name in _KEYS_AND_VALUES[bare]
    )
    return (f"{path}encoder", *projections)


def _has_decoder(graph: ir.Graph) -> bool:
    """Whether names show that a graph that takes what an encoder takes has a decoder too."""
    nodes = (text for node in graph for text in (node.name, node.metadata_props.get(NAME_SCOPES)))
    return any(_DECODER.search(text) for text in (*nodes, *graph.initializers) if text)


def name_encoder(graph: ir.Graph, config: Mapping[str, Any]) -> None:
    """Prefix the modules of an encoder with their path in the model, if they have none."""
    if not any(name.endswith("decoder") for name in other_half(graph, config)):
        return
    path = "encoder" if config.get("model_type") in _BARE else "model/encoder"
    named = [
        n
        for n in graph
        if str(n.name or "").startswith("/") and NAME_SCOPES not in n.metadata_props
    ]
    if any(f"/{path}/" in f"{node.name}/" for node in named):
        return
    for node in named:
        node.name = f"/{path}{node.name}"
