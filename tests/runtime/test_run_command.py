"""`loradeploy run`: results on standard output, a user's mistake in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from loradeploy.cli.run import command
from loradeploy.errors import DataError, LoraDeployError, UnknownAdapterError, UsageError
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator


def run(*arguments: object, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(command, [str(a) for a in arguments], input=stdin)
    if result.exception is not None and not isinstance(
        result.exception, LoraDeployError | SystemExit
    ):
        raise result.exception
    return result


def lines(tmp_path: Path, *values: Any) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(value) + "\n" for value in values))
    return file


def test_a_prompt_prints_its_text(tiny_llama_bundle: Path, llama_session: AdapterSession) -> None:
    (expected,) = TextGenerator(llama_session).generate(["The bank"], max_new_tokens=9)
    result = run(tiny_llama_bundle, "The bank", "--max-new-tokens", 9)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{expected.text}\n", "")


def test_options_reach_the_generator(
    tiny_llama_bundle: Path, llama_adapters: dict[str, Path], llama_session: AdapterSession
) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 7}
    (expected,) = TextGenerator(llama_session).generate(["A"], "small", chat=True, **options)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    result = run(
        tiny_llama_bundle, "A", "--chat", "--adapter", llama_adapters["small"], "--json", *flags
    )
    values = json.loads(result.stdout)
    assert values == {
        "prompt": "A",
        "text": expected.text,
        "token_ids": list(expected.token_ids),
        "finish_reason": expected.finish_reason,
        "adapter": llama_adapters["small"].name,
        "prompt_tokens": expected.prompt_tokens,
    }


def test_lines_of_a_file_may_each_name_their_adapter(
    tiny_llama_bundle: Path,
    llama_adapters: dict[str, Path],
    llama_session: AdapterSession,
    tmp_path: Path,
) -> None:
    small, large = (str(llama_adapters[name]) for name in ("small", "large"))
    messages = [{"role": "user", "content": "Hi"}]
    file = lines(
        tmp_path,
        {"prompt": "One", "adapter": large, "completion": "not read"},
        {"text": "Two"},
        {"messages": messages, "adapter": None},
    )
    result = run(tiny_llama_bundle, "--input", file, "--adapter", small, "--json")
    printed = [json.loads(line) for line in result.stdout.splitlines()]
    expected = TextGenerator(llama_session).generate(
        ["One", "Two", messages], ["large", "small", None]
    )
    assert [p["text"] for p in printed] == [e.text for e in expected]
    assert [p["prompt"] for p in printed] == ["One", "Two", messages]


def test_a_text_file_gives_a_line_a_prompt(
    tiny_llama_bundle: Path, llama_session: AdapterSession, tmp_path: Path
) -> None:
    prompts = [f"Story {number}" for number in range(11)]
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(prompts) + "\n")
    expected = TextGenerator(llama_session).generate(prompts)
    printed = [text.text.replace("\n", "\\n") for text in expected]
    for result in (
        run(tiny_llama_bundle, "--input", file, "--batch-size", 4),
        run(tiny_llama_bundle, "--input", "-", stdin=file.read_text()),
    ):
        assert result.stdout.splitlines() == printed


def test_a_classifier_prints_labels(
    tiny_bert_bundle: Path, bert_adapters: dict[str, Path], tmp_path: Path
) -> None:
    small = bert_adapters["small"]
    result = run(tiny_bert_bundle, "Shares fell", "--adapter", small)
    label, score = result.stdout.rstrip("\n").split("\t")
    assert label in ("LABEL_0", "LABEL_1") and 0.5 <= float(score) <= 1
    file = lines(tmp_path, {"text": "Shares fell", "label": "kept out"}, {"text": "Goal"})
    result = run(tiny_bert_bundle, "--input", file, "--adapter", small, "--json")
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert (first["label"], round(first["score"], 4)) == (label, float(score))
    assert second["text"] == "Goal" and second["adapter"] == small.name


def test_an_embedding_model_prints_vectors(tiny_bert: Path, tmp_path: Path) -> None:
    from loradeploy.export.api import export

    export(tiny_bert, tmp_path / "bundle", task="feature-extraction")
    assert len(json.loads(run(tmp_path / "bundle", "Hello").stdout)) == 48


def test_two_adapters_of_one_name_are_kept_apart(
    tiny_llama_bundle: Path, llama_adapters: dict[str, Path], tmp_path: Path
) -> None:
    for parent, name in (("c", "small"), ("d", "large")):
        shutil.copytree(llama_adapters[name], tmp_path / parent / "same")
    file = lines(
        tmp_path,
        {"prompt": "One", "adapter": str(tmp_path / "c" / "same")},
        {"prompt": "One", "adapter": str(tmp_path / "d" / "same")},
    )
    result = run(tiny_llama_bundle, "--input", file, "--json")
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first["text"] != second["text"]
    assert first["adapter"] == "same"
    assert second["adapter"] == str(tmp_path / "d" / "same")


Arguments = Callable[[Path, Path], list[object]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda b, t: [b], UsageError, "either a PROMPT or --input"),
        (lambda b, t: [b, "x", "--input", "y"], UsageError, "either a PROMPT or --input"),
        (lambda b, t: [b, ""], UsageError, "prompt 1 is empty"),
        (lambda b, t: [b, "x", "--input="], UsageError, "either a PROMPT"),
        (lambda b, t: [t / "none", "x"], LoraDeployError, "none does not exist"),
        (lambda b, t: [b, "x", "--adapter", "ghost"], UnknownAdapterError, "'ghost' is neither"),
        (lambda b, t: [b, "x", "--adapter", t], LoraDeployError, "is not an adapter"),
        (lambda b, t: [b, "--input", t / "none.txt"], DataError, "none.txt does not exist"),
        (lambda b, t: [b, "--input", t], DataError, "is a directory: only regular files are read"),
        (lambda b, t: [b, "x", "--top-k", 3], UsageError, "no effect at temperature 0"),
    ],
)
def test_a_mistake_is_one_line(
    tiny_llama_bundle: Path,
    tmp_path: Path,
    arguments: Arguments,
    error: type[LoraDeployError],
    message: str,
) -> None:
    result = run(*arguments(tiny_llama_bundle, tmp_path))
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ("\n \n", "holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ('{"prompt": "a"}\n\n[1]\n', "line 3: not an object"),
        ('{"completion": "a"}\n', "line 1: give a text"),
        ('{"prompt": 5}\n', "line 1: give a text"),
        ('{"messages": "a"}\n', "line 1: give a text"),
        ('{"prompt": "a", "adapter": 5}\n', "line 1: adapter is no name"),
    ],
)
def test_a_broken_line_is_named(
    tiny_llama_bundle: Path, tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    result = run(tiny_llama_bundle, "--input", file)
    assert isinstance(result.exception, DataError)
    assert message in str(result.exception)


def test_a_classifier_refuses_what_is_for_generation(
    tiny_bert_bundle: Path, tmp_path: Path
) -> None:
    result = run(tiny_bert_bundle, "x", "--chat", "--max-new-tokens", 3)
    assert isinstance(result.exception, UsageError)
    assert "--chat, --max-new-tokens: for text generation alone" in str(result.exception)
    file = lines(tmp_path, {"messages": [{"role": "user", "content": "x"}]})
    result = run(tiny_bert_bundle, "--input", file)
    assert "prompt 1 is a conversation" in str(result.exception)


def test_help_has_an_example() -> None:
    assert "Example: loradeploy run bundle" in run("--help").stdout
