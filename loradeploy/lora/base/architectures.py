"""Architectures of transformers that are not exported, by model type, and why.

A training refuses them, too: its adapter could not be deployed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loradeploy.adapter.tasks import SEQ2SEQ_LM

_COMPLEX: Final = (
    "its rotary embedding computes with complex numbers, which torch.onnx does not translate"
)
# torch.export or torch.onnx (2.13) refuses the architecture, or it is not a decoder that generates
# token by token.
UNTRACEABLE: Final = {
    "deepseek_v2": _COMPLEX,
    "llama4_text": _COMPLEX,
    "paligemma": "all tokens of a prompt attend to each other, which a decoder that continues from"
    " a cache does not do",
    "xglm": "it extends its table of positions by the length of the text, which a trace cannot"
    " follow",
}

# Encoder-decoders that cannot be two graphs with caches.
_IN_BLOCKS: Final = "its encoder attends in blocks of the source, whose number a graph fixes"
_EXPERTS: Final = "its mixtures of experts drop tokens by the size of a batch"
_OLD_CACHE: Final = "it has no cache in transformers' common form"
_NOT_SPLIT: Final[Mapping[str, str]] = {
    "encoder-decoder": "its decoder is a model of its own",
    "fsmt": _OLD_CACHE,
    "led": _IN_BLOCKS,
    "longt5": _IN_BLOCKS,
    "nllb-moe": _EXPERTS,
    "prophetnet": "it decodes several tokens at once, for its own cache",
    "speech-encoder-decoder": "its decoder is a model of its own",
    "switch_transformers": _EXPERTS,
    "vision-encoder-decoder": "its decoder is a model of its own",
}
# Class name endings of encoder-decoders that are not language models.
_HEADS: Final = ("ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification")


def architecture(config: Mapping[str, Any]) -> str:
    """The class of the model in a config.json, or else its type, for messages."""
    names = config.get("architectures") or [config.get("model_type") or "unknown"]
    return str(names[0])


def encoder_decoder_refusal(config: Mapping[str, Any], task: str | None) -> str | None:
    """Why the encoder-decoder of `config` is not exported for `task` (None: its own); else None.

    Also None for models that are not encoder-decoders.
    """
    if not config.get("is_encoder_decoder"):
        return None
    if (why := _NOT_SPLIT.get(str(config.get("model_type")))) is not None:
        return (
            f"{architecture(config)} is not supported: {why}. Encoder-decoders with two graphs are"
            " listed in docs/seq2seq.md"
        )
    if task not in (None, SEQ2SEQ_LM) or architecture(config).endswith(_HEADS):
        return (
            f"{architecture(config)} is an encoder-decoder model, which is exported for"
            f" {SEQ2SEQ_LM} only"
        )
    return None


def untraceable(model_type: str) -> str | None:
    """Why a decoder of this type cannot be exported from a checkpoint; None if it can."""
    if (reason := UNTRACEABLE.get(model_type)) is None:
        return None
    return (
        f"({model_type}) cannot be exported from a checkpoint: {reason}: merge its adapters with"
        " PEFT, and run it in PyTorch"
    )
