"""Run an engine under load for a long time, and account for every request.

    python -m tools.soak_engine BUNDLE --adapter NAME=DIR … --minutes 30

Four client threads per row submit requests of all kinds, and read or cancel them. Meanwhile
adapters are replaced under the same name, and the session has memory for few of them. Each answer
is compared with that of the same request run alone. The exit status is 1 if an answer is wrong or
missing, or if memory grows.

Logits differ by rounding errors between batches of different sizes. If such an error decides
between two tokens (equal largest logits, or a random number at the boundary of two tokens), both
answers are correct; they are counted as ties.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

import numpy as np

from loradeploy.errors import EngineClosedError, EngineFullError
from loradeploy.runtime.decoding.choosing.sampling import Sampling
from loradeploy.runtime.engine.engine import Engine
from loradeploy.runtime.engine.submission import Submission
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORDS: Final = "The government said shares in the company fell after the bank reported"
SETTINGS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"temperature": 0.9},
    {"temperature": 0.8, "n": 2},
    {"repetition_penalty": 1.2},
)
_KINDS: Final = 40  # different requests
_LEAST: Final = 3 * _KINDS  # minimum number of requests, even on a slow machine
_ROUNDING: Final = 2e-4  # rounding error of logits; parity measures up to 1.5e-4
_PERTURBATIONS: Final = 16
_MOST_TIES: Final = 0.01  # of the answers; more would not be explained by rounding
_GROWTH: Final = 0.1  # allowed growth, relative to the memory in the second quarter of the time


# A prompt, the name of its adapter, and options of `TextGenerator.generate`.
Request = tuple[str, str | None, dict[str, Any]]


@dataclass
class SoakReport:
    """Counts of all requests by outcome.

    `wrong`: answers that differ from that of the request run alone. `ties`: answers that differ
    from it, but first at a token that rounding decides. `lost`: requests that have not ended when
    the closed engine is idle. `rss`: resident memory in MiB, sampled at least every second.
    """

    asked: int = 0
    answered: int = 0
    cancelled: int = 0
    refused: int = 0
    wrong: int = 0
    ties: int = 0
    lost: int = 0
    tokens: int = 0
    seconds: float = 0.0
    rss: list[float] = field(default_factory=list)

    @property
    def grows(self) -> bool:
        """Whether memory in the last quarter of the time is above that in the second quarter."""
        part = len(self.rss) // 4
        if not part:
            return False
        early, late = (
            sorted(r)[len(r) // 2] for r in (self.rss[part : 2 * part], self.rss[-part:])
        )
        return late > early * (1 + _GROWTH)


@dataclass(frozen=True)
class LoneAnswer:
    """The answer of a request that runs alone.

    `near`: for each generated token, including the end token, the tokens that rounding may give.
    `ends`: the tokens that end a text, which are not in its ids.
    """

    ids: tuple[int, ...]
    near: tuple[frozenset[int], ...]
    ends: frozenset[int]

    def differs(self, ids: Sequence[int], *, whole: bool) -> bool:
        """Whether `ids` differ; if they are not the `whole` answer, only as far as they go."""
        return tuple(ids) != (self.ids if whole else self.ids[: len(ids)])

    def tied(self, ids: Sequence[int]) -> bool:
        """Whether rounding decides the first token of `ids` that differs."""
        same = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(ids, self.ids, strict=False)
        )
        first = sum(1 for _ in same)
        near = self.near[first] if first < len(self.near) else frozenset()
        return not near.isdisjoint(self.ends if first >= len(ids) else {ids[first]})


def answer_alone(generator: TextGenerator, request: Request) -> list[LoneAnswer]:
    """Run a request alone, and return the answer for each of its texts."""
    near: dict[int, list[frozenset[int]]] = {}  # by the id of each text's random generator
    numbers: list[np.random.Generator] = []  # kept, so that no two have the same id
    choose = Sampling.choose

    def noted(sampling: Sampling, logits: NDArray[Any], chance: np.random.Generator) -> int:
        numbers.append(chance)
        state, noise = chance.bit_generator.state, np.random.default_rng(0)
        found = set()
        for _ in range(_PERTURBATIONS):
            chance.bit_generator.state = state
            found.add(
                choose(sampling, logits + noise.uniform(-1, 1, logits.shape) * _ROUNDING, chance)
            )
        chance.bit_generator.state = state
        token = choose(sampling, logits, chance)
        near.setdefault(id(chance), []).append(frozenset(found | {token}))
        return token

    prompt, adapter, options = request
    ends = frozenset(generator.tokenizer.eos_ids)
    with patch.object(Sampling, "choose", noted):
        texts = generator.generate([prompt], adapter, **options)
    return [
        LoneAnswer(text.token_ids, tuple(sets), ends)
        for text, sets in zip(texts, near.values(), strict=True)
    ]


class _Clients:
    """Threads that submit requests to an engine until `seconds` have passed, and count outcomes."""

    def __init__(
        self, requests: Sequence[Request], alone: Sequence[list[LoneAnswer]], seconds: float
    ) -> None:
        self.report = SoakReport()
        self.idle = threading.Event()  # set when the engine has no work left
        self._requests, self._alone = requests, alone
        self._end = time.monotonic() + seconds
        self._left: list[tuple[int, Submission]] = []  # requests that had not ended by then
        self._lock = threading.Lock()

    def over(self) -> bool:
        """Whether the time is over, and enough requests were submitted."""
        return time.monotonic() >= self._end and self.report.asked >= _LEAST

    def submit(self, engine: Engine, seed: int) -> None:
        """Submit random requests one after another, and read or cancel them."""
        own = random.Random(seed)
        while not self.over():
            number = own.randrange(len(self._requests))
            prompt, adapter, options = self._requests[number]
            try:
                submission = engine.submit(prompt, adapter, scope=str(seed % 3), **options)
            except EngineFullError as problem:
                with self._lock:
                    self.report.asked += 1
                    self.report.refused += 1
                time.sleep(min(problem.retry_after, 0.2))
                continue
            except EngineClosedError:
                if not engine.alive:  # it ended because of a defect
                    raise
                return
            with self._lock:
                self.report.asked += 1
            if own.random() < 0.1:
                time.sleep(own.random() * 0.02)
                submission.cancel()
            while not (submission.done or self.idle.is_set()):
                with contextlib.suppress(Exception):  # `_account` handles its error
                    submission.result(0.1)
            if submission.done:
                self._account(number, submission)
            else:
                self._left.append((number, submission))

    def account_for_rest(self) -> None:
        """Count the requests that had not ended when the engine was idle."""
        for number, submission in self._left:
            if submission.done:  # it ended meanwhile
                self._account(number, submission)
            else:
                self.report.lost += 1

    def _account(self, number: int, submission: Submission) -> None:
        try:
            done = submission.result()
        except EngineFullError:  # it was displaced by a request of a scope with fewer requests
            with self._lock:
                self.report.refused += 1
            return
        ids = [one.token_ids for one in done.generations]
        ended = [one.finish_reason != "cancelled" for one in done.generations]
        different = [
            (a, b)
            for a, b, whole in zip(ids, self._alone[number], ended, strict=True)
            if b.differs(a, whole=whole)
        ]
        wrong = any(not b.tied(a) for a, b in different)
        with self._lock:
            self.report.tokens += done.usage.completion_tokens
            self.report.answered += all(ended)
            self.report.cancelled += not all(ended)
            self.report.wrong += wrong
            self.report.ties += bool(different) and not wrong


def soak(
    bundle: Path, adapters: Mapping[str, Path], *, seconds: float, max_rows: int
) -> SoakReport:
    """Run an engine on `bundle` under load for `seconds`, longer if it got too few requests."""
    size = sum(path.stat().st_size for path in bundle.rglob("*.onnx*"))
    with AdapterSession(bundle, host_budget=max(size // 2, 1 << 20)) as session:
        for name, path in adapters.items():
            session.register(name, path)
        chance = random.Random(0)
        requests = [_request(chance, [None, *adapters]) for _ in range(_KINDS)]
        generator = TextGenerator(session)
        alone = [answer_alone(generator, request) for request in requests]
        clients = _Clients(requests, alone, seconds)
        with Engine(
            session, max_rows=max_rows, max_waiting=2 * max_rows, prefill_chunk=8
        ) as engine:
            threads = [
                threading.Thread(target=clients.submit, args=(engine, seed))
                for seed in range(4 * max_rows)
            ]
            for thread in threads:
                thread.start()
            began = time.monotonic()
            names = sorted(adapters)
            while not clients.over():
                clients.report.rss.append(_rss())
                if names:  # reload the same adapter: running requests must not be affected
                    name = chance.choice(names)
                    session.load(name, adapters[name], replace=True)
                time.sleep(max(0.1, min(1.0, seconds / 100)))
            engine.drain()
            clients.report.seconds = time.monotonic() - began
        clients.idle.set()  # the engine's threads have ended
        for thread in threads:
            thread.join()
        clients.account_for_rest()
    return clients.report


def _request(chance: random.Random, adapters: Sequence[str | None]) -> Request:
    words = chance.choices(WORDS.split(), k=chance.randint(1, 12))
    adapter = chance.choice(adapters)
    return (
        " ".join(words),
        adapter,
        {**chance.choice(SETTINGS), "max_new_tokens": chance.randint(1, 16)},
    )


def _rss() -> float:
    """Return the resident memory of this process in MiB (Linux)."""
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / (1 << 20)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rows", type=int, default=8, help="maximum rows of the engine's batch")
    given = parser.parse_args()
    adapters = {name: Path(path) for name, _, path in (one.partition("=") for one in given.adapter)}
    report = soak(given.bundle, adapters, seconds=60 * given.minutes, max_rows=given.rows)
    accounted = report.asked == report.answered + report.cancelled + report.refused + report.lost
    rounded = report.ties <= _MOST_TIES * report.answered
    well = accounted and rounded and not (report.wrong or report.lost or report.grows)
    print(json.dumps({**asdict(report), "accounted": accounted, "grows": report.grows}))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
