"""Text generation with the official `openai` client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from loradeploy.runtime.tasks.generation import TextGenerator
from loradeploy.serve.grammar import Grammars
from loradeploy.serve.problems import RequestError
from loradeploy.serve.schemas.text import ResponseFormat
from tests.serve.conftest import Running, serving

BASE = "bundle-llama"
PROMPT = "Shares rose"
CHAT: list[Any] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is new?"}]},
]
AS_TEMPLATED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is new?"},
]


def alone(running: Running, prompt: Any, adapter: Any = None, **options: Any) -> Any:
    """Return the library's result for the same request."""
    (answer,) = TextGenerator(running.service.session).generate([prompt], [adapter], **options)
    return answer


def test_a_model_name_is_an_adapter_and_its_text_is_the_librarys(llama: Running) -> None:
    texts = set()
    for model, adapter in ((BASE, None), ("headline", "headline"), ("sport", "sport")):
        answer = llama.client().completions.create(
            model=model, prompt=PROMPT, temperature=0, max_tokens=8
        )
        expected = alone(llama, PROMPT, adapter, max_new_tokens=8)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == expected.prompt_tokens
        assert answer.usage.completion_tokens == expected.completion_tokens
        assert answer.model == model
        texts.add(choice.text)
    assert len(texts) == 3


def test_a_conversation_goes_through_the_chat_template(llama: Running) -> None:
    answer = llama.client().chat.completions.create(
        model="headline", messages=CHAT, temperature=0, max_completion_tokens=8
    )
    expected = alone(llama, AS_TEMPLATED, "headline", max_new_tokens=8)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.total_tokens == expected.prompt_tokens + expected.completion_tokens


def test_a_stream_is_the_whole_text_in_pieces(llama: Running) -> None:
    stream = llama.client().chat.completions.create(
        model="sport",
        messages=CHAT,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    *pieces, last = chunks
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    expected = alone(llama, AS_TEMPLATED, "sport", max_new_tokens=12)
    assert text == expected.text
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in pieces if chunk.choices[0].finish_reason]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == expected.completion_tokens
    assert all(chunk.usage is None for chunk in pieces)
    assert len({chunk.id for chunk in chunks}) == 1

    silent = llama.client().completions.create(
        model="sport", prompt=PROMPT, temperature=0, max_tokens=6, stream=True
    )
    found = list(silent)
    assert all(chunk.choices for chunk in found)  # no usage was requested
    assert (
        "".join(chunk.choices[0].text for chunk in found)
        == alone(llama, PROMPT, "sport", max_new_tokens=6).text
    )


# Parameters of OpenAI's API and the same settings of the library.
SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 1.5, "seed": 7}, {"temperature": 1.5, "seed": 7}),
    ({"seed": 9}, {"temperature": 1.0, "seed": 9}),
    ({"seed": 9, "top_p": 0.5}, {"temperature": 1.0, "seed": 9, "top_p": 0.5}),
    ({"seed": -3}, {"temperature": 1.0, "seed": 2**64 - 3}),
    (
        {"seed": 9, "temperature": 2, "extra_body": {"top_k": 3}},
        {"temperature": 2.0, "seed": 9, "top_k": 3},
    ),
    (
        {"seed": 9, "temperature": 2, "extra_body": {"min_p": 0.3}},
        {"temperature": 2.0, "seed": 9, "min_p": 0.3},
    ),
    ({"temperature": 0, "presence_penalty": 2.0}, {"presence_penalty": 2.0}),
    ({"temperature": 0, "frequency_penalty": -2.0}, {"frequency_penalty": -2.0}),
    (
        {"temperature": 0, "extra_body": {"repetition_penalty": 5.0}},
        {"repetition_penalty": 5.0},
    ),
    ({"temperature": 0, "logit_bias": {"300": 100}}, {"logit_bias": {300: 100.0}}),
    ({"temperature": 0, "max_tokens": 3}, {"max_new_tokens": 3}),
]


