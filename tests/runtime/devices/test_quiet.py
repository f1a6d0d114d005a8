"""ONNX Runtime's own log is silent until the last of those who asked for it is through."""

from __future__ import annotations

import logging

import onnxruntime
import pytest

from loradeploy.runtime.devices.quiet import FATAL, WARNINGS, unlogged


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The severities that ONNX Runtime was given; there is no way to ask for the present one."""
    given: list[int] = []
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", given.append)
    return given


def test_the_log_comes_back_when_the_last_thread_is_through(levels: list[int]) -> None:
    first, second = unlogged(), unlogged()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert levels == [FATAL]
    second.__exit__(None, None, None)
    assert levels == [FATAL, WARNINGS]


def test_the_log_comes_back_after_an_error(levels: list[int]) -> None:
    with pytest.raises(ValueError, match="a provider"), unlogged():
        raise ValueError("a provider")
    assert levels == [FATAL, WARNINGS]


def test_the_log_is_left_alone_where_all_is_logged(
    levels: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "loradeploy")
    with unlogged():
        assert not levels
    assert not levels
