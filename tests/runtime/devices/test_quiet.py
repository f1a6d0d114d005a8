"""Silencing ONNX Runtime's log: it stays silent until the last concurrent user has finished."""

from __future__ import annotations

import logging

import onnxruntime
import pytest

from loradeploy.runtime.devices.quiet import FATAL, WARNINGS, unlogged


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The severities set in ONNX Runtime, which has no function to read the current one."""
    given: list[int] = []
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", given.append)
    return given


def test_the_log_level_is_restored_after_the_last_thread(levels: list[int]) -> None:
    first, second = unlogged(), unlogged()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert levels == [FATAL]
    second.__exit__(None, None, None)
    assert levels == [FATAL, WARNINGS]


def test_the_log_level_is_restored_after_an_error(levels: list[int]) -> None:
    with pytest.raises(ValueError, match="a provider"), unlogged():
        raise ValueError("a provider")
    assert levels == [FATAL, WARNINGS]


def test_the_log_level_is_not_changed_in_debug_mode(
    levels: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "loradeploy")
    with unlogged():
        assert not levels
    assert not levels