@pytest.mark.parametrize(("asked", "meant"), SETTINGS, ids=lambda v: str(v)[:40])
def test_a_setting_has_the_effect_of_the_librarys(
    llama: Running, asked: dict[str, Any], meant: dict[str, Any]
) -> None:
    given = {"max_tokens": 10, **asked}
    answer = llama.client().completions.create(model="headline", prompt=PROMPT, **given)
    meant = {"max_new_tokens": 10, **meant}
    assert answer.choices[0].text == alone(llama, PROMPT, "headline", **meant).text
    if "seed" not in asked:
        plain = alone(llama, PROMPT, "headline", max_new_tokens=10)
        assert answer.choices[0].text != plain.text  # the setting changed something


def test_a_stop_string_ends_a_text_before_it(llama: Running) -> None:
    whole = alone(llama, PROMPT, "headline", max_new_tokens=10).text
    stop = whole[len(whole) // 2 :][:3]
    answer = llama.client().completions.create(
        model="headline", prompt=PROMPT, temperature=0, max_tokens=10, stop=[stop]
    )
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_without_a_seed_texts_differ_and_n_gives_several(llama: Running) -> None:
    answer = llama.client().completions.create(
        model=BASE, prompt=[PROMPT, "The striker"], n=3, max_tokens=8, temperature=2
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len({choice.text for choice in answer.choices[:3]}) > 1
    seeded = llama.client().completions.create(
        model=BASE, prompt=[PROMPT, "The striker"], n=2, max_tokens=8, seed=4, stream=True
    )
    streamed = dict.fromkeys(range(4), "")
    for chunk in seeded:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    session = llama.service.session
    expected = TextGenerator(session).generate(
        [PROMPT, "The striker"], n=2, max_new_tokens=8, seed=4, temperature=1.0
    )
    assert list(streamed.values()) == [one.text for one in expected]


def test_a_repeated_prompt_has_several_texts_unless_there_is_a_seed(
    llama: Running,
) -> None:
    asked: dict[str, Any] = {"model": BASE, "max_tokens": 8, "temperature": 2}

    def texts(prompts: list[str], **more: int) -> set[str]:
        answer = llama.client().completions.create(prompt=prompts, **asked, **more)
        return {choice.text for choice in answer.choices}

    assert len(texts([PROMPT] * 4)) == 4
    assert texts([PROMPT] * 4, seed=5) == texts([PROMPT], seed=5)


def test_log_probabilities_are_the_librarys(llama: Running) -> None:
    expected = alone(llama, AS_TEMPLATED, "sport", max_new_tokens=5, logprobs=3).logprobs
    asked: dict[str, Any] = {"model": "sport", "temperature": 0, "max_tokens": 5}
    chat = llama.client().chat.completions.create(
        messages=CHAT, logprobs=True, top_logprobs=3, **asked
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert [token.token for token in content] == [token.token for token in expected]
    for theirs, ours in zip(content, expected, strict=True):
        assert theirs.logprob == pytest.approx(ours.logprob)
        assert [t.token for t in theirs.top_logprobs] == [t.token for t in ours.top]
        known = None if "\N{REPLACEMENT CHARACTER}" in ours.token else list(ours.token.encode())
        assert theirs.bytes == known

    plain = llama.client().completions.create(prompt=PROMPT, logprobs=2, **asked)
    pieces = list(
        llama.client().completions.create(prompt=PROMPT, logprobs=2, stream=True, **asked)
    )
    logprobs = plain.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None
    assert logprobs.text_offset == [
        len("".join(logprobs.tokens[:number])) for number in range(len(logprobs.tokens))
    ]
    found = [piece.choices[0].logprobs for piece in pieces]
    assert [t for part in found if part for t in part.tokens or ()] == logprobs.tokens
    assert [t for part in found if part for t in part.text_offset or ()] == logprobs.text_offset


def test_a_blend_of_adapters_is_an_extension(llama: Running) -> None:
    blend = {"headline": 0.5, "sport": 0.9}
    answer = llama.client().completions.create(
        model=BASE, prompt=PROMPT, temperature=0, max_tokens=8, extra_body={"adapters": blend}
    )
    assert answer.choices[0].text == alone(llama, PROMPT, blend, max_new_tokens=8).text
    others = {alone(llama, PROMPT, name, max_new_tokens=8).text for name in (None, *blend)}
    assert answer.choices[0].text not in others


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema_is_followed(llama: Running, stream: bool) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}, "good": {"type": "boolean"}},
        "required": ["n", "good"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer: Any = llama.client().chat.completions.create(
        model="headline", messages=CHAT, max_tokens=40, response_format=form, stream=stream
    )
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
    value = json.loads(text)
    assert value["n"] in (1, 22)
    assert isinstance(value["good"], bool)


def test_every_end_token_can_end_a_json_text(
    llama: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    form = ResponseFormat(type="json_object")
    tokenizer = llama.service.session.texts.of(None).tokenizer
    first, other = 2, 300
    whole, begun = tokenizer.encode("{}"), tokenizer.encode("{")
    for ends in ({first}, {first, other}):
        monkeypatch.setattr(tokenizer, "eos_ids", frozenset(ends))
        allowed = Grammars(llama.service.session).allowed(form, None)
        assert allowed is not None
        masks = [allowed(tuple(tokens)) for tokens in (begun, whole)]
        assert [set(np.flatnonzero(mask)) & {first, other} for mask in masks] == [set(), ends]
    monkeypatch.setattr(tokenizer, "eos_ids", frozenset())
    with pytest.raises(RequestError, match="no token of this model ends a text") as refused:
        Grammars(llama.service.session).allowed(form, None)
    assert refused.value.status == 400


# By case: fields of the body and the field that the refusal names.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "unknown": ({"beam_width": 3}, "beam_width"),
    "echo": ({"echo": True}, "echo"),
    "best_of": ({"best_of": 3}, "best_of"),
    "store": ({"store": True}, "store"),
    "temperature": ({"temperature": -1}, "temperature"),
    "type": ({"max_tokens": "5"}, "max_tokens"),
    "tokens": ({"max_tokens": 65}, "max_tokens"),
    "n": ({"n": 9}, "n"),
    "n greedy": ({"n": 2, "temperature": 0}, "n"),
    "prompts": ({"prompt": []}, "prompt"),
    "stop": ({"stop": ""}, "stop"),
    "complex": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "x",
                    "schema": {"type": "string", "pattern": "^(a{1000}){1000}$"},
                },
            }
        },
        "response_format",
    ),
    "options": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "inner": ({"stream": True, "stream_options": {"chunks": 3}}, "stream_options.chunks"),
    "bias": ({"logit_bias": {"the": 3}}, "logit_bias"),
    "bias twice": ({"logit_bias": {"7": 3, "07": -3}}, "logit_bias"),
    "blend": ({"model": "sport", "adapters": {"headline": 1}}, "adapters"),
    "member": ({"adapters": {"nobody": 1.0}}, "adapters"),
    "empty": ({"adapters": {}}, "adapters"),
    "schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nothing"}},
            }
        },
        "response_format",
    ),
}


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/v1/completions", '{"model": "x", "prompt": "a", "model": "y"}', "two values of 'model'"),
        ("/v1/completions", '{"logit_bias": {"5": 1, "5": 2}}', "two values of '5'"),
        ("/v1/chat/completions", '{"messages": [], "messages": [1]}', "two values of 'messages'"),
        ("/v1/embeddings", '{"input": "a", "input": "b"}', "two values of 'input'"),
        ("/v2/models/x/infer", '{"inputs": [], "inputs": [1]}', "two values of 'inputs'"),
        ("/v1/completions", '{"model": ', "the body is not JSON: Expecting value"),
    ],
)
def test_a_body_of_two_meanings_or_of_none_is_refused(
    path: str, body: str, reason: str, llama: Running
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = llama.http().post(path, content=body, headers=headers)
    assert answer.status_code == 400
    assert "the body is not JSON: " in answer.text
    assert reason in answer.text


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_fields_that_would_change_the_text_are_refused_by_name(
    llama: Running, name: str
) -> None:
    body, param = REFUSED[name]
    http = llama.http()
    answer = http.post("/v1/completions", json={"model": BASE, "prompt": PROMPT, **body})
    error = answer.json()["error"]
    assert answer.status_code in (400, 404), error
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert param in error["message"] or answer.status_code == 404
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("prompt", [{}, 5, [True], [-1], [5.0], ["a", [5]], [[5], "a"]], ids=str)
def test_a_prompt_of_another_type_is_refused_with_all_types_that_it_can_have(
    llama: Running, prompt: object
) -> None:
    answer = llama.http().post("/v1/completions", json={"model": BASE, "prompt": prompt})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "prompt")
    assert error["message"].startswith("prompt: give a text, token ids")


