"""Regular expressions in configs: PEFT's semantics in bounded time."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loradeploy.adapter import Adapter, AdapterConfig, Factors, load_adapter, save_adapter
from loradeploy.adapter.modules.patterns import Ends, Matcher
from loradeploy.adapter.modules.targets import is_saved, match_targets
from loradeploy.errors import AdapterError

NAMES = [
    *(
        "a",
        "ab",
        "a.b",
        "b.a",
        "aa.b.aab",
        "x.x",
        "q_proj",
        "k.a-b",
        "a]b",
        "ab\n",
        "é.a",
        "{",
        "a{,2}",
    ),
    *("model.layers.0.q_proj", "model.layers.12.attn.q_proj", "layers.0", "0.1.a", "xmodel.layers"),
]
PIECES = [
    *(
        "a",
        "b",
        ".",
        ".*",
        ".+?",
        "q_proj",
        "layers",
        "a?",
        "[ab]",
        "[^.]*",
        "[]a]",
        "[^]b]",
        "[a\\]b]",
    ),
    *(
        r"\.",
        r"\d",
        r"\d+",
        r"\w+",
        r"\b",
        r"\Z",
        r"\-",
        r"\x61",
        "^",
        "$",
        "|",
        "{",
        "}",
        "(",
        ")",
    ),
    *("(a|b)", "(?:q|k)", "(?!b)", "(?=a)", "(?<=a)", "(?i:A)", "{,2}", "{1,3}", "x{,3}", "a*+"),
    *(r"(a)\1", "[0-9]+", "(?i)", r"\v", r"\07"),
]


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join))
def test_patterns_match_as_in_peft(pattern: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            re.compile(pattern)
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, DeprecationWarning, FutureWarning):
            return  # PEFT fails on it too
    matcher = Matcher()
    for name in NAMES:
        assert matcher.fullmatch(pattern, name) == bool(re.fullmatch(pattern, name)), name
        found = Ends([pattern], matcher).first(name) is not None
        assert found == bool(re.match(rf"(.*\.)?({pattern})$", name)), name


def test_the_first_matching_key_is_used_for_names_and_expressions() -> None:
    keys = [
        r"^model\.layers\.0\.q_proj",
        "layers.0.q_proj",
        r".*\.1\.q_proj",
        "q_proj",
        "s.0.q_proj",
    ]
    for order in (keys, keys[::-1], keys[2:] + keys[:2]):
        ends = Ends(order, Matcher())
        for name in (
            *("model.layers.0.q_proj", "layers.0.q_proj", "layersx0.q_proj", "a.layers.1.q_proj"),
            *("q_proj", "xq_proj", "a.model.layers.0.q_proj", "a.s.0.q_proj", "a.s.0yq_proj"),
        ):
            wanted = next((k for k in order if re.match(rf"(.*\.)?({k})$", name)), None)
            assert ends.first(name) == wanted, (order, name)


CATASTROPHIC = [
    "(a+)+$",
    "(a|a)*b",
    "(.*a){25}b",
    "(?=x?)(a+)+b",  # RE2 has no lookaround
    r"(a+)+\1b",
    "((a*)*)*!",
]


@pytest.mark.parametrize("pattern", CATASTROPHIC)
@pytest.mark.parametrize(
    "field",
    ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern", "modules_to_save"],
)
def test_no_pattern_takes_unbounded_time(pattern: str, field: str) -> None:
    value = {"rank_pattern": {pattern: 4}, "modules_to_save": (pattern,)}.get(field, pattern)
    layers = {"layers_to_transform": 0} if field == "layers_pattern" else {}
    rest = {} if field == "target_modules" else {"target_modules": ("c",)}
    config = AdapterConfig(**{field: value}, **layers, **rest)  # type: ignore[arg-type]
    name = "m." + "a" * 5000 + ".0.c"
    try:
        match_targets([name], config)
        assert config.rank_of(name) == 8
    except AdapterError as problem:
        assert "takes too long on" in str(problem)
        assert len(str(problem)) < 300


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not a regular expression"),
        ("[[:alpha:]]", "not a regular expression"),  # libraries disagree on this set
        ("x" * 5000, "a pattern of 5,000 characters"),
        ("(?:" * 1000 + ")" * 1000, "not a regular expression"),
    ],
)
def test_an_unsupported_pattern_is_refused_by_name(pattern: str, message: str) -> None:
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        with pytest.raises(AdapterError, match=rf"{field} has .*{message}"):
            AdapterConfig(**{field: pattern})  # type: ignore[arg-type]
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(AdapterError, match=rf"{field} has .*{message}"):
            AdapterConfig(**{field: {pattern: 1}})  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="more than 1,000 regular expressions"):
        AdapterConfig(rank_pattern={f"x{number}*": 1 for number in range(1001)})


def test_a_config_can_be_copied_and_pickled_after_matching() -> None:
    config = AdapterConfig(target_modules="(?!b).*", rank_pattern={"a+": 2, "q": 3})
    assert (config.rank_of("x.aa"), match_targets(["a", "b"], config)) == (2, ["a"])
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config
        assert (copied.rank_of("x.aa"), match_targets(["a", "b"], copied)) == (2, ["a"])


MANY = 30_000


def test_matching_time_is_linear_in_the_number_of_names(tmp_path: Path) -> None:
    # Comparing every name with every other would take hours.
    names = [f"model.layers.{number}.mlp.up_proj" for number in range(MANY)]
    config = AdapterConfig(
        r=1,
        lora_alpha=1,
        target_modules=tuple(names),
        exclude_modules=tuple(f"no{number}" for number in range(MANY)),
        rank_pattern=dict.fromkeys(names, 1),
        alpha_pattern={f"^{re.escape(name)}": 2 for name in names},
        modules_to_save=tuple(f"head{number}" for number in range(MANY)),
        layers_to_transform=tuple(range(MANY)),
    )
    assert match_targets(names, config) == names
    assert [config.rank_of(name) for name in names] == [1] * MANY
    assert {config.alpha_of(name) for name in names} == {2}
    assert [is_saved(f"x.head{MANY - 1}.weight", config), is_saved("x.y", config)] == [True, False]


def test_an_adapter_of_many_modules_is_read(tmp_path: Path) -> None:
    count = MANY // 6
    factor = Factors(A=np.ones((1, 1), np.float32), B=np.ones((1, 1), np.float32))
    names = [f"m.{number}.a" for number in range(count)]
    config = AdapterConfig(
        r=1, lora_alpha=1, target_modules=tuple(names), rank_pattern=dict.fromkeys(names, 1)
    )
    save_adapter(Adapter(config=config, factors=dict.fromkeys(names, factor)), tmp_path)
    assert len(load_adapter(tmp_path).factors) == count
