"""Chats with an adapter that adds tokens and a template that uses them, beside the base."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

import loradeploy as ld
from loradeploy.adapter.files.peft import load_adapter
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.export.adapters.vocabularies import BASE, CASES, WORDS, make
from tests.serve.conftest import serving

CHAT: list[Any] = [{"role": "user", "content": "What is new?"}]
NEW = 80  # long enough that concurrent requests share a batch
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

        ask(None)  # creates the client
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


def test_an_adapter_with_its_own_embeddings_is_served_by_the_digest_of_its_files(
    tiny_llama: Path, tmp_path: Path
) -> None:
    made, root = tmp_path / "made", tmp_path / "root"
    make(CASES["embeddings saved"], tiny_llama, made)
    manifest = ld.export(tiny_llama, tmp_path / "bundle", adapters={"tools": made})
    digest, own = load_adapter(made).digest, manifest.adapters["tools"].digest
    assert digest != own, "the bundle's has rows in place of the tables"
    names = [each.removeprefix("sha256:") for each in (digest, own)]
    other = "0" * 64
    for name in (*names, other):
        shutil.copytree(made, root / name)
    with serving(tmp_path / "bundle", root=root) as running:

        def ask(name: str) -> Any:
            answer = running.client().chat.completions.create(
                model=name, messages=CHAT, temperature=0, max_completion_tokens=8
            )
            return answer.choices[0].message.content

        expected = ask("tools")
        assert ask("bundle") != expected, "the adapter does nothing"
        assert [ask(name) for name in names] == [expected] * 2
        with pytest.raises(openai.InternalServerError, match="could not be loaded"):
            ask(other)
        assert other not in running.service.session.adapters