def test_a_field_that_is_null_or_has_no_effect_is_accepted(llama: Running) -> None:
    given = {"tools": None, "stop": None, "user": "u", "metadata": {"a": "b"}, "store": False}
    body = {"model": BASE, "prompt": PROMPT, "temperature": 0, "max_tokens": 4, **given}
    http = llama.http()
    answer = http.post("/v1/completions", json=body)
    assert answer.json()["choices"][0]["text"] == alone(llama, PROMPT, max_new_tokens=4).text


def test_the_client_raises_the_same_errors_as_with_openai(llama: Running) -> None:
    client = llama.client()
    with pytest.raises(openai.NotFoundError, match="'nobody' does not exist"):
        client.completions.create(model="nobody", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="prompt 1 has .* tokens") as refused:
        client.completions.create(model=BASE, prompt=PROMPT * 100, stream=True)
    assert refused.value.status_code == 400  # before the stream started
    with pytest.raises(openai.NotFoundError, match="it gives no embeddings"):
        client.embeddings.create(model=BASE, input="x")


def test_models_are_listed_with_their_parent_and_digest(llama: Running) -> None:
    models = {model.id: model.to_dict() for model in llama.client().models.list()}
    assert set(models) == {BASE, "headline", "sport"}
    assert models[BASE]["parent"] is None
    assert models["headline"]["parent"] == BASE
    assert models["headline"]["digest"] == llama.service.session.adapters["headline"]
    assert models[BASE]["digest"] == llama.service.session.manifest.base.digest
    assert llama.client().models.retrieve("sport").id == "sport"
    with pytest.raises(openai.NotFoundError):
        llama.client().models.retrieve("nobody")


