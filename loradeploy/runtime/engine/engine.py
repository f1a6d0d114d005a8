"""The engine: batches requests as they arrive, each with its own adapter."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, cast

from loradeploy.errors import EngineClosedError, UsageError, shown
from loradeploy.given_numbers import checked_count
from loradeploy.runtime.adapters.resident import AdapterSpec, weights_of
from loradeploy.runtime.arguments import check_adapters, check_flag, is_list
from loradeploy.runtime.decoding.graph import TokenEmbeds, check_embeds
from loradeploy.runtime.decoding.prompts.calls import Call, Prompt
from loradeploy.runtime.engine.endings import abandon, ended_by_defect, guarded
from loradeploy.runtime.engine.loader import Loader
from loradeploy.runtime.engine.requests import EngineRequests
from loradeploy.runtime.engine.statistics import EngineStatistics, Observer
from loradeploy.runtime.engine.submission import Submission, deadline_of
from loradeploy.runtime.engine.worker import Worker
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from loradeploy.runtime.tasks.session_argument import check_session

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loradeploy.runtime.decoding.choosing.options import GenerationFlags

# Characters per token, to estimate the cost of a prompt before it is tokenized.
_CHARACTERS: Final = 4
# Seconds without a request after which memory is returned that only the next requests need.
_IDLE: Final = 1.0


class Engine:
    """Batches requests to a decoder bundle as they arrive, each with its own adapter.

    A request joins the running batch between two tokens and leaves when it has ended; its texts are
    the same as if it ran alone. From `start` (or the beginning of a `with`) until `close`, two
    threads do the work: one reads adapters and prompts of waiting requests, the other runs the
    graph. An engine can be used from several threads, and with asyncio.

    `bundle`: a session on a decoder bundle, or a generator of one.
    `max_rows`: maximum number of texts in a batch. `max_waiting`: maximum number of waiting
    requests. `prefill_chunk`: number of prompt tokens that are processed between two decode steps;
    up to four times as many of a long prompt (at most 256) while no row is decoding.
    `cache_budget`: limit in bytes for the rows' keys and values, by default half of the available
    memory (Linux, on the CPU).
    `prefix_budget`: limit in bytes for the keys and values of prompt prefixes, which later prompts
    of the same adapter and scope reuse; 0 keeps none.
    `observer`: called with what it measures, see `Moment`.

    Raises:
        UsageError: as `TextGenerator`, or a number below 1, or a graph with incorrect results for
            prompts that are processed in parts.
    """

    def __init__(
        self,
        bundle: AdapterSession | TextGenerator,
        *,
        max_rows: int = 8,
        max_waiting: int = 64,
        prefill_chunk: int = 64,
        cache_budget: int | None = None,
        prefix_budget: int = 256 << 20,
        observer: Observer | None = None,
    ) -> None:
        max_rows = checked_count("max_rows", max_rows)
        max_waiting = checked_count("max_waiting", max_waiting)
        prefill_chunk = checked_count("prefill_chunk", prefill_chunk)
        prefix_budget = checked_count("prefix_budget", prefix_budget, 0)
        if cache_budget is not None:
            cache_budget = checked_count("cache_budget", cache_budget)
        if not isinstance(bundle, TextGenerator):
            check_session(bundle, type(self).__name__)
        generator = bundle if isinstance(bundle, TextGenerator) else TextGenerator(bundle)
        self.session = generator.session
        if self.session.manifest.whole_prompts:
            raise UsageError(
                f"{self.session.path} gives other results if a prompt is read in parts, as Engine"
                " does: use TextGenerator, or export it from the checkpoint"
            )
        self.tokenizer = generator.tokenizer
        statistics = EngineStatistics(slots=max_rows)
        self._requests = EngineRequests(statistics, max_waiting)
        self._worker = Worker(
            self.session,
            self.tokenizer.pad_id,
            statistics,
            guarded(observer),
            slots=max_rows,
            chunk=prefill_chunk,
            budget=cache_budget,
            prefixes=prefix_budget,
        )
        self._loader = Loader(self.session, self._requests, self._worker)
        self._threads: list[threading.Thread] = []
        self._number = 0

    # -- life ----------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the engine processes requests: False once it is closed or ended by a defect."""
        return not self._requests.closed

    def start(self) -> Engine:
        """Start the engine. Requests that were submitted before wait until then."""
        requests = self._requests
        with requests.lock:
            if requests.broken is not None:
                raise ended_by_defect(requests.broken)
            if requests.closed:
                raise EngineClosedError("this engine is closed: make another one")
            if not self._threads:
                self._threads = [
                    threading.Thread(
                        target=self._loader.run, name="loradeploy-loader", daemon=True
                    ),
                    threading.Thread(target=self._work, name="loradeploy-engine", daemon=True),
                ]
                for thread in self._threads:
                    thread.start()
        return self

    def drain(self, timeout: float | None = None) -> bool:
        """Accept no more requests, and wait until the existing ones have ended.

        Returns True if all of them ended; after `timeout` seconds the others are cancelled.
        """
        requests = self._requests
        with requests.lock:
            requests.draining = True
            empty = requests.changed.wait_for(lambda: not requests.unfinished(), timeout)
            rest = requests.unfinished()
        for submission in rest:
            submission.cancel()
        if rest and self._threads:
            with requests.lock:
                requests.changed.wait_for(lambda: not requests.unfinished())
        return empty

    def close(self) -> None:
        """Cancel all requests and stop. The session stays open. A second call has no effect."""
        requests = self._requests
        with requests.lock:
            requests.draining = requests.closed = True
            rest = requests.unfinished()
            requests.changed.notify_all()
        for submission in rest:
            submission.cancel()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- requests ------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        adapter: AdapterSpec | None = None,
        *,
        seed: int = 0,
        chat: bool = False,
        scope: str | None = None,
        deadline: float | None = None,
        shorten: bool = False,
        embeds: TokenEmbeds | None = None,
        **options: Unpack[GenerationFlags],
    ) -> Submission:
        """Submit a request, and return immediately.

        `prompt`, `adapter`, `seed`, `chat` and `options` are as for one prompt of
        `TextGenerator.generate`. `scope`: the owner, such as an API key; scopes take turns, and do
        not share prefix cache entries. `deadline`: seconds from now after which the request fails,
        waiting or running. `shorten`: if a row has no room for `max_new_tokens`, generate fewer
        instead of raising a BudgetError; always so if `max_new_tokens` is not given. `embeds`:
        embeddings that replace tokens of `prompt`, which is token ids then. Such a prompt is
        processed in one run, and not stored in the prefix cache.

        Raises:
            UsageError: as `TextGenerator.generate`. Errors that depend on the adapter or the
                prompt's tokens are raised by the submission instead, also UnknownAdapterError,
                AdapterError and BudgetError.
            EngineFullError: `max_waiting` requests are waiting; has `retry_after`.
            EngineClosedError: the engine is closed or draining, or was ended by a defect.
        """
        if not (adapter is None or isinstance(adapter, str)):
            check_adapters([adapter])
            weights_of(adapter)
        if not (isinstance(prompt, str) or is_list(prompt)):
            raise UsageError(f"the prompt is {shown(prompt)}: give a text, or a list")
        if not isinstance(scope, str | None):
            raise UsageError(f"`scope` is {shown(scope)}: give a text, the name of the owner")
        check_flag("shorten", shorten)
        until = deadline_of(deadline)
        call = Call.of([prompt], [adapter], seed, chat, None, None, options, [embeds])
        if embeds is not None:
            if isinstance(prompt, str):
                raise UsageError("`embeds`: give the prompt as token ids")
            check_embeds(self._worker.graph, cast("Sequence[int]", prompt), embeds, "the prompt")
        own = call.options[0]
        # Blends of the same adapters share a flow, whatever their weights are.
        names = () if adapter is None else tuple(name for name, _ in weights_of(adapter))
        length = len(prompt) // _CHARACTERS if isinstance(prompt, str) else len(prompt)
        cost = 1 + length + own.max_new_tokens * max(own.n, own.num_beams)
        shed, requests = None, self._requests
        with requests.lock:
            requests.check_open()
            if len(requests.queue) >= requests.most:
                requests.statistics.refused += 1
                shed = requests.queue.shed(scope)
                if shed is None:
                    raise requests.full()
            self._number += 1
            limited = "max_new_tokens" in options and not shorten
            submission = Submission(self._number, call, scope, until, requests.cancel, limited)
            requests.queue.push(submission, scope, names, cost)
            requests.statistics.submitted += 1
            requests.changed.notify_all()
        if shed is not None:
            requests.fail(shed, requests.full())
        return submission

    def stats(self) -> EngineStatistics:
        """The current statistics, a copy."""
        return self._requests.stats()

    # -- the thread that runs the graph --------------------------------------------------------

    def _work(self) -> None:
        requests = self._requests
        try:
            self._rounds()
        except BaseException as problem:
            requests.defect(problem)
        finally:
            with requests.lock:
                rest, requests.running = list(requests.running.values()), {}
                broken = requests.broken
            if broken is not None:
                abandon(rest, broken, requests.fail)
            self._worker.close()

    def _rounds(self) -> None:
        requests = self._requests
        returned = True  # nothing has run since memory was returned
        while True:
            requests.drop_ready()
            with requests.lock:
                asked = requests.changed.wait_for(
                    lambda: requests.closed or requests.ready or requests.running,
                    None if returned else _IDLE,
                )
            if not asked:
                self._worker.return_memory()
                returned = True
                continue
            with requests.lock:
                if requests.broken is not None or (requests.closed and not requests.unfinished()):
                    return
                while requests.ready and self._worker.fits(requests.ready[0]):
                    one = requests.ready.popleft()
                    requests.running[one.number] = one
                    self._worker.admit(one)
                    requests.changed.notify_all()  # the loader can prepare another one
                if not requests.running:  # nothing to run
                    requests.changed.wait(0.05)
                    continue
            returned = False
            requests.release(self._worker.advance())
