"""The decoding loop: a graph, rows with a cache, and sequences that come and go between steps."""

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
from loradeploy.runtime.decoding.graph import DecoderGraph

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.runtime.decoding.caches.source import EncodedSource

_NOBODY: Final = -1  # owns a row that no prompt had yet


@dataclass(eq=False)
class _Member:
    """Sequences of a batch, and the rows that they go on in with the token that each is fed.

    `vocabulary`: how many tokens their adapter has; None is all of the graph.
    """

    sequences: Sequences
    vocabulary: int | None
    rows: list[int]
    tokens: list[int]

    def advance(self, logits: NDArray[Any]) -> list[Row]:
        """Choose by the logits of the rows that they have, those of their own tokens alone."""
        return self.sequences.advance(logits[:, : self.vocabulary])


@dataclass(frozen=True, eq=False)
class Entrant:
    """A prompt that was read: its number in the batch, and its row of what read it."""

    number: int
    sequences: Sequences
    row: int


class DecodingBatch:
    """Sequences that are generated together, each prompt with its adapter.

    `adapters` knows each prompt's by the number that it has here. Prompts may `join` and `leave`
    between steps. `on_failure` gets the number of a prompt that cannot go on, and why; without it
    the batch fails.
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
        self._owners: list[int] = []  # of each row, the number of its prompt
        self._whole = True  # no change of the rows was broken off

    @classmethod
    def of(
        cls,
        graph: DecoderGraph,
        adapters: RowAdapters,
        sequences: Sequence[Sequences],
        source: EncodedSource | None = None,
    ) -> DecodingBatch:
        """A batch of these prompts, which are read in one run; their numbers are 0, 1, …

        `source`: of an encoder-decoder, whose prompts are what its decoder begins with, all of one
        length: the decoder takes no mask.
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
        """How many prompts go on."""
        return len(self._members)

    @property
    def rows(self) -> int:
        """How many rows go on."""
        return sum(len(member.rows) for member in self._members.values())

    @property
    def whole(self) -> bool:
        """Whether no change of the rows was broken off; else `clear` them."""
        return self._whole

    @property
    def owners(self) -> Sequence[int]:
        """Of each row that a run reads, the number of its prompt, or of one that has left."""
        return self._owners

    def steps(self) -> Iterator[None]:
        """Run step by step until no row goes on; the sequences know what became of them."""
        while self._members:
            self.step()
            yield

    def step(self) -> None:
        """One run of the graph, after which every prompt's sequences go on.

        Raises:
            RunError: a change of the rows failed, and it is unknown whose they are: `clear` them.
        """
        self._check_whole()
        logits = self._rows.read(self._adapters, *self._feeds())
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
        self._settle({number: len(rows) for number, rows in going.items()}, parents)

    def enter(self, number: int, sequences: Sequences) -> None:
        """Have a prompt, which nothing was read of, take part in steps: without a cache alone."""
        self._check_whole()
        self._members[number] = self._member(number, sequences, [])
        counts = {known: len(member.rows) for known, member in self._members.items()}
        rows = [row for member in self._members.values() for row in member.rows]
        self._settle({**counts, number: 1}, [*rows, 0])

    def join(
        self, reading: Reading, entrants: Sequence[Entrant], logits: NDArray[Any]
    ) -> dict[int, BaseException]:
        """Have prompts whose last token was read take part in steps.

        `logits`: of the rows of `reading` [rows, vocabulary]. What came of those that do not, by
        their numbers.
        """
        self._check_whole()
        counts = {known: len(member.rows) for known, member in self._members.items()}
        rows = [row for member in self._members.values() for row in member.rows]
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
        """Let a prompt's rows go before they have ended."""
        if self._members.pop(number, None) is not None and self._whole:
            counts = {known: len(member.rows) for known, member in self._members.items()}
            self._settle(counts, [row for member in self._members.values() for row in member.rows])

    def _settle(self, counts: dict[int, int], parents: list[int]) -> None:
        """Go on with rows that follow `parents`, so many of each prompt."""
        with self._changing():
            owners = self._placed(counts, self._rows.move(parents))
        self._own(owners)

    def clear(self) -> None:
        """Let all prompts' rows go, whatever became of them."""
        self._members, self._owners = {}, []
        self._rows.move([])
        self._whole = True

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A change of the rows: where it fails no step is made any more."""
        self._whole = False
        yield
        self._whole = True

    def _check_whole(self) -> None:
        if not self._whole:
            raise RunError(
                "the rows of a batch could not be moved when one of them ended: nothing is run"
            )

    def _placed(self, counts: dict[int, int], rows: list[int]) -> list[int]:
        """Note where the rows of each prompt are; whose each row is."""
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
        """Have the rows run with the adapters of `owners`."""
        if not self._members:
            self._owners = []
        elif owners != self._owners:
            self._owners = []  # of no row, where this fails
            self._adapters.take_rows(owners)
            self._owners = owners

    def _feeds(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Ids, mask and ends of what the next run reads: whole prompts, or a token a row."""
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
        return ids, going, np.full(len(ids), -1)


def _of_rows(logits: NDArray[Any], rows: list[int]) -> NDArray[Any]:
    """Those of some rows; of one row a view, as a vocabulary is large."""
    own: NDArray[Any] = logits[rows[0] : rows[0] + 1] if len(rows) == 1 else logits[rows]
    return own
