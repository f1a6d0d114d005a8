"""Text generation: equal to that of transformers, and independent of the batch."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.errors import UnknownAdapterError, UsageError
from loradeploy.runtime.cache import DecoderCache
from loradeploy.runtime.decoding.choosing.sampling import Sampling
from loradeploy.runtime.memory import worked
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import Generation, TextGenerator

PROMPTS = ["The government said", "A", "Shares in the company fell after the bank reported that"]
SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}


@pytest.fixture
def generator(llama_session: AdapterSession) -> TextGenerator:
    return TextGenerator(llama_session)


def _transformers(
    model: Path, adapter: Path | None, prompt: list[int], new: int, **options: Any
) -> list[int]:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model).eval()
    if adapter is not None:
        net = peft.PeftModel.from_pretrained(net, adapter).eval()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = net.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            **options,
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("name", [None, "small", "large"])
def test_greedy_tokens_are_those_of_transformers(
    generator: TextGenerator,
    tiny_llama: Path,
    llama_adapters: dict[str, Path],
    name: str | None,
) -> None:
    results = generator.generate(PROMPTS, name, max_new_tokens=24)
    adapter = None if name is None else llama_adapters[name]
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids = generator.tokenizer.encode(prompt)
        expected = _transformers(tiny_llama, adapter, ids, 24)
        ended = [*result.token_ids, 2] if result.finish_reason == "stop" else [*result.token_ids]
        assert ended == expected
        assert result.prompt_tokens == len(ids)


def test_gpt2_with_learned_positions_generates_the_same_as_transformers(
    tiny_gpt2: Path, tiny_gpt2_bundle: Path
) -> None:
    generator = TextGenerator(AdapterSession(tiny_gpt2_bundle))
    for prompt, result in zip(PROMPTS, generator.generate(PROMPTS), strict=True):
        expected = _transformers(tiny_gpt2, None, generator.tokenizer.encode(prompt), 32)
        assert [*result.token_ids] == [token for token in expected if token != 2]


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_text_of_a_row_does_not_depend_on_the_batch(
    generator: TextGenerator, options: dict[str, Any]
) -> None:
    adapters = ["large", None, "small"]
    together = generator.generate(PROMPTS, adapters, seed=5, **options)
    turned = generator.generate(PROMPTS[::-1], adapters[::-1], seed=5, **options)[::-1]
    alone = [
        generator.generate([prompt], [adapter], seed=5, **options)[0]
        for prompt, adapter in zip(PROMPTS, adapters, strict=True)
    ]
    paired = generator.generate(PROMPTS, adapters, seed=5, batch_size=2, **options)
    assert together == turned == alone == paired


def test_the_adapter_changes_the_text(generator: TextGenerator) -> None:
    results = generator.generate([PROMPTS[0]] * 3, [None, "small", "large"])
    assert len({result.text for result in results}) == 3
    assert [result.adapter for result in results] == [None, "small", "large"]


def test_a_seed_gives_the_same_text_again_and_another_seed_another_text(
    generator: TextGenerator,
) -> None:
    def texts(seed: int | list[int]) -> list[str]:
        return [r.text for r in generator.generate(PROMPTS[:2], seed=seed, **SAMPLED)]

    assert texts(1) == texts(1) == texts([1, 1])
    assert texts(1) != texts(2)
    assert texts([1, 2]) == [texts(1)[0], texts(2)[1]]


# -- endings -----------------------------------------------------------------------------------


def _ending_at(bundle: Path, place: Path, ends: list[int]) -> TextGenerator:
    copy = shutil.copytree(bundle, place)
    config = copy / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": ends}))
    return TextGenerator(AdapterSession(copy))


def test_each_row_ends_at_its_own_end_token(
    generator: TextGenerator, tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    free = generator.generate(PROMPTS, max_new_tokens=20)
    # One token of each unrestricted text becomes an end token: other rows must not change.
    ends = [free[0].token_ids[3], free[2].token_ids[9]]
    ended = _ending_at(tiny_llama_bundle, tmp_path / "b", ends).generate(PROMPTS, max_new_tokens=20)
    for before, after in zip(free, ended, strict=True):
        cut = next((i for i, t in enumerate(before.token_ids) if t in ends), None)
        assert after.token_ids == before.token_ids[:cut]
        assert after.finish_reason == ("length" if cut is None else "stop")
    assert {result.finish_reason for result in ended} >= {"stop"}


def test_an_end_token_at_the_start_gives_an_empty_text(
    generator: TextGenerator, tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    (first,) = generator.generate(PROMPTS[:1], max_new_tokens=1)
    end = first.token_ids[0]
    (result,) = _ending_at(tiny_llama_bundle, tmp_path / "b", [end]).generate(PROMPTS[:1])
    assert result == Generation(
        "", (), "stop", None, first.prompt_tokens, completion_tokens=1, stop_reason=end
    )


def test_a_row_can_use_all_positions_beside_a_longer_one(generator: TextGenerator) -> None:
    long, short = [7] * 125, [7] * 3  # the model has 128 positions
    results = generator.generate([long, short], max_new_tokens=20)
    assert [len(result.token_ids) for result in results] == [3, 20]
    assert results[1] == generator.generate([short], max_new_tokens=20)[0]


# -- prompts -----------------------------------------------------------------------------------


def test_a_prompt_can_be_text_tokens_or_a_conversation(generator: TextGenerator) -> None:
    text = PROMPTS[0]
    ids = generator.tokenizer.encode(text)
    assert generator.generate([ids]) == generator.generate([text]) == generator.generate(text)
    messages = [{"role": "user", "content": text}]
    rendered = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    chats = generator.generate([messages])
    assert chats == generator.generate([text], chat=True) == generator.generate([rendered])


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        (["fine", ""], {}, "prompt 2 is empty"),
        ([""], {"chat": True}, "prompt 1 is empty"),
        ([[]], {}, "prompt 1 is empty"),
        ([[7] * 128], {}, "prompt 1 has 128 tokens, the model has 128 positions"),
        (["x"], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (["x"], {"batch_size": 0}, "batch_size is 0"),
        (["x"], {"adapters": ["small", None]}, "2 adapters for a batch of 1 rows"),
        (["x"], {"seed": [1, 2]}, "2 seeds for 1 prompts"),
        (["x"], {"temperature": -1}, "temperature is -1"),
        (["x"], {"temperature": float("nan")}, "temperature is nan"),
        (["x"], {"temperature": 1, "top_p": 0}, "top_p is 0"),
        (["x"], {"temperature": 1, "top_k": -1}, "top_k is -1"),
        (["x"], {"top_k": 5}, "no effect at temperature 0"),
    ],
)
def test_invalid_prompts_and_options_are_refused(
    generator: TextGenerator, prompts: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        generator.generate(prompts, **options)


def test_an_unknown_adapter_is_refused(generator: TextGenerator) -> None:
    with pytest.raises(UnknownAdapterError, match="ghost"):
        generator.generate(["x"], "ghost")


def test_a_classifier_generates_no_text(tiny_bert_bundle: Path) -> None:
    with pytest.raises(UsageError, match="generates no text"):
        TextGenerator(AdapterSession(tiny_bert_bundle))


# -- streaming and the lifetime of adapters ----------------------------------------------------


def test_streamed_pieces_are_the_text_of_their_row(generator: TextGenerator) -> None:
    message: dict[int, list[str]] = {0: [], 1: [], 2: []}
    results = generator.generate(
        PROMPTS,
        ["small", None, "large"],
        on_text=lambda row, piece: message[row].append(piece),
        batch_size=2,
    )
    assert ["".join(pieces) for pieces in message.values()] == [result.text for result in results]
    assert all(len(pieces) > 1 for pieces in message.values())


def test_replacing_an_adapter_during_a_generation_does_not_change_its_text(
    generator: TextGenerator, llama_adapters: dict[str, Path]
) -> None:
    expected = generator.generate(PROMPTS, "small")

    def replace(row: int, piece: str) -> None:
        generator.session.load("small", llama_adapters["large"], replace=True)

    assert generator.generate(PROMPTS, "small", on_text=replace) == expected
    assert generator.generate(PROMPTS, "small") != expected


def test_a_callback_that_raises_releases_the_adapter(generator: TextGenerator) -> None:
    def fail(row: int, piece: str) -> None:
        raise ConnectionError("the client went away")

    with pytest.raises(ConnectionError):
        generator.generate(PROMPTS, "small", on_text=fail)
    generator.session.unload("small")  # would wait forever


# -- sampling ----------------------------------------------------------------------------------


def _shares(sampling: Sampling, logits: list[float], draws: int = 4000) -> np.ndarray:
    random = np.random.default_rng(0)
    array = np.array(logits, np.float32)
    chosen = [sampling.choose(array, random) for _ in range(draws)]
    return np.bincount(chosen, minlength=len(logits)) / draws


def test_sampling_follows_the_probabilities() -> None:
    probabilities = np.array([0.1, 0.2, 0.3, 0.4])
    shares = _shares(Sampling(temperature=1), list(np.log(probabilities)))
    assert np.abs(shares - probabilities).max() < 0.03


def test_a_low_temperature_sharpens_the_distribution() -> None:
    probabilities = np.array([0.1, 0.2, 0.3, 0.4])
    shares = _shares(Sampling(temperature=0.5), list(np.log(probabilities)))
    assert np.abs(shares - probabilities**2 / (probabilities**2).sum()).max() < 0.03
    assert _shares(Sampling(temperature=1e-300), [1.0, 2.0, 1.5], 10)[1] == 1


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1, top_k=2), {2, 3}),
        (Sampling(1, top_k=9), {0, 1, 2, 3}),
        (Sampling(1, top_p=0.39), {3}),
        (Sampling(1, top_p=0.41), {2, 3}),
        (Sampling(1, top_p=0.75), {1, 2, 3}),
        (Sampling(1, top_k=3, top_p=0.5), {2, 3}),
        (Sampling(1, min_p=0.51), {2, 3}),
        (Sampling(2, min_p=0.51), {1, 2, 3}),
    ],
)
def test_top_k_top_p_and_min_p_keep_only_the_likeliest_tokens(
    sampling: Sampling, kept: set[int]
) -> None:
    shares = _shares(sampling, list(np.log([0.1, 0.2, 0.3, 0.4])))
    assert set(np.flatnonzero(shares)) == kept


def test_kept_tokens_are_those_of_transformers() -> None:
    import torch
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    rng = np.random.default_rng(1)
    for _ in range(20):
        logits = rng.normal(size=30).astype(np.float32) * 2
        scores = torch.from_numpy(logits)[None]
        for warp in (
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(12),
            TopPLogitsWarper(0.8),
            MinPLogitsWarper(0.15),
        ):
            scores = warp(torch.zeros((1, 1), dtype=torch.long), scores)
        expected = torch.softmax(scores, -1)[0].numpy()
        shares = _shares(Sampling(0.7, top_k=12, top_p=0.8, min_p=0.15), list(logits), 3000)
        assert not shares[expected == 0].any()
        assert np.abs(shares - expected).max() < 0.04


def test_memory_is_returned_after_each_batch_when_its_cache_is_released(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[weakref.ref[DecoderCache]] = []
    make = generator.session.empty_cache

    def made(batch: int) -> DecoderCache:
        cache = make(batch)
        caches.append(weakref.ref(cache))
        return cache

    returned: list[tuple[int, bool, bool]] = []
    monkeypatch.setattr(generator.session, "empty_cache", made)
    monkeypatch.setattr(
        "loradeploy.runtime.tasks.generation.return_after",
        lambda began: returned.append(
            (len(caches), began < worked(), any(cache() is not None for cache in caches))
        ),
    )
    generator.generate(PROMPTS, batch_size=2, max_new_tokens=2)
    numbers, before, alive = zip(*returned, strict=True)
    assert len(returned) == 2 and numbers[0] < numbers[1]
    assert all(before) and not any(alive)
