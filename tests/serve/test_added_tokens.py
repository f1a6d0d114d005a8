"""A chat with an adapter that adds tokens and has a template of them, beside one with the base."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import loradeploy as ld
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.export.vocabularies import BASE, CASES, WORDS, make
from tests.serve.conftest import serving

CHAT: list[Any] = [{"role": "user", "content": "What is new?"}]
NEW = 80  # long enough that requests of one moment meet in a batch
TEMPLATE = (
    "{% for m in messages %}"
    + WORDS[0]
    + "{{ m['role'] }} {{ m['content'] }}{% endfor %}"
    + WORDS[0]
)


def test_chats_with_an_adapters_own_tokens_and_with_the_base_share_a_batch(
    tiny_llama: Path, tmp_path: Path
) -> None:
    make(CASES["trained rows"], tiny_llama, tmp_path / "tools")
    (tmp_path / "tools" / "chat_template.jinja").write_text(TEMPLATE)
    ld.export(tiny_llama, tmp_path / "bundle", adapters={"tools": tmp_path / "tools"})
    with serving(tmp_path / "bundle") as running:
        session = running.service.session
        names = ["tools", None] * 4
        prompts: Any = {
            name: session.texts.of(name).tokenizer.encode_chat(CHAT) for name in ("tools", None)
        }
        assert prompts["tools"].count(BASE) == 2 and max(prompts[None]) < BASE

        def ask(name: str | None) -> Any:
            return running.client().chat.completions.create(
                model=name or "bundle", messages=CHAT, temperature=0, max_completion_tokens=NEW
            )

        ask(None)  # the client is made
        with ThreadPoolExecutor(len(names)) as threads:
            answers = list(threads.map(ask, names))
        texts = {}
        for name, answer in zip(names, answers, strict=True):
            (expected,) = TextGenerator(session).generate([CHAT], [name], max_new_tokens=NEW)
            assert answer.choices[0].message.content == expected.text
            assert answer.usage.prompt_tokens == len(prompts[name]) == expected.prompt_tokens
            texts[name] = expected.text
        assert texts["tools"] != texts[None], "the adapter does nothing"
        done = running.service.text_engine().stats()
        assert done.steps > done.one_adapter_steps, "no step had rows of both"
