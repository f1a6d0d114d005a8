"""The inputs and the output of a graph that a decoding loop uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.names import (
    ATTENTION_MASK,
    DECODER_INPUT_IDS,
    ENCODER_ATTENTION_MASK,
    INPUT_IDS,
    INPUTS_EMBEDS,
    INPUTS_EMBEDS_MASK,
    LEFT,
    LOGITS_TO_KEEP,
    MROPE_POSITION_IDS,
    PAST,
    POSITION_IDS,
    TOKEN_TYPE_IDS,
)
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import UsageError
from loradeploy.runtime.decoding.mrope import Grid, check_grids, grid_positions, shift_of
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.text.padding import pad, positions_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

FED: Final = (INPUT_IDS, ATTENTION_MASK, POSITION_IDS, TOKEN_TYPE_IDS)
# For an encoder-decoder's decoder, whose rows have one length and no mask.
FED_WITH_SOURCE: Final = (DECODER_INPUT_IDS, ENCODER_ATTENTION_MASK)


@dataclass(frozen=True, eq=False)
class NewTokens:
    """The tokens that a run processes, `ids` [rows, new].

    Those whose `mask` [rows, new] is 1 are real; the last of each row is at `ends` [rows].
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    ends: NDArray[np.int64]

    @classmethod
    def single(cls, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NewTokens:
        """At most one token per row, `ids` and `mask` [rows, 1]."""
        return cls(ids, mask, np.full(len(ids), -1))

    def part(self, columns: slice) -> NewTokens:
        """Some columns of rows without padding."""
        return NewTokens(self.ids[:, columns], self.mask[:, columns], np.full_like(self.ends, -1))


@dataclass(frozen=True, eq=False)
class TokenEmbeds:
    """Embeddings that replace those of a token: the images of a prompt.

    `values` [places, hidden]: one for each occurrence of `token` in the prompt, in order. `grids`:
    the rows and columns of each image's embeddings, if the decoder's positions have three
    dimensions.
    """

    token: int
    values: NDArray[Any]
    grids: tuple[Grid, ...] | None = None


@dataclass(frozen=True)
class DecoderGraph:
    """What a loop feeds to a session's graph and reads from it.

    `inputs`: names of inputs. `output`: name of the logits. `cached`: whether it has a cache.
    `left`: whether shorter prompts are padded on the left, with `pad_id`. `keeps`: whether it can
    return the logits of selected positions. `embeds`: for each row of the first run, the embeddings
    that replace tokens; None without any.

    Raises:
        UsageError: the graph has an input other than tokens and a cache.
    """

    session: AdapterSession
    inputs: frozenset[str]
    output: str
    cached: bool
    left: bool
    pad_id: int
    keeps: bool = False
    embeds: tuple[TokenEmbeds | None, ...] | None = None

    @classmethod
    def of(cls, session: AdapterSession, pad_id: int, *, source: bool = False) -> DecoderGraph:
        """The graph of `session`; with `source`, the decoder of an encoder-decoder."""
        manifest = session.manifest
        names = [spec.name for spec in manifest.inputs]
        known: tuple[str, ...] = FED
        if source and manifest.encoder is not None:
            names = [name for name in names if name not in manifest.encoder.inputs]
            known = FED_WITH_SOURCE
        other = [name for name in names if name not in known and not name.startswith(PAST)]
        if other:
            raise UsageError(
                f"{session.path} takes {other[0]}, which text generation does not provide: run it"
                " with AdapterSession.run"
            )
        cached = any(name.startswith(PAST) for name in names)
        if session.captured is not None and not (cached and manifest.cache_in_place):
            raise UsageError(
                f"{session.path}: `capture_graphs` has nothing to replay in text generation, where"
                " each step has another length: export it again with --attention gqa, whose cache"
                " stays in place"
            )
        return cls(
            session=session,
            inputs=frozenset(names),
            output=output_of(manifest),
            cached=cached,
            left=manifest.padding == LEFT,
            pad_id=pad_id,
            keeps=manifest.logits_to_keep,
        )

    @property
    def takes_positions(self) -> bool:
        """Whether positions are fed; otherwise the graph may derive them from the cache."""
        return POSITION_IDS in self.inputs

    @property
    def counts_in_grids(self) -> bool:
        """Whether tokens of images have positions in three dimensions."""
        return any(spec.name == MROPE_POSITION_IDS for spec in self.session.manifest.embeds)

    def shifts(self, rows: int) -> NDArray[np.int64]:
        """Offsets of positions after each prompt, [rows]: images take fewer than their tokens."""
        shifts = np.zeros(rows, np.int64)
        if self.counts_in_grids:
            for row, own in enumerate(self.embeds or ()):
                if own is not None and own.grids is not None:
                    shifts[row] = shift_of(own.grids)
        return shifts

    def feeds(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        ends: NDArray[np.int64] | None = None,
        shifts: NDArray[np.int64] | None = None,
    ) -> dict[str, Any]:
        """The feeds of a step besides the cache: ids [rows, new], mask [rows, all tokens].

        `ends` [rows]: if the graph can, it returns only each row's logits there, [rows, 1, …].
        `shifts` [rows]: offsets of positions after the prompts.
        """
        made: dict[str, Callable[[], NDArray[Any]]] = {
            INPUT_IDS: lambda: ids,
            DECODER_INPUT_IDS: lambda: ids,
            ATTENTION_MASK: lambda: mask,
            POSITION_IDS: lambda: positions_of(mask, ids.shape[1]),
            TOKEN_TYPE_IDS: lambda: np.zeros_like(ids),
        }
        values = {name: make() for name, make in made.items() if name in self.inputs}
        if ends is not None and self.keeps and ids.shape[1] > 1:
            values[LOGITS_TO_KEEP] = ends.astype(np.int64)[:, np.newaxis]
        if self.embeds is not None and ids.shape == mask.shape:  # the first run
            values |= self._embedded(ids, mask)
        elif shifts is not None and shifts.any() and POSITION_IDS in values:
            values[POSITION_IDS] = values[POSITION_IDS] + shifts[:, np.newaxis]
        return values

    def with_embeds(self, embeds: Sequence[TokenEmbeds | None]) -> DecoderGraph:
        """The graph with embeddings that replace tokens of the prompts, in their order."""
        return dataclasses.replace(self, embeds=tuple(embeds)) if any(embeds) else self

    def _embedded(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        assert self.embeds is not None
        (spec,) = (s for s in self.session.manifest.embeds if s.name == INPUTS_EMBEDS)
        places = np.zeros(ids.shape, np.bool_)
        values = np.zeros((*ids.shape, int(spec.shape[-1])), spec.dtype)
        for row, own in enumerate(self.embeds):
            if own is not None:
                places[row] = (ids[row] == own.token) & (mask[row] == 1)
                values[row, places[row]] = own.values
        feeds: dict[str, NDArray[Any]] = {INPUTS_EMBEDS: values, INPUTS_EMBEDS_MASK: places}
        if self.counts_in_grids:
            feeds[MROPE_POSITION_IDS] = self._positions(places, mask)
        return feeds

    def _positions(self, places: NDArray[np.bool_], mask: NDArray[np.int64]) -> NDArray[np.int64]:
        """The three positions of each token, [3, rows, tokens]; 0 for padding."""
        positions = np.zeros((3, *mask.shape), np.int64)
        for row, own in enumerate(self.embeds or ()):
            real = mask[row] == 1
            grids = own.grids if own is not None and own.grids is not None else ()
            positions[:, row, real] = grid_positions(places[row, real], grids)
        return positions

    def padded(self, tokens: Sequence[Sequence[int]]) -> NewTokens:
        """Pad rows of tokens to the longest."""
        ids, mask = pad(tokens, self.pad_id, left=self.left)
        ends = np.full(len(tokens), -1) if self.left else mask.sum(axis=1) - 1
        return NewTokens(ids, mask, ends)


def check_embeds(
    graph: DecoderGraph, ids: Sequence[int], embeds: TokenEmbeds | None, what: str
) -> None:
    """Raise UsageError unless `embeds` has one value for each of its tokens in the prompt `what`.

    A graph without a cache is refused: it processes prompts again at each step, when other rows may
    have ended.
    """
    if embeds is None:
        return
    if not graph.cached:
        raise UsageError(
            "embeddings instead of tokens need a graph with a cache: export the checkpoint"
        )
    sizes = [spec.shape[-1] for spec in graph.session.manifest.embeds if spec.name == INPUTS_EMBEDS]
    if not sizes:
        raise UsageError("this bundle takes no embeddings instead of tokens")
    shape, places = embeds.values.shape, sum(token == embeds.token for token in ids)
    if shape != (places, sizes[0]):
        raise UsageError(
            f"{what} has the token {embeds.token} {places} times, and embeddings"
            f" {list(shape)}, expected [{places}, {sizes[0]}]"
        )
    if graph.counts_in_grids:
        check_grids(np.equal(ids, embeds.token), embeds.grids, what)
