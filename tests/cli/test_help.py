"""--help: its contents and its cost, and that every flag is a parameter of a function."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loradeploy.cli.main import VERBS
from loradeploy.conversion import convert
from loradeploy.export.api import export
from loradeploy.inspection.api import inspect as inspect_path
from loradeploy.parity.api import parity
from loradeploy.parity.compare.api import compare
from loradeploy.runtime.decoding.choosing.options import GenerationOptions
from loradeploy.runtime.devices.environment import examine
from loradeploy.runtime.operator.build import build_operator
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.classification import TextClassifier
from loradeploy.runtime.tasks.embedding import TextEmbedder
from loradeploy.runtime.tasks.generation import TextGenerator
from loradeploy.runtime.tasks.image_text import ImageTextGenerator
from loradeploy.runtime.tasks.speech import SpeechRecognizer
from loradeploy.runtime.tasks.tokens import TokenClassifier
from loradeploy.runtime.timing import time_bundle
from loradeploy.serve.service import Service
from loradeploy.serve.settings import ServeLimits
from loradeploy.train.api import train
from loradeploy.train.config import TrainConfig
from tests.cli.calling import call, command, without_extras

HEAVY = ("numpy", "onnxruntime", "torch", "transformers", "onnx", "onnx_ir", "rich", "tokenizers")


def test_help_imports_no_command() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "loradeploy", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()
    }
    assert imported.isdisjoint(HEAVY), imported.intersection(HEAVY)
    for verb in VERBS:
        assert f"\n  {verb} " in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_command_has_an_example(verb: str) -> None:
    text = call(verb, "--help")
    assert f"Example: loradeploy {verb}" in " ".join(text.split())
    assert command(verb).short_help == VERBS[verb], "the list of verbs tells another story"


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_json(verb: str) -> None:
    assert any("--json" in parameter.opts for parameter in command(verb).params)


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_command_works_without_the_extras(verb: str) -> None:
    done = without_extras(verb, "--help")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["train", "--model", "{model}", "--data", "{model}", "--output", "{tmp}/o"], "train"),
        (["export", "--model", "{model}", "--output", "{tmp}/o"], "export"),
        (["parity", "{bundle}", "--model", "{model}"], "export"),
        (["serve", "{bundle}"], "serve"),
    ],
    ids=["train", "export", "parity", "serve"],
)
def test_a_missing_extra_is_named(
    arguments: list[str], extra: str, tiny_llama: Path, tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    places = {"model": tiny_llama, "bundle": tiny_llama_bundle, "tmp": tmp_path}
    done = without_extras(*(argument.format(**places) for argument in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert f"pip install 'loradeploy[{extra}]'" in line
    assert list(tmp_path.iterdir()) == []


def names(verb: str) -> set[str]:
    """Return the options and arguments of a command, except --json."""
    return {p.name for p in command(verb).params if p.name is not None} - {"as_json"}


def parameters(*functions: Callable[..., object]) -> set[str]:
    return {name for function in functions for name in inspect.signature(function).parameters}


def test_every_flag_of_train_is_a_setting_and_every_setting_a_flag() -> None:
    settings = {field.name for field in dataclasses.fields(TrainConfig)}
    own = {"print_config", "dry_run"}
    assert names("train") == settings | parameters(train) - {"flags"} | own


# By command: the functions that it calls, and parameters that it computes from other flags.
FUNCTIONS: dict[str, tuple[tuple[Callable[..., object], ...], set[str]]] = {
    "export": ((export,), set()),
    "parity": ((parity, compare), set()),
    "run": (
        (
            *(AdapterSession, TextGenerator.generate, GenerationOptions, TextEmbedder.__call__),
            *(TextClassifier.__call__, TokenClassifier.__call__),
            *(SpeechRecognizer.transcribe, ImageTextGenerator.generate),
        ),
        {"prompt", "file", "adapter", "provider", "certificate_minimum", "certificate_key"}
        | {"score", "ignore_label", "vision"},
    ),
    "bench": ((AdapterSession, time_bundle), {"adapters", "provider"}),
    "serve": (
        (AdapterSession, ServeLimits, Service),
        {"port", "adapters", "adapter_root", "allow_adapter_updates", "adapter_memory"}
        | {"adapter_cache", "api_keys", "provider", "demo", "threads", "on_ray", "replicas"},
    ),
    "convert": ((convert,), set()),
    "inspect": ((inspect_path,), set()),
    "operator": ((build_operator,), set()),
    "doctor": ((examine,), set()),
}


@pytest.mark.parametrize("verb", FUNCTIONS)
def test_every_flag_is_a_parameter_of_a_called_function(verb: str) -> None:
    functions, own = FUNCTIONS[verb]
    assert names(verb) <= parameters(*functions) | own
    assert names(verb) >= own


def test_the_table_has_every_command() -> None:
    assert {"train", *FUNCTIONS} == set(VERBS)


def test_every_generation_setting_is_a_flag() -> None:
    settings = {field.name for field in dataclasses.fields(GenerationOptions)}
    assert settings - names("run") == {"allowed_tokens"}  # is a function


@pytest.mark.parametrize("verb", VERBS)
def test_no_flag_is_parsed_and_ignored(verb: str) -> None:
    module = importlib.import_module(f"loradeploy.cli.{verb}")
    tree = ast.parse(inspect.getsource(module))
    (function,) = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "command"
    ]
    used = {
        node.id for part in function.body for node in ast.walk(part) if isinstance(node, ast.Name)
    }
    arguments = function.args
    taken = {a.arg for a in (*arguments.args, *arguments.kwonlyargs)}
    if arguments.kwarg is not None:
        assert arguments.kwarg.arg in used
    assert taken <= used
