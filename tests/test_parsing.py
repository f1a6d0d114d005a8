"""Untrusted JSON is read strictly: ambiguous or non-standard JSON is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loradeploy.parsing import MAX_DEPTH, parse_json

# Values that JSON represents without ambiguity: 64-bit numbers, text without lone surrogates.
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(PLAIN)
@settings(derandomize=True, database=None, deadline=None, max_examples=100)
def test_values_are_read_from_json_as_they_were_written(value: Any) -> None:
    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only)
        read = parse_json(text.encode())
        assert read == value
        assert json.dumps(read) == json.dumps(value)  # tells 1 from 1.0 and from True


@given(st.text() | st.binary())
@settings(derandomize=True, database=None, deadline=None, max_examples=200)
def test_text_that_is_not_json_is_a_value_error(text: str | bytes) -> None:
    try:
        parse_json(text)
    except ValueError as problem:
        assert "\n" not in str(problem)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "nested"),
        ('{"a": 1, "a": 2}', "two values of 'a'"),
        ("NaN", "not a number in JSON"),
        ('{"a": -Infinity}', "not a number in JSON"),
        ("1e999", "too large"),
        ("1" + "0" * 400, "too large"),
        ('"\\ud800"', "surrogate"),
        ('{"\\udc00": 1}', "surrogate"),
        (b'"\xff"', "utf-8"),
        (b'"\xed\xa0\x80"', "utf-8"),
        ('{"a": }', "Expecting value"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_ambiguous_or_non_standard_json_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_unusual_but_unambiguous_json_is_read() -> None:
    assert parse_json('{"a": 1, "a": 1}') == {"a": 1}
    assert parse_json('"\\ud83d\\ude00"') == "😀"
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_json("9223372036854775807") == 2**63 - 1
    # Some tokenizers have 10³⁰ as their maximum length: read as a float, as other languages do.
    limit = parse_json("1000000000000000019884624838656")
    assert (limit, type(limit)) == (1e30, float)
    assert parse_json("[Infinity]", finite=False) == [float("inf")]
