"""Wrap a model as a module of positional tensors, which torch.export can trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.tasks import SEQ2SEQ_LM, Task
from loradeploy.bundle.names import INPUTS_EMBEDS, POSITION_IDS, TOKEN_TYPE_IDS
from loradeploy.export.trace import encoder_decoder
from loradeploy.export.trace.loading.image_text import has_image_blocks
from loradeploy.export.trace.signature import main_outputs, parameters_of, plain_inputs

if TYPE_CHECKING:
    import torch

WRAPPED: Final = "wrapped"  # the wrapper's attribute with the traced model


def wrapper_of(model: Any, kind: Task, first: str | None = None, *besides: str) -> torch.nn.Module:
    """Wrap `model` as a module with positional tensors, in the order of `example_of`.

    `first`: the name of the first tensor, if it is not the default. `besides`: the names of further
    tensors after the plain inputs.
    """
    import torch
    from transformers.cache_utils import DynamicCache

    if kind.name == SEQ2SEQ_LM:
        return encoder_decoder.wrapper(model)
    names, taken, outputs = (
        plain_inputs(model, kind),
        parameters_of(model),
        main_outputs(model, kind),
    )
    if first is not None:
        names[0] = first
    names += besides
    # The fused rotary embedding needs positions for every row; a model's default has one row.
    rotates = POSITION_IDS in taken and (
        bool(getattr(model.config, "rope_parameters", None))
        or getattr(model.config, "position_embedding_type", None) == "rotary"  # ESM
    )

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = model

        def forward(
            self, plain: Sequence[torch.Tensor], past: Sequence[tuple[torch.Tensor, torch.Tensor]]
        ) -> tuple[torch.Tensor, ...]:
            cache = DynamicCache([(key, value) for key, value in past])
            feeds = dict(zip(names, plain, strict=True))
            result = self.wrapped(**feeds, past_key_values=cache, use_cache=True)
            present = (part for layer in cache.layers for part in (layer.keys, layer.values))
            return (result.logits, *present)

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = model

        def forward(self, plain: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            feeds: dict[str, Any] = dict(zip(names, plain, strict=True))
            if "use_cache" in taken:
                feeds["use_cache"] = False
            if rotates:
                ids = plain[0]
                feeds[POSITION_IDS] = torch.zeros_like(ids) + torch.arange(ids.shape[1])
            result = self.wrapped(**feeds)
            return tuple(result[name] for name in outputs)

    return Decoder() if kind.cached else Encoder()


def embedded(model: Any, kind: Task) -> torch.nn.Module:
    """Wrap the decoder `model` to take embeddings instead of tokens, in its own way.

    After the decoder's plain inputs come `inputs_embeds` and `inputs_embeds_mask`, and optionally
    positions that replace `position_ids`.
    """
    import torch

    blocks = has_image_blocks(model.config.to_dict())
    wrapper = wrapper_of(model, kind, INPUTS_EMBEDS, *([TOKEN_TYPE_IDS] if blocks else []))
    names = plain_inputs(model, kind)

    class Embedded(torch.nn.Module):
        def forward(self, plain: Sequence[torch.Tensor], past: Any) -> Any:
            ids, *others = plain[: len(names)]
            given, places, *positions = plain[len(names) :]
            if positions:
                others[names.index(POSITION_IDS) - 1] = positions[0]
            own = model.get_input_embeddings()(ids)
            embeds = torch.where(places[..., None], given, own)
            types = [places.long()] if blocks else []  # 1 for an image
            return wrapper([embeds, *others, *types], past)

    return Embedded()