def test_metrics_are_counted(llama: Running) -> None:
    http = llama.http()

    def figures() -> dict[str, float]:
        lines = http.get("/metrics").text.splitlines()
        rows = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in rows}

    before = figures()
    body = {"model": "headline", "prompt": "a secret", "max_tokens": 5, "temperature": 0}
    usage = http.post("/v1/completions", json=body).json()["usage"]
    after = figures()
    text = http.get("/metrics").text
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    prefix = "loradeploy:"
    assert grown[f"{prefix}prompt_tokens_total"] == usage["prompt_tokens"]
    assert grown[f"{prefix}generation_tokens_total"] == usage["completion_tokens"]
    assert grown[f"{prefix}time_to_first_token_seconds_count"] == 1
    assert grown[f"{prefix}inter_token_latency_seconds_count"] == usage["completion_tokens"] - 1
    assert grown[f"{prefix}batch_size_count"] >= usage["completion_tokens"] - 1
    assert grown[f"{prefix}adapter_cache_hits_total"] >= 1
    assert grown[f'{prefix}http_responses_total{{status="200"}}'] >= 1
    assert after[f"{prefix}num_requests_running"] == 0
    assert {"adapter_cache_misses_total", "adapter_cache_evictions_total"} <= {
        name.removeprefix(prefix) for name in after
    }
    assert "secret" not in text


def test_the_service_reports_that_it_is_healthy(llama: Running) -> None:
    assert httpx.get(f"{llama.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{llama.url}/ready").json() == {"status": "ready"}


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/metrics", "/", "/nothing"])
def test_head_is_answered_like_get_without_a_body(llama: Running, path: str) -> None:
    asked, headed = httpx.get(f"{llama.url}{path}"), httpx.head(f"{llama.url}{path}")
    assert (headed.status_code, headed.content) == (asked.status_code, b"")
    assert headed.headers["content-type"] == asked.headers["content-type"]
    assert httpx.head(f"{llama.url}/v1/completions").status_code == 405


def test_a_service_with_a_failed_engine_reports_it(
    tiny_llama_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_llama_bundle) as running:
        http = running.http()

        def defect() -> Any:
            raise RuntimeError("a defect")

        monkeypatch.setattr(running.service.engine._worker, "advance", defect)
        body = {"model": BASE, "prompt": PROMPT, "max_tokens": 2}
        assert http.post("/v1/completions", json=body).status_code == 500
        for answer in (
            http.post("/v1/completions", json=body),
            http.get("/ready"),
            http.get("/health"),
        ):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_failed"
