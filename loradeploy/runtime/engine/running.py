"""A request with its adapter and prompt, from its preparation until its texts have ended."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loradeploy.errors import BudgetError, UsageError
from loradeploy.runtime.adapters.tokens import check_tokens_of
from loradeploy.runtime.decoding.caches.memory import position_bytes
from loradeploy.runtime.decoding.prompts.requests import Request, read_request
from loradeploy.runtime.engine.submission import GenerationEvent, Submission, Usage
from loradeploy.runtime.tasks.generation import generation_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.runtime.decoding.caches.protocols import Reading
    from loradeploy.runtime.decoding.graph import TokenEmbeds
    from loradeploy.runtime.decoding.prompts.reading import PromptReader
    from loradeploy.runtime.engine.prefix import Owner
    from loradeploy.runtime.engine.statistics import EngineStatistics, Observer
    from loradeploy.runtime.held import HeldAdapters
    from loradeploy.runtime.session import AdapterSession


@dataclass(eq=False)
class Running:
    """A request whose adapter is in use until `close`.

    `rows`: its maximum number of rows. `holding`: releases the adapter. `reading`: its row while
    its prompt is processed. `read`: how many tokens were processed. `blocks`: its blocks in the
    prefix cache. `emitted`: for each text, how many tokens were emitted. `ended`: the texts that
    have ended. `generated`: tokens of ended texts.
    """

    submission: Submission
    request: Request
    held: HeldAdapters
    rows: int
    holding: ExitStack
    reading: Reading | None = None
    read: int = 0
    blocks: list[list[NDArray[Any]]] = field(default_factory=list)
    emitted: dict[int, int] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    generated: int = 0
    last_token: float = 0.0

    @property
    def number(self) -> int:
        """Its number in the batch."""
        return self.submission.number

    @property
    def embeds(self) -> TokenEmbeds | None:
        """Embeddings that replace tokens of its prompt."""
        return self.submission.call.embeds[0]

    @property
    def most(self) -> int:
        """The maximum number of positions of each of its rows."""
        return len(self.request.ids) + self.request.limit

    @property
    def owner(self) -> Owner:
        """The owner of its keys and values in the prefix cache."""
        resident = self.held.lease.rows[0]
        return None if resident is None else resident.digest, self.submission.scope

    @property
    def choices(self) -> int:
        """The number of its texts."""
        return self.submission.call.options[0].n

    def emit(self, statistics: EngineStatistics, observer: Observer) -> bool:
        """Emit new tokens and texts; return whether all texts have ended."""
        sequences = self.request.sequences
        texts: dict[int, str] = {}
        for choice, text in sequences.pieces():
            texts[choice] = texts.get(choice, "") + text
        ended = sequences.ended()
        events = []
        for choice in range(self.choices):
            if choice in self.ended:
                continue
            ids, logprobs = sequences.made(choice)
            emitted = self.emitted.get(choice, 0)
            over = choice in ended
            if len(ids) > emitted or over or texts.get(choice):
                events.append(
                    GenerationEvent(
                        choice=choice,
                        text=texts.get(choice, ""),
                        token_ids=tuple(ids[emitted:]),
                        logprobs=None if logprobs is None else tuple(logprobs[emitted:]),
                        generation=generation_of(self.request, choice) if over else None,
                    )
                )
                self.emitted[choice] = len(ids)
            if over:
                self.ended.add(choice)
        for event in events:
            if event.generation is not None:
                self.generated += event.generation.completion_tokens
                reason = event.generation.finish_reason
                statistics.finished[reason] += 1
            statistics.generated_tokens += len(event.token_ids)
        self._observe(any(event.token_ids for event in events), observer)
        whole = len(self.ended) == self.choices
        if whole and events:
            usage = Usage(len(self.request.ids), self.generated, self.submission.cached_tokens)
            events[-1] = replace(events[-1], usage=usage)
        for event in events:
            self.submission.put(event)
        return whole

    def _observe(self, tokens: bool, observer: Observer) -> None:
        if not tokens:
            return
        now = time.monotonic()
        if self.last_token:
            observer("inter_token", now - self.last_token, self.submission)
        else:
            observer("first_token", now - self.submission.created, self.submission)
        self.last_token = now

    def cancel(self) -> bool:
        """End its texts; return whether it can leave immediately.

        A beam search that has started ends with the next step.
        """
        for choice in range(self.choices):
            self.request.sequences.cancel(choice)
        return len(self.request.sequences.ended()) == self.choices

    def close(self) -> None:
        """Release its adapter."""
        if self.reading is not None:
            self.reading.close()
            self.reading = None
        self.holding.close()


def prepare(
    session: AdapterSession,
    reader: PromptReader,
    submission: Submission,
    slots: int,
    budget: int | None,
    positions: int | None,
) -> Running:
    """Load a request's adapter and tokenize its prompt, both of the same version.

    If the caller gave no max_new_tokens, it is limited to the room of a row.

    Raises:
        UsageError: the prompt, or settings that do not fit it, or more rows than `slots`.
        UnknownAdapterError, AdapterError: the adapter cannot be loaded.
        BudgetError: it needs more than `budget` bytes, or a row needs more than `positions`.
    """
    options = submission.call.options[0]
    rows = max(options.n, options.num_beams)
    if rows > slots:
        raise UsageError(
            f"the request takes {rows} rows (n or num_beams), the engine has {slots}: give fewer,"
            " or give the engine more `max_rows`"
        )
    each = rows * position_bytes(session)  # bytes per position
    fitting = budget // each if budget is not None and each else None
    room = min((size for size in (positions, fitting) if size is not None), default=None)
    while True:
        request = read_request(
            reader, submission.call, 0, room=None if submission.limited else room
        )
        with ExitStack() as stack:
            held = stack.enter_context(session.hold(request.adapter))
            if session.texts.have_moved(request.adapter, request.counts):
                continue
            check_tokens_of(held.lease, [request.ids], session.manifest)
            running = Running(submission, request, held, rows, stack.pop_all())
            break
    if positions is not None and running.most > positions:
        running.close()
        raise BudgetError(
            f"the prompt and max_new_tokens are {running.most} tokens together, a row of the engine"
            f" has room for {positions}: give it a larger `cache_budget`, or fewer `max_rows`"
        )
    taken = each * running.most
    if budget is not None and taken > budget:
        running.close()
        raise BudgetError(
            f"{rows} rows of {running.most} tokens take {taken / 2**20:.1f} MiB, the engine has"
            f" {budget / 2**20:.1f} MiB: give a smaller n or max_new_tokens, or a shorter prompt"
        )
    return running
