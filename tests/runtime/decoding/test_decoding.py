"""Generation settings: each has the same effect as in transformers' generate."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.errors import UsageError
from loradeploy.runtime.held import HeldAdapters
from loradeploy.runtime.tasks.generation import Generation, TextGenerator
from loradeploy.runtime.tasks.streaming import TextPiece
from tests.runtime.decoding.conftest import PROMPTS
from tests.tolerances import tolerance

ADAPTERS = ["large", None, "small"]
NEW = 12
END = 2
Reference = Callable[..., Any]


@pytest.fixture(params=["grows", "in place"])
def generator(request: pytest.FixtureRequest, generators: dict[str, TextGenerator]) -> Any:
    return generators[request.param]


@pytest.fixture(scope="module")
def transformers(tiny_llama: Path, llama_adapters: dict[str, Path]) -> Reference:
    """transformers' generate on the tiny Llama: (adapter, prompt ids, **settings) → output."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(tiny_llama)

    @cache
    def net(adapter: str | None) -> Any:
        base = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
        if adapter is None:
            return base
        return peft.PeftModel.from_pretrained(base, llama_adapters[adapter]).eval()

    def generate(adapter: str | None, prompt: list[int], **settings: Any) -> Any:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            if not settings:
                return net(adapter)(input_ids=ids).logits[0]
            return net(adapter).generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW,
                return_dict_in_generate=True,
                output_scores=True,
                output_logits=True,
                tokenizer=words if "stop_strings" in settings else None,
                **settings,
            )

    return generate


def letters(generator: TextGenerator) -> np.ndarray:
    """Return a mask of the tokens that consist of letters."""
    mask = np.zeros(512, np.bool_)
    for word, index in generator.tokenizer.vocabulary.items():
        mask[index] = word.isascii() and word.isalpha()
    return mask


def generated(output: Any, prompt: list[int]) -> list[list[int]]:
    """Return transformers' tokens after the prompt, up to and including the end token."""
    rows = output.sequences[:, len(prompt) :].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


def whole(result: Generation) -> list[int]:
    """Return the tokens of a result, including the end token."""
    ended = [] if not isinstance(result.stop_reason, int) else [result.stop_reason]
    return [*result.token_ids, *ended]


