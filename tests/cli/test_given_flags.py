"""Every flag changes the arguments of the function that its command calls."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from loradeploy.errors import LoraDeployError
from loradeploy.runtime.session import AdapterSession
from tests.cli.calling import call, command

Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]

TRAIN = ["train", "--model", "m", "--data", "d", "--output", "o"]
EXPORT = ["export", "--model", "m", "--output", "o"]
PARITY = ["parity", "bundle"]
COMPARE = ["parity", "candidate.onnx", "--against", "reference.onnx"]
RUN = ["run", "bundle", "a prompt"]
BENCH = ["bench", "bundle"]

# The functions that the commands finally call.
LAST = {
    "train": "loradeploy.train.api.train",
    "export": "loradeploy.export.api.export",
    "parity": "loradeploy.parity.api.parity",
    "compare": "loradeploy.parity.compare.api.compare",
    "run": "loradeploy.runtime.tasks.generation.TextGenerator.generate",
    "bench": "loradeploy.runtime.timing.time_bundle",
}
OF_COMPARE = {"reference", "inputs", "cases", "tolerances"}
# Flags that the command handles itself or that other tests cover: output formats, dry runs, files
# of settings or prompts, loaded adapters, other tasks.
ELSEWHERE = {
    "train": {"as_json", "print_config", "dry_run", "config"},
    "export": {"as_json"},
    "parity": {"as_json"},
    "run": {"as_json", "file", "adapter", "score", "vision", "images"}
    | {
        "prompt_name",
        "threshold",
        "aggregation",
        "stride",
        "ignore_label",
        "language",
        "task",
        "timestamps",
    },
    "bench": {"as_json", "adapters"},
}
# Valid values for options that do not accept any text.
VALUES = {
    "certificate_minimum": "prompts=3",
    "provider": "cuda",
    "logit_bias": "5=-2.5",
    "logprobs": "2 --json",
    "tolerances": "fp16",
    "fixed": "batch=1",
    "static_shapes": "batch=1",
    "examples": "7 --evaluate held-out.jsonl",
}


def flags(line: list[str]) -> list[Any]:
    """Return a row per flag of the command: the line without and with the flag."""
    verb, compared = line[0], line is COMPARE
    rows = []
    for option in command(verb).params:
        if not isinstance(option, click.Option) or option.name in ELSEWHERE[verb]:
            continue
        if option.name == "help" or option.opts[0] in line:
            continue
        if verb == "parity" and compared != (option.name in OF_COMPARE):
            continue
        flag = option.secondary_opts[0] if option.default is True else option.opts[0]
        given = [*line, flag, *value(option)]
        rows.append(pytest.param(line, given, id=f"{verb} {flag}"))
    return rows


def value(option: click.Option) -> list[str]:
    """Return a value of the option other than its default; empty for a switch."""
    kind = option.type
    if option.is_flag:
        return []
    if option.name in VALUES:
        return VALUES[option.name].split()
    if isinstance(kind, click.Choice):
        return [next(str(choice) for choice in kind.choices if choice != option.default)]
    if isinstance(kind, click.types.IntParamType):
        return ["3"]
    if isinstance(kind, click.types.FloatParamType):
        return ["0.25"]
    return ["x"]


@pytest.fixture
def calls(tiny_llama_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The arguments of the functions that the commands call; the last call raises."""
    found: Calls = []
    session = AdapterSession(tiny_llama_bundle)

    def opened(*given: Any, **options: Any) -> AdapterSession:
        found.append(("AdapterSession", given, options))
        return session

    def recorder(name: str) -> Callable[..., None]:
        def last(*given: Any, **options: Any) -> None:
            plain = [part for part in given if isinstance(part, str | list | tuple)]
            options.pop("on_text", None)
            options.pop("on_result", None)
            found.append((name, tuple(plain), options))
            raise LoraDeployError("enough was seen")

        return last

    for path in LAST.values():
        module, _, name = path.rpartition(".")
        try:
            owner = importlib.import_module(module)
        except ModuleNotFoundError:
            module, _, kind = module.rpartition(".")
            owner = getattr(importlib.import_module(module), kind)
        monkeypatch.setattr(owner, name, recorder(name))
    # After these modules were imported, which check the type of a session.
    monkeypatch.setattr("loradeploy.runtime.session.AdapterSession", opened)
    return found


@pytest.mark.parametrize(
    ("without", "given"),
    [row for line in (TRAIN, EXPORT, PARITY, COMPARE, RUN, BENCH) for row in flags(line)],
)
def test_a_flag_reaches_the_function(without: list[str], given: list[str], calls: Calls) -> None:
    seen = []
    for line in (without, given):
        calls.clear()
        with pytest.raises(LoraDeployError, match="enough was seen"):
            call(*line)
        seen.append(list(calls))
    assert seen[0] != seen[1]
