"""The decoding loop: a graph, rows with a cache, and sequences that join and leave."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.errors import RunError
from loradeploy.runtime.adapters.tokens import vocabulary_of_row
from loradeploy.runtime.decoding.caches.protocols import Reading, RowAdapters, Rows
from loradeploy.runtime.decoding.caches.rows import CachedRows, UncachedRows
from loradeploy.runtime.decoding.choosing.sequences import Row, Sequences
from loradeploy.runtime.decoding.graph import DecoderGraph, NewTokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.runtime.decoding.caches.source import EncodedSource

_NOBODY: Final = -1  # the owner of a row that no prompt used yet


@dataclass(eq=False)
class _Member:
    """A prompt's sequences in a batch, with their rows and the next token of each row.

    `vocabulary`: the vocabulary size of their adapter; None for the graph's.
    """

    sequences: Sequences
    vocabulary: int | None
    rows: list[int]
    tokens: list[int]

    def advance(self, logits: NDArray[Any]) -> list[Row]:
        """Choose tokens by the logits of their rows, limited to their vocabulary."""
        return self.sequences.advance(logits[:, : self.vocabulary])


@dataclass(frozen=True, eq=False)
class Entrant:
    """A prompt that was processed: its number in the batch, and its row in the reading."""

    number: int
    sequences: Sequences
    row: int


class DecodingBatch:
    """Sequences that are generated together, each prompt with its adapter.

    `adapters`: the adapters by the numbers that prompts have here. Prompts can `join` and `leave`
    between steps. `on_failure`: called with the number of a prompt that fails, and its error;
    without it, the batch fails.
    """

    def __init__(
        self,
        graph: DecoderGraph,
        adapters: RowAdapters,
        rows: Rows,
        on_failure: Callable[[int, BaseException], None] | None = None,
    ) -> None:
        self._graph = graph
        self._on_failure = on_failure
        self._adapters = adapters
        self._rows = rows
        self._members: dict[int, _Member] = {}
        self._owners: list[int] = []  # the number of each row's prompt
        self._whole = True  # every change of the rows was completed

    @classmethod
    def of(
        cls,
        graph: DecoderGraph,
        adapters: RowAdapters,
        sequences: Sequence[Sequences],
        source: EncodedSource | None = None,
    ) -> DecodingBatch:
        """A batch of these prompts, which are processed in one run; their numbers are 0, 1, …

        `source`: of an encoder-decoder. Its prompts are the start tokens of the decoder, which must
        have one length, because the decoder takes no mask.
        """
        prompts = [own.prompt for own in sequences]
        most = max(map(len, prompts)) + max(own.limit for own in sequences)
        count = len(sequences)
        rows = (
            CachedRows(graph, count, most, source) if graph.cached else UncachedRows(graph, count)
        )
        batch = cls(graph, adapters, rows)
        batch._owners = list(range(count))
        for number, own in enumerate(sequences):
            batch._members[number] = batch._member(number, own, [number])
        return batch

    def __len__(self) -> int:
        """The number of prompts that have not ended."""
        return len(self._members)

    @property
    def rows(self) -> int:
        """The number of rows that have not ended."""
        return sum(len(member.rows) for member in self._members.values())

    @property
    def whole(self) -> bool:
        """Whether every change of the rows was completed; otherwise call `clear`."""
        return self._whole

    @property
    def owners(self) -> Sequence[int]:
        """For each row of a run, the number of its prompt, or of one that has left."""
        return self._owners

    def steps(self) -> Iterator[None]:
        """Run step by step until all rows have ended."""
        while self._members:
            self.step()
            yield

    def step(self) -> None:
        """Run the graph once, and advance the sequences of every prompt.

        Raises:
            RunError: a change of the rows failed, so that their owners are unknown: call `clear`.
        """
        self._check_whole()
        logits = self._rows.read(self._adapters, self._new_tokens())
        going: dict[int, list[Row]] = {}
        for number, member in list(self._members.items()):
            try:
                going[number] = member.advance(_of_rows(logits, member.rows))
            except BaseException as problem:  # a panic of a mask's library is no Exception
                if self._on_failure is None:
                    raise
                going[number] = []
                self._on_failure(number, problem)
        parents = []
        for number, rows in going.items():
            member = self._members[number]
            parents += [member.rows[row.parent] for row in rows]
            member.tokens = [row.token for row in rows]
        self._replace_rows({number: len(rows) for number, rows in going.items()}, parents)

    def enter(self, number: int, sequences: Sequences) -> None:
        """Add a prompt that was not processed yet; only for graphs without a cache."""
        self._check_whole()
        self._members[number] = self._member(number, sequences, [])
        counts, rows = self._standing()
        self._replace_rows({**counts, number: 1}, [*rows, 0])

    def join(
        self, reading: Reading, entrants: Sequence[Entrant], logits: NDArray[Any]
    ) -> dict[int, BaseException]:
        """Add prompts that were processed completely.

        `logits`: those of the rows of `reading`, [rows, vocabulary]. Returns the errors of prompts
        that could not join, by number.
        """
        self._check_whole()
        counts, rows = self._standing()
        joining: list[int] = []
        failures: dict[int, BaseException] = {}
        for entrant in entrants:
            number, row = entrant.number, entrant.row
            member = self._member(number, entrant.sequences, [])
            try:
                going = member.advance(logits[row : row + 1])
            except BaseException as problem:  # a panic of a mask's library is no Exception
                failures[number] = problem
                continue
            if going:
                joining += [row] * len(going)
                counts[number] = len(going)
                member.tokens = [each.token for each in going]
                self._members[number] = member
        if joining:
            with self._changing():
                owners = self._placed(counts, reading.join(rows, joining))
            self._own(owners)
        return failures

    def _member(self, number: int, sequences: Sequences, rows: list[int]) -> _Member:
        own = self._adapters.resident(number)
        return _Member(sequences, vocabulary_of_row(own, self._graph.session.manifest), rows, [])

    def leave(self, number: int) -> None:
        """Remove a prompt before it has ended."""
        if self._members.pop(number, None) is not None and self._whole:
            self._replace_rows(*self._standing())

    def _standing(self) -> tuple[dict[int, int], list[int]]:
        """The number of rows of each prompt, and all rows, in the same order."""
        counts = {number: len(member.rows) for number, member in self._members.items()}
        return counts, [row for member in self._members.values() for row in member.rows]

    def _replace_rows(self, counts: dict[int, int], parents: list[int]) -> None:
        """Replace the rows by successors of `parents`; `counts`: the rows of each prompt."""
        with self._changing():
            owners = self._placed(counts, self._rows.move(parents))
        self._own(owners)

    def clear(self) -> None:
        """Remove all prompts, even after a failed change."""
        self._members, self._owners = {}, []
        self._rows.move([])
        self._whole = True

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Mark the rows as changing; if the change fails, no further step is possible."""
        self._whole = False
        yield
        self._whole = True

    def _check_whole(self) -> None:
        if not self._whole:
            raise RunError(
                "an error left the rows of the batch in an unknown state: nothing is run"
            )

    def _placed(self, counts: dict[int, int], rows: list[int]) -> list[int]:
        """Record the rows of each prompt, and return the owner of each row."""
        owners = [*self._owners, *[_NOBODY] * self._rows.count][: self._rows.count]
        waiting = iter(rows)
        for number, count in counts.items():
            self._members[number].rows = list(itertools.islice(waiting, count))
            for row in self._members[number].rows:
                owners[row] = number
            if not count:
                del self._members[number]
        return owners

    def _own(self, owners: list[int]) -> None:
        """Set the rows' adapters to those of `owners`."""
        if not self._members:
            self._owners = []
        elif owners != self._owners:
            self._owners = []  # stays so if this fails
            self._adapters.take_rows(owners)
            self._owners = owners

    def _new_tokens(self) -> NewTokens:
        """The tokens of the next run: complete prompts, or one token per row."""
        members = self._members.values()
        started = all(member.tokens for member in members)
        if not started or not self._graph.cached:
            texts = [
                [*member.sequences.prompt, *made]
                for member in members
                for made in (member.sequences.tokens() if member.tokens else ((),))
            ]
            return self._graph.padded(texts)
        ids = np.full((self._rows.count, 1), self._graph.pad_id, np.int64)
        going = np.zeros_like(ids)
        for member in members:
            ids[member.rows, 0], going[member.rows, 0] = member.tokens, 1
        return NewTokens.single(ids, going)


def _of_rows(logits: NDArray[Any], rows: list[int]) -> NDArray[Any]:
    """The logits of `rows`; a view for a single row, because a vocabulary is large."""
    own: NDArray[Any] = logits[rows[0] : rows[0] + 1] if len(rows) == 1 else logits[rows]
    return own
