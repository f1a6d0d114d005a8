"""A PyTorch model as a backend: decoders, encoders and encoder-decoders."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.tasks import CAUSAL_LM, TASK_TABLE
from loradeploy.bundle.fitting.added_tokens import hidden_logit
from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import (
    ATTENTION_MASK,
    CROSS,
    INPUT_IDS,
    INPUTS_EMBEDS,
    INPUTS_EMBEDS_MASK,
    MROPE_POSITION_IDS,
    POSITION_IDS,
    TOKEN_TYPE_IDS,
    present_name,
)
from loradeploy.errors import ModelError
from loradeploy.parity.inputs.row_feeds import Known, plain_feeds
from loradeploy.parity.phases.fed import Fed, drawn, embeds_feeds
from loradeploy.parity.phases.outputs import by_source, joined, output_names
from loradeploy.runtime.text.padding import positions_of

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from loradeploy.parity.context import CheckContext


# transformers' argument for the number of positions whose logits are computed.
_KEEP: Final = "logits_to_keep"


class TorchModel:
    """A PyTorch model as a backend, with whatever adapter is currently in it.

    `known`: as in `plain_feeds`. `last`: compute a decoder's logits of the last position only, if
    the model supports it. `tokens`: vocabulary sizes of the base and of each adapter, if the model
    has more rows; the logits of the other tokens are hidden.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        manifest: Manifest,
        known: Known | None = None,
        *,
        tokens: Mapping[str | None, int] | None = None,
        last: bool = False,
    ) -> None:
        self._known = known
        self._tokens = tokens or {}
        self._model = model
        self._manifest = manifest
        self._task = manifest.task
        # The first is the task's main output, whose name in the graph may differ from PyTorch's.
        first, *rest = output_names(manifest)
        self._outputs = (first if manifest.tower else TASK_TABLE[manifest.task].output, *rest)
        self._taken = inspect.signature(model.forward).parameters
        self._last = last and _KEEP in self._taken

    @classmethod
    def of(cls, context: CheckContext, model: torch.nn.Module) -> TorchModel:
        """Return `model` as a backend for the cases of `context`."""
        return cls(model, context.manifest, context.cases.known, tokens=context.tokens)

    def forward(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        cache: Any,
        adapters: Sequence[str | None],
        *,
        embeds: Mapping[str, NDArray[Any]] | None = None,
        blocks: bool = True,
    ) -> tuple[NDArray[Any], Any]:
        """See `phases.models`, `Model` and `EmbedsModel`; the cache is transformers' own.

        `blocks`: whether the positions of an image attend to each other, if the bundle has that.
        """
        import torch

        if self._task != CAUSAL_LM:
            made = plain_feeds(self._manifest, ids, mask, self._known)
            feeds: dict[str, Any] = {n: _tensor(made[n]) for n in made if n in self._taken}
        else:
            feeds = {INPUT_IDS: torch.from_numpy(ids), ATTENTION_MASK: torch.from_numpy(mask)}
            feeds |= {"past_key_values": cache, "use_cache": True}
            if self._last:
                feeds[_KEEP] = 1
            if POSITION_IDS in self._taken:
                feeds[POSITION_IDS] = torch.from_numpy(positions_of(mask, ids.shape[1]).copy())
        with torch.inference_mode():
            if embeds is not None:
                own = self.embedding(feeds.pop(INPUT_IDS))
                places = torch.from_numpy(embeds[INPUTS_EMBEDS_MASK])[..., None]
                given = torch.from_numpy(embeds[INPUTS_EMBEDS]).to(own.dtype)
                feeds[INPUTS_EMBEDS] = torch.where(places, given, own)
                if blocks and self._manifest.image_blocks:
                    feeds[TOKEN_TYPE_IDS] = places[..., 0].long()
                if MROPE_POSITION_IDS in embeds:
                    feeds[POSITION_IDS] = torch.from_numpy(embeds[MROPE_POSITION_IDS].copy())
            result = self._model(**feeds)
        values = []
        for name in self._outputs:
            value = getattr(result, name, None)
            if value is None:
                raise ModelError(f"the bundle gives {name}, which the PyTorch model does not give")
            if value.dtype != torch.float64:  # calibration also runs in float64
                value = value.float()
            values.append(value.numpy())
        hidden = hidden_logit(np.float32)
        for row, adapter in enumerate(adapters if self._tokens else ()):
            values[0][row, ..., self._tokens[adapter] :] = hidden
        return joined(values, self._task), getattr(result, "past_key_values", None)

    def encode(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], adapters: Sequence[str | None]
    ) -> NDArray[Any]:
        """See `phases.models.SourceModel`; keys and values are read from transformers' cache."""
        import torch

        assert self._manifest.encoder is not None
        made = plain_feeds(self._manifest, ids, mask, self._known)
        feeds = {name: _tensor(made[name]) for name in made if name in self._taken}
        with torch.inference_mode():
            cache: Any = self._model(**feeds, use_cache=True).past_key_values
        found = {}
        for number, layer in enumerate(cache.cross_attention_cache.layers):
            for part, value in (("key", layer.keys), ("value", layer.values)):
                exact = value if value.dtype == torch.float64 else value.float()
                found[present_name(number, f"{CROSS}{part}")] = exact.numpy()
        return by_source([found[name] for name in self._manifest.encoder.caches])

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the input embeddings of `ids` [rows, tokens]: [rows, tokens, hidden]."""
        find: Any = self._model.get_input_embeddings
        result: torch.Tensor = find()(ids)
        return result

    def with_embeds(self, prompt: Sequence[int], fed: Fed | None = None) -> Fed:
        """Return `fed`, by default random embeddings, with the model's outputs for `prompt`."""
        import torch

        ids = np.array([prompt], np.int64)
        if fed is None:
            with torch.inference_mode():
                own = self.embedding(torch.from_numpy(ids)).double()
            mrope = any(spec.name == MROPE_POSITION_IDS for spec in self._manifest.embeds)
            size = float(own.square().mean().sqrt())
            fed = drawn(prompt, own.shape[-1], size, mrope=mrope)
        mask = np.ones_like(ids)
        embeds = embeds_feeds([fed], mask)
        values, _ = self.forward(ids, mask, None, [None], embeds=embeds, blocks=fed.blocks)
        return replace(fed, expected=values[0].astype(np.float32, copy=False))


@dataclass(frozen=True, eq=False)
class EncoderOf:
    """The encoder of an encoder-decoder as a model that returns the source's keys and values."""

    model: TorchModel

    def forward(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        cache: Any,
        adapters: Sequence[str | None],
        *,
        embeds: Mapping[str, NDArray[Any]] | None = None,
    ) -> tuple[NDArray[Any], Any]:
        """See `phases.models.EmbedsModel`; an encoder is fed no `embeds`."""
        return self.model.encode(ids, mask, adapters), None


def _tensor(values: NDArray[Any]) -> torch.Tensor:
    """Return the values as a tensor, floats as float32: the reference runs in float32."""
    import torch

    tensor = torch.from_numpy(values)
    return tensor.float() if tensor.is_floating_point() else tensor
