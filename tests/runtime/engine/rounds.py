"""Drives an engine round by round, without its threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loradeploy.runtime.decoding.prompts.reading import PromptReader
from loradeploy.runtime.engine.engine import Engine
from loradeploy.runtime.engine.running import prepare
from loradeploy.runtime.engine.submission import Submission
from loradeploy.runtime.session import AdapterSession


class Rounds:
    """An engine whose rounds are called by the test, with prepared requests."""

    def __init__(self, session: AdapterSession, **options: Any) -> None:
        self.engine = Engine(session, **options)
        self._session, self._reader = session, PromptReader(session)

    def ask(
        self, prompts: Sequence[list[int]], adapters: Sequence[Any], tokens: int = 6
    ) -> list[Submission]:
        """Submit several requests together and prepare them."""
        worker = self.engine._worker
        submissions = []
        for prompt, adapter in zip(prompts, adapters, strict=True):
            submission = self.engine.submit(prompt, adapter, max_new_tokens=tokens)
            self.engine._requests.queue.remove(submission)
            worker.admit(
                prepare(
                    self._session,
                    self._reader,
                    submission,
                    worker.slots,
                    worker.budget,
                    worker.positions,
                )
            )
            submissions.append(submission)
        return submissions

    def round(self) -> dict[int, BaseException]:
        """Run one round; return the errors of the requests that failed in it, by number."""
        failed = {}
        for one, problem in self.engine._worker.advance():
            one.close()
            if problem is not None:
                failed[one.number] = problem
        return failed

    def finish(self, submissions: Sequence[Submission]) -> list[tuple[int, ...]]:
        """Run rounds until all requests have ended; return the tokens of each."""
        for _ in range(100):
            if all(one.done for one in submissions):
                break
            assert self.round() == {}
        return [one.result(0).generations[0].token_ids for one in submissions]

    @property
    def prefills(self) -> int:
        return self.engine.stats().prefills
