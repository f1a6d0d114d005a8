"""Ctrl-C at any moment of a call leaves the session usable: no adapter in use, no lock held."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter
from tests.runtime.feeds import logits, random_ids
from tests.tolerances import tolerance

IDS = random_ids(2, 5)
PATIENCE = 60.0  # seconds; longer means a deadlock
STEP = 31  # of the moments that are tried


def interrupted(call: Callable[[], Any], moment: int) -> bool:
    """Whether `call` was interrupted: at the `moment`-th point at which Python handles a signal.

    Those are, among others, the beginnings of functions and the ends of built-in ones.
    """
    left = moment

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        left -= event in ("call", "c_return")
        if left == 0:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(count)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return left <= 0


def load_again(session: AdapterSession, path: Path) -> None:
    session.load("three", path, replace=True)


CALLS: dict[str, Callable[[AdapterSession, Path], Any]] = {
    "one adapter": lambda session, _: logits(session, IDS, "one"),
    "mixed": lambda session, _: logits(session, IDS, ["one", "two"]),
    "load": load_again,
}


# Where a generator is being closed, Python ignores the interruption and warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("call", CALLS)
def test_an_interrupted_call_has_no_effect_on_later_ones(
    call: str, tiny_llama_bundle: Path, tiny_llama: Path, make_adapter: MakeAdapter
) -> None:
    paths = [make_adapter(tiny_llama, seed=seed) for seed in (1, 2)]
    session = AdapterSession(tiny_llama_bundle)
    for name, path in zip(("one", "two"), paths, strict=True):
        session.load(name, path)
    expected = logits(session, IDS, ["one", "two"])
    with ThreadPoolExecutor() as others:
        moment = 1
        while interrupted(lambda: CALLS[call](session, paths[0]), moment):
            found = others.submit(logits, session, IDS, ["one", "two"]).result(PATIENCE)
            assert np.abs(found - expected).max() <= tolerance("rows")
            assert not session._bank._users, f"in use after an interruption at {moment}"
            others.submit(session.texts.counts, "one").result(PATIENCE)
            moment += STEP
        assert moment > 5 * STEP
        others.submit(session.unload, "two").result(PATIENCE)
    session.close()
