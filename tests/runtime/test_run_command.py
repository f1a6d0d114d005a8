"""`loradeploy run`: results on standard output, user errors in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from loradeploy.bundle.names import MANIFEST_NAME
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


@pytest.mark.parametrize("from_file", [False, True], ids=["a prompt", "a file of prompts"])
def test_only_a_single_prompt_maps_the_weights(
    from_file: bool, tiny_llama_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of prompts may take hours, during which writers of the bundle would wait."""
    asked = []

    def init(self: AdapterSession, *arguments: Any, **options: Any) -> None:
        asked.append(options["map_weights"])
        right(self, *arguments, **options)

    right = AdapterSession.__init__
    monkeypatch.setattr(AdapterSession, "__init__", init)
    given = ("--input", lines(tmp_path, {"prompt": "A"})) if from_file else ("A",)
    assert run(tiny_llama_bundle, *given, "--max-new-tokens", 1).exit_code == 0
    assert asked == [not from_file]


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
        "completion_tokens": expected.completion_tokens,
        "stop_reason": expected.stop_reason,
        "choice": 0,
        "logprobs": None,
        "score": None,
    }


SEVERAL: dict[str, tuple[list[object], dict[str, Any]]] = {
    "penalties and stops": (
        [
            *("--repetition-penalty", 1.5, "--presence-penalty", 0.5, "--frequency-penalty", 0.25),
            *("--stop", "zz", "--stop", "c", "--logit-bias", "69=4", "--logit-bias", "so=1.5"),
        ],
        {
            "repetition_penalty": 1.5,
            "stop": ["zz", "c"],
            "logit_bias": {69: 4.0, "so": 1.5},
            "presence_penalty": 0.5,
            "frequency_penalty": 0.25,
        },
    ),
    "beams": (
        ["--beams", 3, "--n", 2, "--length-penalty", 0.5, "--early-stopping", "yes"],
        {"num_beams": 3, "n": 2, "length_penalty": 0.5, "early_stopping": True},
    ),
    "samples": (
        ["--temperature", 0.9, "--min-p", 0.1, "--n", 2, "--seed", 4, "--logprobs", 2],
        {"temperature": 0.9, "min_p": 0.1, "n": 2, "seed": 4, "logprobs": 2},
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_settings_of_a_generation_reach_it_and_their_results_are_printed(
    tiny_llama_bundle: Path, llama_session: AdapterSession, tmp_path: Path, name: str
) -> None:
    flags, options = SEVERAL[name]
    prompts = ["The bank", "A"]
    expected = TextGenerator(llama_session).generate(prompts, max_new_tokens=9, **options)
    file = lines(tmp_path, *({"prompt": prompt} for prompt in prompts))
    flags = ["--max-new-tokens", 9, *flags]
    result = run(tiny_llama_bundle, "--input", file, "--json", *flags)
    printed = [json.loads(line) for line in result.stdout.splitlines()]
    assert [values.pop("prompt") for values in printed] == [
        prompt for prompt in prompts for _ in range(options.get("n", 1))
    ]
    assert printed == [json.loads(json.dumps(asdict(one))) for one in expected]
    if "logprobs" not in options:
        texts = run(tiny_llama_bundle, prompts[0], *flags).stdout
        own = expected[: options.get("n", 1)]
        assert texts == "".join(one.text + "\n" for one in own)


def test_each_result_is_printed_with_its_prompt_where_batches_have_a_single_length(
    tiny_llama_bundle: Path, llama_session: AdapterSession, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_llama_bundle, bundle)
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    (bundle / MANIFEST_NAME).write_text(json.dumps({**manifest, "padding": "none"}))
    prompts = ["A", "Shares in the company fell", "I"]
    expected = TextGenerator(llama_session).generate(prompts, max_new_tokens=5)
    file = lines(tmp_path, *({"prompt": prompt} for prompt in prompts))
    result = run(bundle, "--input", file, "--json", "--max-new-tokens", 5)
    printed = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["prompt"], line["text"]) for line in printed] == [
        (prompt, one.text) for prompt, one in zip(prompts, expected, strict=True)
    ]


