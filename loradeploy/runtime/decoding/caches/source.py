"""Encoder-decoders: the encoder's outputs for the decoder, and the decoder's first tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import (
    ATTENTION_MASK,
    CONFIG_NAME,
    ENCODER_ATTENTION_MASK,
    INPUT_IDS,
    past_of,
)
from loradeploy.bundle.text.settings import GenerationSettings
from loradeploy.bundle.text.tokenizer_files import positions_of_model
from loradeploy.errors import BundleError, UsageError, shown
from loradeploy.runtime.running.limits import ENDLESS
from loradeploy.runtime.text.padding import pad

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.runtime.decoding.caches.protocols import RowAdapters
    from loradeploy.runtime.session import AdapterSession


@dataclass(frozen=True)
class Target:
    """The start token and the limits of an encoder-decoder.

    `start`: the token that a target starts with, if generation_config.json has none. `positions`:
    the decoder's number of positions; `sources`: the encoder's. None for no limit.
    """

    start: int | None
    positions: int | None
    sources: int | None

    @classmethod
    def of(cls, bundle: Path) -> Target:
        """The target of an encoder-decoder's bundle, or of a checkpoint.

        Raises:
            BundleError: config.json has invalid sizes or tokens.
        """
        config = model_config(bundle)
        start = config.get("decoder_start_token_id")
        start = config.get("bos_token_id") if start is None else start
        if start is not None and (type(start) is not int or start < 0):
            raise BundleError(f"{bundle / CONFIG_NAME}: decoder_start_token_id is {shown(start)}")
        if config.get("model_type") in ENDLESS:
            return cls(start, None, None)
        targets = config.get("max_target_positions")
        positions = positions_of_model(config, bundle / CONFIG_NAME)
        return cls(start, targets if type(targets) is int and targets > 0 else positions, positions)

    def first(self, settings: GenerationSettings) -> int | None:
        """The decoder's first token; None if no configuration has one."""
        own = settings.decoder_start_token_id
        return self.start if own is None else own

    def begin(self, settings: GenerationSettings, what: str) -> list[int]:
        """The decoder's first tokens for `what`.

        Raises:
            UsageError: no configuration has a start token.
        """
        start = self.first(settings)
        if start is None:
            raise UsageError(
                f"{what}: neither generation_config.json nor config.json has a"
                " decoder_start_token_id, which the decoder begins with"
            )
        return [start]

    def check_source(self, tokens: int, what: str) -> None:
        """Raise UsageError if a source has more tokens than the encoder has positions."""
        if self.sources is not None and tokens > self.sources:
            raise UsageError(
                f"{what} has {tokens} tokens, the encoder has {self.sources} positions: shorten it"
            )

    def room(self, first: int, new: int) -> int:
        """The number of `new` tokens that there are positions for, after the `first` ones."""
        return new if self.positions is None else max(1, min(new, self.positions - first))


class EncodedSource:
    """The cross-attention cache of a batch and its mask: `inputs` of the decoder."""

    def __init__(self, inputs: Mapping[str, onnxruntime.OrtValue | NDArray[Any]]) -> None:
        self.inputs = dict(inputs)

    @classmethod
    def of_tokens(
        cls,
        session: AdapterSession,
        adapters: RowAdapters,
        tokens: Sequence[Sequence[int]],
        pad_id: int,
    ) -> EncodedSource:
        """Encode texts, each with its row's adapter; shorter ones are padded on the right."""
        ids, mask = pad(tokens, pad_id, left=False)
        feeds = {INPUT_IDS: ids, ATTENTION_MASK: mask}
        taken = {spec.name for spec in session.manifest.inputs}
        masked = {ENCODER_ATTENTION_MASK: mask} if ENCODER_ATTENTION_MASK in taken else {}
        return cls.of_feeds(session, adapters, feeds, masked)

    @classmethod
    def of_feeds(
        cls,
        session: AdapterSession,
        adapters: RowAdapters,
        feeds: Mapping[str, NDArray[Any]],
        besides: Mapping[str, NDArray[Any]],
    ) -> EncodedSource:
        """Run the encoder on `feeds`; the decoder is fed `besides` too."""
        encoder = session.manifest.encoder
        assert encoder is not None
        own = {name: values for name, values in feeds.items() if name in encoder.inputs}
        given = adapters.run_with_ort_values(encoder.caches, own)
        named = zip(map(past_of, encoder.caches), given, strict=True)
        return cls({**dict(named), **besides})

    def take_rows(self, rows: Sequence[int]) -> None:
        """Select rows, in this order; a row may be repeated."""
        for name, values in self.inputs.items():
            if isinstance(values, np.ndarray):
                self.inputs[name] = values[list(rows)]
                continue
            taken = np.ascontiguousarray(values.numpy()[list(rows)])
            self.inputs[name] = onnxruntime.OrtValue.ortvalue_from_numpy(
                taken, values.device_name()
            )
