"""A PyTorch model as a backend: what a decoder, an encoder or both of them give in PyTorch."""

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


# transformers' name for how many positions of logits are computed.
_KEEP: Final = "logits_to_keep"


class TorchModel:
    """A PyTorch model as a backend; the adapter is what is in it at the time.

    `known`: as `plain_feeds`. `last`: of a decoder only the last
    position is asked for, where the model can leave the others out. `tokens`: how many tokens the
    base and each adapter have, where the model has rows for more; the logits of others are hidden.
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
        # The first is the task's own, which a graph may call something else than PyTorch does.
        first, *rest = output_names(manifest)
        self._outputs = (first if manifest.tower else TASK_TABLE[manifest.task].output, *rest)
        self._taken = inspect.signature(model.forward).parameters
        self._last = last and _KEEP in self._taken

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

        `blocks`: whether the places of an image attend to each other where the bundle has it so.
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
            if value.dtype != torch.float64:  # calibration runs in that, too
                value = value.float()
            values.append(value.numpy())
        hidden = hidden_logit(np.float32)
        for row, adapter in enumerate(adapters if self._tokens else ()):
            values[0][row, ..., self._tokens[adapter] :] = hidden
        return joined(values), getattr(result, "past_key_values", None)

    def encode(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], adapters: Sequence[str | None]
    ) -> NDArray[Any]:
        """See `phases.models.SourceModel`: what is in transformers' own cache of the source."""
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
        return by_source([found[name] for name in self._manifest.encoder.outputs])

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        """What the model reads of tokens: [rows, tokens, hidden]."""
        find: Any = self._model.get_input_embeddings
        result: torch.Tensor = find()(ids)
        return result

    def with_embeds(self, prompt: Sequence[int], fed: Fed | None = None) -> Fed:
        """What the model gives for a prompt with embeddings, `fed` or drawn ones."""
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
    """An encoder-decoder's encoder as a model of its own: it gives the source's keys and values."""

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
    """The values for the reference, which is float32 whatever the graph takes."""
    import torch

    tensor = torch.from_numpy(values)
    return tensor.float() if tensor.is_floating_point() else tensor
