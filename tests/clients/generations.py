"""The text generation jobs of the JavaScript clients, and Python's results for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator

TOKENS = [5, 6, 7, 8, 9]
TEXT = "News story: café £3m — “Shares” 🙂 rose\n"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
COUNT = 8
# A batch of prompts of different lengths, and their adapters.
PROMPTS = [TEXT, TOKENS, TOKENS, CHAT, CHAT]
ADAPTERS = ["all", None, "few", "few", None]


def calls() -> list[list[Any]]:
    """Return calls with the base, with each adapter, and with a mixed batch."""
    solo = [
        ["generate", {"prompt": TOKENS, "adapter": name, "maxNewTokens": COUNT}]
        for name in (None, "all", "few")
    ]
    mixed = {"prompts": PROMPTS, "adapters": ADAPTERS, "maxNewTokens": COUNT}
    return [*solo, ["generate", mixed]]


def answers(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the results of all `calls` in order; assert that their pieces join to the texts."""
    found = []
    for call in result["value"]["answers"]:
        assert "value" in call, call
        rows = call["value"] if isinstance(call["value"], list) else [call["value"]]
        for number, row in enumerate(rows):
            assert call["pieces"].get(str(number), "") == row["text"]
        found += rows
    return found


def results_of_python(bundle: Path) -> list[dict[str, Any]]:
    """Return TextGenerator's results for all `calls`."""
    generator = TextGenerator(AdapterSession(bundle))
    solo = [(TOKENS, name) for name in (None, "all", "few")]
    made = [generator.generate([p], adapters=a, max_new_tokens=COUNT)[0] for p, a in solo]
    made += generator.generate(PROMPTS, adapters=ADAPTERS, max_new_tokens=COUNT)
    return [
        {
            "text": answer.text,
            "tokenIds": list(answer.token_ids),
            "finishReason": answer.finish_reason,
            "adapter": answer.adapter,
            "promptTokens": answer.prompt_tokens,
        }
        for answer in made
    ]


def check_effect(found: list[dict[str, Any]]) -> None:
    """Assert that the base and both adapters give different texts, alone and in a batch."""
    assert len({tuple(answer["tokenIds"]) for answer in found[:3]}) == 3
    base, few = found[4], found[5]  # the same prompt
    assert base["tokenIds"] != few["tokenIds"]
