"""The decoding loop: a graph, a cache, and sequences whose rows come and go between steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.names import (
    ATTENTION_MASK,
    INPUT_IDS,
    LEFT,
    PAST,
    POSITION_IDS,
    TOKEN_TYPE_IDS,
)
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import UsageError
from loradeploy.runtime.decoding.sequences import Sequences
from loradeploy.runtime.held import HeldAdapters
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tokenizer import pad, positions_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.runtime.cache import DecoderCache

FED: Final = (INPUT_IDS, ATTENTION_MASK, POSITION_IDS, TOKEN_TYPE_IDS)


@dataclass(frozen=True)
class DecoderGraph:
    """What a loop feeds a session's graph and reads of it.

    `inputs`: their names. `output`: that of the logits. `cached`: whether it takes a cache. `left`:
    on which side shorter prompts are padded, with `pad_id`.

    Raises:
        UsageError: the graph takes something besides tokens and a cache.
    """

    session: AdapterSession
    inputs: frozenset[str]
    output: str
    cached: bool
    left: bool
    pad_id: int

    @classmethod
    def of(cls, session: AdapterSession, pad_id: int) -> DecoderGraph:
        """That of `session`."""
        manifest = session.manifest
        names = [spec.name for spec in manifest.inputs]
        other = [name for name in names if name not in FED and not name.startswith(PAST)]
        if other:
            raise UsageError(
                f"{session.path} takes {other[0]}, which text generation does not make: run it with"
                " AdapterSession.run"
            )
        return cls(
            session=session,
            inputs=frozenset(names),
            output=output_of(manifest),
            cached=any(name.startswith(PAST) for name in names),
            left=manifest.padding == LEFT,
            pad_id=pad_id,
        )

    def feeds(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> dict[str, Any]:
        """What a step is fed besides the cache: ids [rows, new], mask [rows, all tokens]."""
        made: dict[str, Callable[[], NDArray[Any]]] = {
            INPUT_IDS: lambda: ids,
            ATTENTION_MASK: lambda: mask,
            POSITION_IDS: lambda: positions_of(mask, ids.shape[1]),
            TOKEN_TYPE_IDS: lambda: np.zeros_like(ids),
        }
        return {name: make() for name, make in made.items() if name in self.inputs}

    def padded(
        self, tokens: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Whole rows: ids and mask [rows, longest], and where each row has its last token."""
        ids, mask = pad(tokens, self.pad_id, left=self.left)
        ends = np.full(len(tokens), -1) if self.left else mask.sum(axis=1) - 1
        return ids, mask, ends


class DecodingBatch:
    """Sequences that are generated together, each prompt with its adapter of `held`.

    `held` has a row a prompt. A row leaves the batch when its text has ended; it may go on as
    padding meanwhile, which takes no position, as moving the cache costs more than one such row.
    """

    def __init__(
        self, graph: DecoderGraph, held: HeldAdapters, sequences: Sequence[Sequences]
    ) -> None:
        self._graph = graph
        self._held = held
        self._sequences = sequences
        self._rows: list[list[int]] = [[row] for row in range(len(sequences))]
        self._owners = list(range(len(sequences)))  # of each row, the number of its sequences
        self._ids, self._mask, self._ends = graph.padded([s.prompt for s in sequences])
        self._most = self._ids.shape[1] + max(s.limit for s in sequences)
        self._cache: DecoderCache = graph.session.empty_cache(len(sequences))

    def steps(self) -> Iterator[None]:
        """Run step by step until no row goes on; the sequences know what became of them."""
        while self._owners:
            self._advance(self._logits())
            yield

    def _logits(self) -> NDArray[Any]:
        """One run of the graph: each row's logits at its last token, [rows, vocabulary]."""
        cache = self._cache
        cache.make_room(self._mask.shape[1], self._most)
        logits, *present = self._held.run_with_ort_values(
            (self._graph.output, *cache.outputs),
            {**self._graph.feeds(self._ids, self._mask), **cache.inputs},
            buffers=cache.buffers,
        )
        cache.keep(present)
        scores = logits.numpy()  # [rows, tokens, vocabulary]
        if scores.ndim == 2:
            scores = scores[:, np.newaxis]
        # A graph may give the last position alone.
        ends = np.zeros_like(self._ends) if scores.shape[1] == 1 else self._ends
        last: NDArray[Any] = scores[np.arange(len(scores)), ends]
        return last

    def _advance(self, logits: NDArray[Any]) -> None:
        """Have every prompt's sequences go on, and the rows of the batch with them."""
        parents: list[int] = []
        tokens: list[int] = []
        owners: list[int] = []
        for number, sequences in enumerate(self._sequences):
            rows = self._rows[number]
            if not rows:
                continue
            for row in sequences.advance(logits[rows]):
                parents.append(rows[row.parent])
                tokens.append(row.token)
                owners.append(number)
        if not parents:
            self._owners = []
            return
        if self._graph.cached and self._stays(parents):
            rows = parents
        else:
            rows = list(range(len(parents)))
            self._move(parents, owners)
        self._rows = [
            [row for row, owner in zip(rows, owners, strict=True) if owner == number]
            for number in range(len(self._sequences))
        ]
        self._feed(rows, tokens)

    def _stays(self, parents: list[int]) -> bool:
        """Whether all rows that go on may stay where they are, those that ended beside them."""
        apart = all(a < b for a, b in itertools.pairwise(parents))
        return apart and 2 * len(parents) > len(self._owners)

    def _move(self, parents: list[int], owners: list[int]) -> None:
        """Make the rows of the batch those that follow the rows `parents`."""
        if self._graph.cached:
            self._cache.take_rows(parents)
            self._mask = self._mask[parents]
        if owners != self._owners:
            self._held.take_rows(owners)
        self._owners = owners

    def _feed(self, rows: list[int], tokens: list[int]) -> None:
        """What the next step is fed: the new tokens, and padding in rows that have ended."""
        if not self._graph.cached:
            texts = [
                [*sequences.prompt, *made]
                for number, sequences in enumerate(self._sequences)
                if self._rows[number]
                for made in sequences.tokens()
            ]
            self._ids, self._mask, self._ends = self._graph.padded(texts)
            return
        self._ids = np.full((len(self._owners), 1), self._graph.pad_id, np.int64)
        going = np.zeros_like(self._ids)
        self._ids[rows, 0], going[rows, 0] = tokens, 1
        self._mask = np.concatenate([self._mask, going], axis=1)
        self._ends = np.full(len(self._owners), -1)
