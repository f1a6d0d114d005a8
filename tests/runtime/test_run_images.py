"""`loradeploy run` with the images of a vision-language model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loradeploy.errors import DataError, LoraDeployError, UnknownAdapterError, UsageError
from tests.cli.calling import call
from tests.inputs.pictures import NEW, PROMPTS, Made, prepared

PROMPT = PROMPTS["Gemma3"]
TOKENS = ("--max-new-tokens", NEW)


@pytest.fixture
def made(shared: Path) -> Made:
    return prepared(shared, "Gemma3")


def bundles(made: Made) -> tuple[object, ...]:
    return made.place / "decoder", "--vision", made.place / "tower"


def test_a_prompt_with_images_prints_the_text_of_the_whole_model(
    made: Made, pictures: list[Path]
) -> None:
    decoder, *vision = bundles(made)
    shown = ("--image", pictures[0], "--image", pictures[1])
    printed = {}
    # By name, and from a directory, whose parts are loaded into both bundles.
    for adapter in (None, "all", made.place / "text"):
        named = () if adapter is None else ("--adapter", adapter)
        expected = made.greedy(
            PROMPT, pictures[:2], None if adapter is None else Path(adapter).name
        )
        found = json.loads(call("run", decoder, PROMPT, *vision, *shown, *named, *TOKENS, "--json"))
        assert found["token_ids"] == expected, adapter
        assert found["images"] == [str(file) for file in pictures[:2]]
        plain = call("run", decoder, PROMPT, *vision, *shown, *named, *TOKENS)
        assert plain.strip() == found["text"].strip(), "a single text is streamed"
        printed[adapter] = found["token_ids"]
    assert printed[None] != printed["all"] != printed[made.place / "text"]


def test_images_of_a_chat_come_before_its_text(made: Made, pictures: list[Path]) -> None:
    decoder, *vision = bundles(made)
    options = (*vision, "--image", pictures[0], *TOKENS, "--json")
    (given,) = [json.loads(call("run", decoder, "w20 w21", "--chat", *options))]
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w20 w21"}]},
    ]
    rows = pictures[0].parent / "rows.jsonl"
    rows.write_text(json.dumps({"messages": chat, "images": [pictures[0].name]}))
    found = json.loads(call("run", decoder, "--input", rows, *vision, *TOKENS, "--json"))
    text = "user\n<start_of_image>w20 w21\n"
    assert found["token_ids"] == given["token_ids"] == made.greedy(text, pictures[:1], None)


def test_each_row_has_its_own_images_adapter_and_settings(made: Made, pictures: list[Path]) -> None:
    decoder, *vision = bundles(made)
    lines = [
        {"prompt": PROMPT, "images": [pictures[0].name, pictures[1].name], "adapter": "all"},
        {"prompt": "w5 w6"},
        {"prompt": "w7 <start_of_image>", "image": pictures[2].name, "max_new_tokens": 2},
    ]
    rows = pictures[0].parent / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, lines)))
    printed = call("run", decoder, "--input", rows, *vision, *TOKENS, "--json").splitlines()
    found = [json.loads(line) for line in printed]
    assert found[0]["token_ids"] == made.greedy(PROMPT, pictures[:2], "all")
    assert found[2]["token_ids"] == made.greedy("w7 <start_of_image>", pictures[2:], None)[:2]
    assert [len(line["images"]) for line in found] == [2, 0, 1]
    alone = json.loads(call("run", decoder, "w5 w6", *TOKENS, "--json"))
    assert found[1]["token_ids"] == alone["token_ids"]


def test_scores_are_printed(made: Made, pictures: list[Path]) -> None:
    decoder, *vision = bundles(made)
    shown = ("--image", pictures[0], "--image", pictures[1])
    found = json.loads(call("run", decoder, PROMPT, *vision, *shown, "--score", "--json"))
    (expected,) = made.generator().score([PROMPT], [pictures[:2]])
    assert found["logprob"] == pytest.approx(expected.logprob, abs=1e-5)
    assert found["images"] == [str(file) for file in pictures[:2]]


Arguments = Callable[[Path, Path], list[object]]  # of the bundles and the images' directory


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            lambda b, t: [b / "decoder", "x", "--image", t / "image0.png"],
            UsageError,
            "--image: give --vision",
        ),
        (
            lambda b, t: [b / "decoder", "x", "--vision", b / "tower"],
            UsageError,
            "--vision: there are no images",
        ),
        (
            lambda b, t: [b / "tower", "x"],
            UsageError,
            "is a vision-tower bundle, which this command cannot run alone: give the bundle of the",
        ),
        (
            lambda b, t: [b / "tower", "x", "--vision", b / "decoder", "--image", t / "image0.png"],
            UsageError,
            "is a vision-tower bundle, no causal-lm",
        ),
        (
            lambda b, t: [b / "decoder", "x", "--vision", b / "tower", "--image", t / "none.png"],
            DataError,
            "none.png does not exist",
        ),
        (
            lambda b, t: [b / "decoder", "x", "--vision", b / "tower", "--image", t / "image0.png"],
            UsageError,
            "prompt 1 has 0 image tokens.*give <start_of_image> once",
        ),
        (
            lambda b, t: [
                *(b / "decoder", "<start_of_image>", "--vision", b / "tower"),
                *("--image", t / "image0.png", "--adapter", "ghost"),
            ],
            UnknownAdapterError,
            "'ghost' is neither an adapter of .*decoder, which has all, nor a directory",
        ),
        (
            lambda b, t: [
                *(b / "decoder", "--input", t / "rows.jsonl", "--vision", b / "tower"),
                *("--image", t / "image0.png"),
            ],
            UsageError,
            "--image: only with PROMPT",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    arguments: Arguments,
    error: type[LoraDeployError],
    message: str,
    made: Made,
    pictures: list[Path],
) -> None:
    place = pictures[0].parent
    (place / "rows.jsonl").write_text('{"prompt": "w5"}')
    with pytest.raises(error, match=message):
        call("run", *arguments(made.place, place))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "w5", "image_url": "http://a/b"}, "line 1: image_url is not read"),
        ({"prompt": "w5", "video": "a.mp4"}, "line 1: video is not read"),
        ({"prompt": "w5", "images": ["a"], "image": "b"}, "line 1: images is not read"),
        ({"prompt": "w5", "images": [{"bytes": "aGk="}]}, "images is .*: give the paths"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}]},
            "line 1: a message has an image of its own, as path",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}
                ]
            },
            "line 1: a message has an image of its own, as image_url",
        ),
    ],
)
def test_images_in_another_form_are_named(
    row: dict[str, object], message: str, made: Made, tmp_path: Path
) -> None:
    decoder, *vision = bundles(made)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        call("run", decoder, "--input", tmp_path / "rows.jsonl", *vision)