def test_a_line_can_have_its_own_settings(
    tiny_llama_bundle: Path, llama_session: AdapterSession, tmp_path: Path
) -> None:
    own: list[dict[str, Any]] = [
        {"temperature": 1.5, "seed": 3, "n": 2},
        {},
        {"num_beams": 2, "logit_bias": {"300": 5}, "max_new_tokens": 3},
    ]
    file = lines(tmp_path, *({"prompt": "A", **settings} for settings in own))
    result = run(tiny_llama_bundle, "--input", file, "--json", "--max-new-tokens", 5)
    printed = [json.loads(line)["token_ids"] for line in result.stdout.splitlines()]
    own[2]["logit_bias"] = {300: 5}
    expected = TextGenerator(llama_session).generate(["A"] * 3, max_new_tokens=5, per_prompt=own)
    assert printed == [list(one.token_ids) for one in expected]
    assert len(printed[3]) == 3


def test_texts_are_scored(
    tiny_llama_bundle: Path, llama_adapters: dict[str, Path], llama_session: AdapterSession
) -> None:
    (expected,) = TextGenerator(llama_session).score(["The bank"], "small", logprobs=2)
    arguments = [tiny_llama_bundle, "The bank", "--score", "--adapter", llama_adapters["small"]]
    logprob, perplexity = run(*arguments).stdout.split("\t")
    assert float(logprob) == pytest.approx(expected.logprob, abs=1e-4)
    assert float(perplexity) == pytest.approx(expected.perplexity, abs=1e-3)
    values = json.loads(run(*arguments, "--json", "--logprobs", 2).stdout)
    assert values["text"] == "The bank"
    assert len(values["logprobs"][0]["top"]) == 2
    refused = run(*arguments, "--temperature", 1).exception
    assert "--score generates nothing, and takes no --temperature" in str(refused)