LONG = {"length_penalty": 2.0, "early_stopping": "never"}
SHORT = {"length_penalty": -1.0, "early_stopping": True}
# By name: the settings of loradeploy and those of transformers.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bias": (
        {"logit_bias": {69: -9.0, 300: 6.5}},
        {"sequence_bias": {(69,): -9.0, (300,): 6.5}},
    ),
    "repetition": ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
    "ngrams": ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}),
    "both": (
        {"logit_bias": {300: 9.0}, "repetition_penalty": 2.5},
        {"sequence_bias": {(300,): 9.0}, "repetition_penalty": 2.5},
    ),
    "mask": (
        {"allowed_tokens": lambda made: np.arange(512) % (len(made) + 2) == 1},
        {"prefix_allowed_tokens_fn": "every"},
    ),
    "beams": ({"num_beams": 4, "n": 3}, {"num_beams": 4, "num_return_sequences": 3}),
    "beams, long": (
        {"num_beams": 3, "n": 3, **LONG},
        {"num_beams": 3, "num_return_sequences": 3, **LONG},
    ),
    "beams, short": (
        {"num_beams": 3, "n": 2, **SHORT},
        {"num_beams": 3, "num_return_sequences": 2, **SHORT},
    ),
    "beams, changed": (
        {"num_beams": 2, "repetition_penalty": 1.7, "logit_bias": {END: 8.0}},
        {"num_beams": 2, "repetition_penalty": 1.7, "sequence_bias": {(END,): 8.0}},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_and_scores_are_those_of_transformers_in_a_mixed_batch(
    generator: TextGenerator, transformers: Reference, name: str
) -> None:
    ours, theirs = SETTINGS[name]
    free = generator.generate(PROMPTS, ADAPTERS, max_new_tokens=NEW)
    results = generator.generate(PROMPTS, ADAPTERS, max_new_tokens=NEW, **ours)
    n = ours.get("n", 1)
    assert len(results) == n * len(PROMPTS)
    assert [r.token_ids for r in results[::n]] != [r.token_ids for r in free]  # has an effect
    for row, (prompt, adapter) in enumerate(zip(PROMPTS, ADAPTERS, strict=True)):
        ids = generator.tokenizer.encode(prompt)
        settings = dict(theirs)
        if "prefix_allowed_tokens_fn" in settings:
            start = len(ids)
            settings["prefix_allowed_tokens_fn"] = lambda _, seen, start=start: [
                token for token in range(512) if token % (len(seen) - start + 2) == 1
            ]
        expected = transformers(adapter, ids, **settings)
        own = results[row * n : (row + 1) * n]
        assert [whole(result) for result in own] == generated(expected, ids)
        assert [result.choice for result in own] == list(range(n))
        if "num_beams" in ours:
            # Per token: a length penalty below 0 multiplies the accumulated rounding error.
            lengths = [r.completion_tokens ** (ours.get("length_penalty", 1.0) - 1) for r in own]
            scores = np.array([result.score for result in own]) * lengths
            np.testing.assert_allclose(
                scores,
                expected.sequences_scores.numpy() * lengths,
                atol=tolerance("torch-onnx-tiny"),
            )


# -- where a text ends -------------------------------------------------------------------------


def across_tokens(generator: TextGenerator, result: Generation) -> str:
    """Return three letters of a text that span two tokens."""
    words = [generator.tokenizer.decode([token]) for token in result.token_ids]
    for at in range(4, len(words) - 1):
        if len(words[at]) >= 2 and len(words[at + 1]) >= 1:
            stop = words[at][-1] + words[at + 1]
            if result.text.index(stop) == len("".join(words[:at])) + len(words[at]) - 1:
                return stop
    raise AssertionError(words)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_stop_string_across_tokens_ends_a_text_as_in_transformers(
    generators: dict[str, TextGenerator], transformers: Reference, beams: int
) -> None:
    generator = generators["grows"]
    mask = letters(generator)
    options: dict[str, Any] = {"allowed_tokens": lambda made: mask, "max_new_tokens": NEW}
    prompt, other = PROMPTS[0], PROMPTS[2]
    free, beside = generator.generate([prompt, other], ["large", None], **options)
    stop = across_tokens(generator, free)
    if beams > 1:
        options["num_beams"] = beams
    got, unstopped = generator.generate(
        [prompt, other], ["large", None], per_prompt=[{"stop": ["no such", stop]}, None], **options
    )
    ids = generator.tokenizer.encode(prompt)
    expected = transformers(
        "large",
        ids,
        stop_strings=[stop, "no such"],
        num_beams=beams,
        prefix_allowed_tokens_fn=lambda *_: np.flatnonzero(mask).tolist(),
    )
    assert whole(got) == generated(expected, ids)[0]
    assert stop not in got.text
    if beams == 1:
        assert (got.finish_reason, got.stop_reason) == ("stop", stop)
        assert got.text == free.text[: free.text.index(stop)]
        assert got.completion_tokens == len(got.token_ids) < NEW
        assert unstopped == beside


def test_a_stream_emits_no_part_of_a_stop_string(
    generators: dict[str, TextGenerator],
) -> None:
    generator = generators["grows"]
    mask = letters(generator)
    options: dict[str, Any] = {"allowed_tokens": lambda made: mask, "max_new_tokens": NEW}
    (free,) = generator.generate(PROMPTS[:1], **options)
    for start in range(len(free.text) - 4):
        stop = free.text[start : start + 4]
        pieces = list(generator.stream(PROMPTS[:1], stop=[stop, stop[:3] + "?"], **options))
        text = "".join(piece.text for piece in pieces)
        last = pieces[-1].result
        assert last is not None and last.text == text == free.text[: free.text.index(stop)]


def test_the_first_of_several_stop_strings_counts(generators: dict[str, TextGenerator]) -> None:
    generator = generators["grows"]
    (free,) = generator.generate(PROMPTS[:1], max_new_tokens=NEW)
    one, other = free.text[2], free.text[1:3]
    (got,) = generator.generate(PROMPTS[:1], max_new_tokens=NEW, stop=[one, other])
    assert (got.text, got.stop_reason) == (free.text[:1], other)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_special_token_as_a_stop_string_ends_a_text_as_in_transformers(
    generators: dict[str, TextGenerator], transformers: Reference, beams: int
) -> None:
    """It has no text in which it could be found."""
    generator, prompt = generators["grows"], PROMPTS[0]
    special = "<|im_start|>"
    token = generator.tokenizer.vocabulary[special]
    options: dict[str, Any] = {"max_new_tokens": NEW, "logit_bias": {token: 6.0}}
    if beams > 1:
        options["num_beams"] = beams
    (free,) = generator.generate(prompt, "large", **options)
    (got,) = generator.generate(prompt, "large", stop=["no such", special], **options)
    ids = generator.tokenizer.encode(prompt)
    expected = transformers(
        "large",
        ids,
        stop_strings=[special, "no such"],
        num_beams=beams,
        sequence_bias={(token,): 6.0},
    )
    assert whole(got) == generated(expected, ids)[0]
    assert whole(got) != whole(free)
    assert (got.finish_reason, got.stop_reason) == ("stop", special)
    assert got.token_ids[-1] == token
    assert got.completion_tokens == len(got.token_ids)
    assert got.text == generator.tokenizer.decode(got.token_ids)


def test_beams_use_the_parameters_in_generation_config(
    generators: dict[str, TextGenerator], llama_adapters: dict[str, Path], tmp_path: Path
) -> None:
    generator, own = generators["grows"], {"length_penalty": 2.0, "early_stopping": True}
    shutil.copytree(llama_adapters["large"], tmp_path / "long")
    (tmp_path / "long/generation_config.json").write_text(json.dumps(own))
    generator.session.load("long", tmp_path / "long")
    beams: dict[str, Any] = {"num_beams": 3, "n": 3, "logit_bias": {END: 4.0}}

    def scores(adapter: str, **settings: Any) -> list[float | None]:
        made = generator.generate(PROMPTS[2], adapter, **beams, **settings)
        return [result.score for result in made]

    try:
        assert scores("long") == scores("large", **own) != scores("large")
        given = {"length_penalty": 1.0, "early_stopping": False}
        assert scores("long", **given) == scores("large")
    finally:
        generator.session.unload("long")


# -- samples -----------------------------------------------------------------------------------


def test_samples_depend_on_their_seed_and_not_on_the_rest_of_the_batch(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: dict[str, Any] = {"temperature": 0.9, "min_p": 0.02, "max_new_tokens": NEW}
    shapes = []
    run = HeldAdapters.run_with_ort_values

    def recorded(self: HeldAdapters, names: Any, feeds: Any, **options: Any) -> Any:
        shapes.append(feeds["input_ids"].shape)
        return run(self, names, feeds, **options)

    monkeypatch.setattr(HeldAdapters, "run_with_ort_values", recorded)
    several = generator.generate(PROMPTS, ADAPTERS, seed=[5, 6, 7], n=3, **sampled)
    assert [rows for rows, _ in shapes[:2]] == [3, 9]  # each prompt is processed once
    assert len({result.token_ids for result in several}) == 9
    single = generator.generate(PROMPTS, ADAPTERS, seed=[5, 6, 7], **sampled)
    assert [result.token_ids for result in several[::3]] == [r.token_ids for r in single]
    alone = generator.generate(PROMPTS[2:], "small", seed=7, n=3, **sampled)
    assert alone == several[6:]
    mixed = generator.generate(
        PROMPTS,
        ADAPTERS,
        max_new_tokens=NEW,
        per_prompt=[{"num_beams": 2}, None, {"seed": 7, "n": 3, "temperature": 0.9, "min_p": 0.02}],
    )
    assert mixed[2:] == several[6:]
    assert mixed[0].score is not None
    assert mixed[1] == generator.generate(PROMPTS[1:2], max_new_tokens=NEW)[0]


def test_rows_that_have_ended_leave_the_batch(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, names = PROMPTS * 2, [*ADAPTERS, None, "large", None]
    lengths = [3, 9, 1, 2, 3, 1]
    expected = generator.generate(prompts, names, max_new_tokens=9)
    rows = []
    run = HeldAdapters.run_with_ort_values

    def recorded(self: HeldAdapters, names: Any, feeds: Any, **options: Any) -> Any:
        rows.append(len(feeds["input_ids"]))
        return run(self, names, feeds, **options)

    monkeypatch.setattr(HeldAdapters, "run_with_ort_values", recorded)
    own = [{"max_new_tokens": length} for length in lengths]
    results = generator.generate(prompts, names, per_prompt=own)
    for result, length, free in zip(results, lengths, expected, strict=True):
        assert result.token_ids == free.token_ids[:length]
    assert rows == [6, 6, 3, 1, 1, 1, 1, 1, 1]


def test_presence_and_frequency_penalties_are_those_of_vllm(
    generators: dict[str, TextGenerator],
) -> None:
    generator = generators["grows"]
    few = np.isin(np.arange(512), [60, 61, 62, 63, 64])
    options: dict[str, Any] = {"allowed_tokens": lambda made: few, "max_new_tokens": NEW}
    penalties = {"presence_penalty": 0.75, "frequency_penalty": 0.5}
    (result,) = generator.generate(PROMPTS[:1], "large", **options, **penalties)
    ids = generator.tokenizer.encode(PROMPTS[0])
    made: list[int] = []
    for _ in range(NEW):
        (score,) = generator.score([[*ids, *made, 0]], "large", logprobs=512)
        logits = np.full(512, -np.inf)
        for entry in score.logprobs[-1].top:
            logits[entry.token_id] = entry.logprob if few[entry.token_id] else -np.inf
        counts = np.bincount(np.array(made, np.int64), minlength=512)
        made.append(int((logits - 0.5 * counts - 0.75 * (counts > 0)).argmax()))
    assert list(result.token_ids) == made
    (free,) = generator.generate(PROMPTS[:1], "large", **options)
    assert free.token_ids != result.token_ids


def test_a_logit_bias_can_name_a_token_by_its_text(generators: dict[str, TextGenerator]) -> None:
    generator = generators["grows"]
    (token,) = generator.tokenizer.encode("so")
    named, numbered = (generator.generate(PROMPTS, logit_bias={key: 9.0}) for key in ("so", token))
    assert named == numbered != generator.generate(PROMPTS)
    with pytest.raises(UsageError, match=r"'so so so', which is \d tokens \[.*\], expected 1"):
        generator.generate(PROMPTS, logit_bias={"so so so": 9.0})


# -- log-probabilities -------------------------------------------------------------------------


def test_logprobs_are_those_of_the_model_before_settings_apply(
    generator: TextGenerator, transformers: Reference
) -> None:
    import torch

    results = generator.generate(
        PROMPTS, ADAPTERS, max_new_tokens=NEW, repetition_penalty=1.7, logprobs=3
    )
    for prompt, adapter, result in zip(PROMPTS, ADAPTERS, results, strict=True):
        ids = generator.tokenizer.encode(prompt)
        output = transformers(adapter, ids, repetition_penalty=1.7)
        assert result.logprobs is not None and len(result.logprobs) == len(result.token_ids)
        for entry, logits in zip(result.logprobs, output.logits, strict=False):
            expected = torch.log_softmax(logits[0], -1)
            top = torch.topk(expected, 3)
            assert [one.token_id for one in entry.top] == top.indices.tolist()
            given = [entry.logprob, *(one.logprob for one in entry.top)]
            wanted = [float(expected[entry.token_id]), *top.values.tolist()]
            np.testing.assert_allclose(given, wanted, atol=tolerance("torch-onnx-tiny"))


def test_a_text_is_scored_by_the_model_with_its_adapter(
    generator: TextGenerator, transformers: Reference
) -> None:
    import torch

    texts = [PROMPTS[2], "It is so", PROMPTS[0]]
    scores = generator.score(texts, ADAPTERS)
    for text, adapter, score in zip(texts, ADAPTERS, scores, strict=True):
        ids = generator.tokenizer.encode(text)
        logprobs = torch.log_softmax(transformers(adapter, ids), -1)
        expected = [float(logprobs[at, token]) for at, token in enumerate(ids[1:])]
        assert score.token_ids == tuple(ids)
        given = [entry.logprob for entry in score.logprobs]
        np.testing.assert_allclose(given, expected, atol=tolerance("torch-onnx-tiny"))
        assert score.perplexity == pytest.approx(np.exp(-np.mean(expected)), rel=1e-4)
    others = generator.score(texts, [None, "small", "large"], batch_size=2)
    for one, other in zip(scores, others, strict=True):
        # Another adapter would be detected.
        assert abs(one.logprob - other.logprob) > 100 * tolerance("torch-onnx-tiny")
    (best,) = generator.score(texts[0], "large", logprobs=2)
    assert best.logprob == pytest.approx(scores[0].logprob, abs=tolerance("rows"))
    assert all(len(entry.top) == 2 for entry in best.logprobs)


# -- streams -----------------------------------------------------------------------------------


def test_an_asynchronous_stream_equals_generate(generator: TextGenerator) -> None:
    expected = generator.generate(PROMPTS, ADAPTERS, max_new_tokens=NEW)

    async def collect() -> list[TextPiece]:
        stream = generator.astream(PROMPTS, ADAPTERS, max_new_tokens=NEW)
        return [piece async for piece in stream]

    pieces = asyncio.run(collect())
    results = {piece.row: piece.result for piece in pieces if piece.result is not None}
    assert [results[row] for row in range(3)] == expected
    for row, result in enumerate(expected):
        assert "".join(piece.text for piece in pieces if piece.row == row) == result.text


def test_a_cancelled_row_ends_and_the_others_are_not_changed(
    generator: TextGenerator,
) -> None:
    expected = generator.generate(PROMPTS, ADAPTERS, max_new_tokens=NEW)
    results = {}
    with generator.stream(PROMPTS, ADAPTERS, max_new_tokens=NEW) as stream:
        for count, piece in enumerate(stream):
            if count == 6:
                stream.cancel(0)
            if piece.result is not None:
                results[piece.row] = piece.result
    assert results[0].finish_reason == "cancelled"
    assert 0 < len(results[0].token_ids) < NEW
    assert results[0].token_ids == expected[0].token_ids[: len(results[0].token_ids)]
    assert [results[1], results[2]] == expected[1:]


@pytest.mark.parametrize("how", ["break", "cancel", "aclose"])
def test_an_abandoned_stream_releases_its_adapter(
    generators: dict[str, TextGenerator], llama_adapters: dict[str, Path], how: str
) -> None:
    session = generators["grows"].session
    session.load("brief", llama_adapters["large"])
    begun = asyncio.Event()

    async def consume() -> None:
        stream = generators["grows"].astream("A", "brief", max_new_tokens=100)
        async for _ in stream:
            begun.set()
            if how == "break":
                return
            if how == "aclose":
                await stream.aclose()

    async def check() -> None:
        task = asyncio.create_task(consume())
        await begun.wait()
        if how == "cancel":
            task.cancel()
        await asyncio.wait([task])
        # Waits for the generation that uses the adapter, which must end before its 100 tokens.
        await asyncio.to_thread(session.unload, "brief")

    asyncio.run(check())
    assert "brief" not in session.adapters


def test_an_error_in_the_thread_reaches_the_loop(generators: dict[str, TextGenerator]) -> None:
    async def collect() -> None:
        async for _ in generators["grows"].astream(["A", ""]):
            pass

    with pytest.raises(UsageError, match="prompt 2 is empty"):
        asyncio.run(collect())
