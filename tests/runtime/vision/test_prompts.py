"""Prompts with image tokens, expanded as by the processor of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from loradeploy.errors import BundleError, UsageError
from loradeploy.runtime.vision.prompts import ImagePrompts

IMAGE: Final = 9
WORDS: Final = {"<fake_token_around_image>": 20, "<global-img>": 21, "<image>": IMAGE}


def prompts(model: str, words: dict[str, int] = WORDS, **config: Any) -> ImagePrompts:
    return ImagePrompts.of({"model_type": model, **config}, IMAGE, words, 3, Path("decoder"))


@pytest.mark.parametrize("model", ["smolvlm", "idefics3"])
def test_each_of_two_adjacent_images_has_the_tokens_around_it(model: str) -> None:
    found = prompts(model).expanded([1, IMAGE, IMAGE, 2], [3, 2], "it")
    assert found == [1, 20, 21, 9, 9, 9, 20, 20, 21, 9, 9, 20, 2]


@pytest.mark.parametrize("model", ["llava", "qwen2_vl", "qwen2_5_vl"])
def test_an_image_at_the_start_of_a_prompt_has_its_own_tokens(model: str) -> None:
    assert prompts(model).expanded([IMAGE, 1], [3], "it") == [9, 9, 9, 1]


def test_a_prompt_with_all_image_tokens_or_none_is_not_changed() -> None:
    made = prompts("smolvlm")
    whole = [1, 20, 21, 9, 9, 9, 20]
    assert made.expanded(whole, [3], "it") == whole
    assert made.expanded([1, 2], [], "it") == [1, 2]
    assert made.write("a <image>") == "a <image>"


def test_images_that_do_not_fit_are_refused() -> None:
    made = prompts("smolvlm")
    for ids, features in (([IMAGE], []), ([], [3]), ([IMAGE] * 2, [3]), ([IMAGE], [3, 3])):
        with pytest.raises(
            UsageError, match=f"it has {len(ids)} image tokens, and {len(features)}"
        ):
            made.expanded(ids, features, "it")
    with pytest.raises(UsageError, match="the tokenizer of decoder has no <fake_token_around_im"):
        prompts("smolvlm", {"<image>": IMAGE}).expanded([IMAGE], [3], "it")
    with pytest.raises(UsageError, match="around an image of decoder are not known: give one"):
        prompts("other").expanded([IMAGE], [3], "it")


def test_the_images_of_gemma_are_expanded_in_the_text() -> None:
    words = {"<boi>": 5, "<image>": IMAGE, "<eoi>": 6}
    tokens = {"boi_token_index": 5, "image_token_index": IMAGE, "eoi_token_index": 6}
    made = prompts("gemma3", words, **tokens)
    one = "\n\n<boi><image><image><image><eoi>\n\n"
    assert made.write("a <boi><boi>b") == f"a {one}{one}b"
    assert made.write(one) == one
    with pytest.raises(UsageError, match="give a text with <boi> for each image"):
        made.expanded([IMAGE], [3], "it")
    with pytest.raises(BundleError, match="has the boi_token_index 7, which the tokenizer does"):
        prompts("gemma3", words, **{**tokens, "boi_token_index": 7})