def test_each_line_of_a_file_can_name_its_adapter(
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


def test_a_text_file_has_one_prompt_per_line(
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


def test_two_adapters_with_the_same_name_are_distinguished(
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


@pytest.mark.parametrize("first", [0, 1])
def test_a_relative_path_and_another_path_that_ends_with_it_are_distinguished(
    tiny_llama_bundle: Path,
    llama_adapters: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: int,
) -> None:
    for parent, name in (("c", "small"), ("d", "large")):
        shutil.copytree(llama_adapters[name], tmp_path / parent / "same")
    monkeypatch.chdir(tmp_path / "d")
    paths = ["same", "../c/same"]
    rows = [{"prompt": "One", "adapter": path} for path in (paths[first], paths[1 - first])]
    result = run(tiny_llama_bundle, "--input", lines(tmp_path, *rows), "--json")
    answers = {a["adapter"]: a["text"] for a in map(json.loads, result.stdout.splitlines())}
    assert answers.keys() == set(paths)
    assert len(set(answers.values())) == 2


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl", "-"])
def test_a_byte_order_mark_is_not_part_of_a_prompt(
    tiny_llama_bundle: Path, tmp_path: Path, name: str
) -> None:
    content = "\ufeff" + ('{"prompt": "The bank"}\n' if name.endswith("l") else "The bank\n")
    file = "-" if name == "-" else tmp_path / name
    if isinstance(file, Path):
        file.write_text(content, encoding="utf-8")
    result = run(tiny_llama_bundle, "--input", file, "--json", stdin=content)
    assert json.loads(result.stdout)["prompt"] == "The bank"


def test_a_file_that_begins_with_an_object_is_json_lines_whatever_its_ending(
    tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text('{"prompt": "One", "max_new_tokens": 2}\n{"prompt": "Two"}\n')
    printed = run(tiny_llama_bundle, "--input", file, "--json", "--max-new-tokens", 3).stdout
    answers = [json.loads(line) for line in printed.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["One", "Two"]
    assert [answer["completion_tokens"] for answer in answers] == [2, 3]


@pytest.mark.parametrize("name", ["data.csv", "data.TSV", "data.parquet", "data.jsonl.gz"])
def test_a_table_is_not_read_as_a_prompt_in_each_line(
    tiny_llama_bundle: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text('prompt,completion\n"One,\nor two","Three"\n')
    result = run(tiny_llama_bundle, "--input", tmp_path / name)
    assert isinstance(result.exception, DataError) and result.stdout == ""
    assert "files are not read as prompts: give JSONL" in str(result.exception)


def test_a_table_that_does_not_exist_is_reported_as_missing(
    tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    result = run(tiny_llama_bundle, "--input", tmp_path / "prompts.csv")
    assert str(result.exception) == f"{tmp_path / 'prompts.csv'} does not exist"


def test_an_unknown_adapter_is_reported_with_the_line_that_names_it(
    tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    file = lines(tmp_path, {"prompt": "A"}, {"prompt": "B", "adapter": {"ghost": 0.5}})
    result = run(tiny_llama_bundle, "--input", file)
    assert isinstance(result.exception, UnknownAdapterError)
    assert str(result.exception).startswith(f"{file}, line 2: 'ghost' is neither an adapter of")
    given = run(tiny_llama_bundle, "--input", file, "--adapter", "other")
    assert str(given.exception).startswith("'other' is neither an adapter of"), "it is in no line"


def test_several_results_of_one_prompt_are_json_lines(tiny_llama_bundle: Path) -> None:
    options = ("--n", 3, "--temperature", 1, "--max-new-tokens", 2, "--json")
    printed = run(tiny_llama_bundle, "One", *options).stdout.splitlines()
    assert [json.loads(line)["choice"] for line in printed] == [0, 1, 2]


def test_standard_input_that_begins_with_an_object_is_json_lines(
    tiny_llama_bundle: Path, llama_session: AdapterSession
) -> None:
    content = '\n{"prompt": "One"}\n{"text": "Two", "max_new_tokens": 3}\n'
    printed = run(tiny_llama_bundle, "--input", "-", "--json", stdin=content).stdout.splitlines()
    expected = TextGenerator(llama_session).generate(
        ["One", "Two"], per_prompt=[{}, {"max_new_tokens": 3}]
    )
    assert [json.loads(line)["text"] for line in printed] == [text.text for text in expected]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "b"', "standard input, line 2: not JSON"),
        ("b", "standard input, line 2: not JSON"),
        ('["b"]', "standard input, line 2: not an object"),
        ('{"prompt": "b", "max_tokens": 3}', "'max_tokens' is not read: name the setting max_new"),
        ('{"prompt": "b", "max-new-tokens": 3}', "'max-new-tokens' is not read"),
        ('{"prompt": "b", "temprature": 1}', "'temprature' is not read: name the setting temp"),
        ('{"prompt": "b", "images": ["a.png"]}', "images: "),
    ],
)
def test_a_line_of_standard_input_that_cannot_be_used_is_named(
    line: str, message: str, tiny_llama_bundle: Path
) -> None:
    result = run(tiny_llama_bundle, "--input", "-", stdin=f'{{"prompt": "a"}}\n{line}\n')
    assert isinstance(result.exception, LoraDeployError)
    assert message in str(result.exception)
    assert result.stdout == ""


Arguments = Callable[[Path, Path], list[object]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda b, t: [b], UsageError, "either a PROMPT or --input"),
        (lambda b, t: [b, "x", "--input", "y"], UsageError, "either a PROMPT or --input"),
        (lambda b, t: [b, ""], UsageError, "prompt 1 is empty"),
        (lambda b, t: [b, "x", "--input=y"], UsageError, "either a PROMPT"),
        (lambda b, t: [t / "none", "x"], LoraDeployError, "none does not exist"),
        (lambda b, t: [b, "x", "--adapter", "ghost"], UnknownAdapterError, "'ghost' is neither"),
        (lambda b, t: [b, "x", "--adapter", ""], UnknownAdapterError, "'' is neither"),
        (lambda b, t: [b, "x", "--adapter", t], LoraDeployError, "is not an adapter"),
        (lambda b, t: [b, "--input", t / "none.txt"], DataError, "none.txt does not exist"),
        (lambda b, t: [b, "--input", t], DataError, "is a directory: only regular files are read"),
        (lambda b, t: [b, "x", "--top-k", 3], UsageError, "no effect at temperature 0"),
        (lambda b, t: [b, "x", "--logit-bias", "so"], UsageError, "give TOKEN=NUMBER"),
        (lambda b, t: [b, "x", "--logprobs", 3], UsageError, "--logprobs: give --json too"),
        (lambda b, t: [b, "x", "--stop", ""], UsageError, "a stop string is empty"),
        (lambda b, t: [b, "x", "--n", 2], UsageError, "n is 2 at temperature 0"),
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
        ("", "has no prompts"),
        ("\n \n", "has no prompts"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ('{"prompt": "a"}\n\n[1]\n', "line 3: not an object"),
        ('{"completion": "a"}\n', "line 1: give a text"),
        ('{"prompt": 5}\n', "line 1: give a text"),
        ('{"messages": "a"}\n', "line 1: give a text"),
        ('{"prompt": "a", "adapter": 5}\n', "line 1: adapter is not a name"),
        ('{"prompt": "a", "adapter": ""}\n', "line 1: adapter is an empty text"),
        ('{"prompt": "a", "lora": "small"}\n', "line 1: 'lora' is not read"),
        ('{"prompt": "a", "model": "small"}\n', "line 1: 'model' is not read"),
        ('{"prompt": "a", "adapter": null, "lora_name": "small"}\n', "'lora_name' is not read"),
        ('{"prompt": "a", "adapters": {"small": 1.0}}\n', "'adapters' is not read"),
        ('{"prompt": "a"}\n\n{"prompt": ""}\n', "prompts.jsonl, line 3 is empty"),
        ('{"prompt": "a"}\n{"prompt": "a", "n": 2}\n', "line 2: n is 2 at temperature 0"),
    ],
)
def test_a_broken_line_is_named(
    tiny_llama_bundle: Path, tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    result = run(tiny_llama_bundle, "--input", file)
    assert isinstance(result.exception, DataError | UsageError)
    assert message in str(result.exception)


def test_empty_adapter_fields_are_ignored(
    tiny_llama_bundle: Path, llama_session: AdapterSession, tmp_path: Path
) -> None:
    (expected,) = TextGenerator(llama_session).generate(["The bank"])
    file = lines(
        tmp_path,
        {"prompt": "The bank", "id": 7, "flora": "moss", "lora": None},
        {"prompt": "The bank", "adapter": None, "model": "base"},
    )
    result = run(tiny_llama_bundle, "--input", file, "--json")
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == [expected.text] * 2


def test_a_classifier_refuses_options_of_text_generation(
    tiny_bert_bundle: Path, tmp_path: Path
) -> None:
    result = run(tiny_bert_bundle, "x", "--chat", "--max-new-tokens", 3)
    assert isinstance(result.exception, UsageError)
    assert "--chat, --max-new-tokens: only for text generation" in str(result.exception)
    file = lines(tmp_path, {"messages": [{"role": "user", "content": "x"}]})
    result = run(tiny_bert_bundle, "--input", file)
    assert "prompts.jsonl, line 1 is a conversation" in str(result.exception)


def test_help_has_an_example() -> None:
    assert "Example: loradeploy run bundle" in run("--help").stdout
