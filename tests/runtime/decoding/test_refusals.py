"""Settings, texts and logits that text generation refuses by name, and its memory limit."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest

import loradeploy as ld
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.errors import BudgetError, RunError, UsageError
from loradeploy.runtime.decoding.prompts.calls import Call
from loradeploy.runtime.decoding.prompts.requests import read_request
from loradeploy.runtime.held import HeldAdapters
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.runtime.decoding.conftest import PROMPTS

NEW = 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2, "temperature": 0.5}, "num_beams is 2 and temperature is 0.5"),
        ({"num_beams": 2, "n": 3}, "n is 3, of only 2 beams"),
        ({"num_beams": 2, "logprobs": 1}, "logprobs are not available for beams"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping is 'soon'"),
        ({"num_beams": 2, "early_stopping": 1}, "early_stopping is 1"),
        ({"num_beams": 2, "early_stopping": np.ones(2)}, "early_stopping is array"),
        ({"num_beams": 2, "length_penalty": -2000.0}, "length_penalty is -2000.0: give a number"),
        ({"num_beams": 2, "length_penalty": 5000.0}, "length_penalty is 5000.0: give a number"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"length_penalty": 1.0}, "length_penalty has no effect without beams"),
        ({"early_stopping": False}, "early_stopping has no effect without beams"),
        ({"n": 2}, "n is 2 at temperature 0"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": 1, "min_p": 1.5}, "min_p is 1.5"),
        ({"min_p": 0.1}, "no effect at temperature 0"),
        ({"stop": ""}, "a stop string is empty"),
        ({"stop": ["a", ""]}, "a stop string is empty"),
        ({"stop": 5}, "stop is 5"),
        ({"stop": "\n<|im_end|>"}, r"prompt 1: the stop string .* contains the special token <"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"logit_bias": {-1: 2.0}}, "logit_bias names -1"),
        ({"logit_bias": {600: 2.0}}, "logit_bias names the token 600, the logits end at 511"),
        ({"logit_bias": {5: float("inf")}}, "logit_bias of 5 is inf"),
        ({"logit_bias": {5: 1e39}}, r"prompt \d: logit_bias or a penalty is so large"),
        ({"repetition_penalty": 1e-45}, r"prompt \d: logit_bias or a penalty is so large"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"allowed_tokens": 5}, "allowed_tokens is 5"),
        ({"allowed_tokens": lambda made: np.ones(512)}, r"prompt 1: allowed_tokens gave float64"),
        ({"allowed_tokens": lambda made: np.ones(600, bool)}, "allows the token 512, the logits"),
        ({"allowd_tokens": 5}, "'allowd_tokens' is not a setting of a generation"),
        ({"per_prompt": [None]}, "a list of 2"),
        ({"per_prompt": [None, {"n": 2}]}, "prompt 2: n is 2 at temperature 0"),
        ({"per_prompt": [None, {"seed": -2}]}, "a seed is -2"),
    ],
)
def test_invalid_settings_are_refused_by_name(
    generators: dict[str, TextGenerator], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        generators["grows"].generate(["A", "B"], **options)


def test_a_prompt_far_beyond_the_context_is_refused_by_its_beginning(
    generators: dict[str, TextGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens of all of it would take seconds to count."""
    counted = []
    encode = Tokenizer.encode

    def recorded(self: Tokenizer, text: str, **options: Any) -> list[int]:
        counted.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", recorded)
    generator, text = generators["grows"], "It is so. " * 200_000
    refused = (
        r"has 2,000,\d{3} characters, which are more tokens than the 128 positions of the model"
    )
    with pytest.raises(UsageError, match=f"prompt 2 {refused}"):
        generator.generate(["A", text])
    with pytest.raises(UsageError, match=f"prompt 1 {refused}"):
        generator.generate([[{"role": "user", "content": text}]])
    with pytest.raises(UsageError, match=f"text 1 {refused}"):
        generator.score(text)
    engine = ld.Engine(generator, cache_budget=1 << 20)
    with engine, pytest.raises(UsageError, match=f"prompt 1 {refused}"):
        engine.submit(text).result()
    assert max(counted) <= 8 * 128
    with pytest.raises(UsageError, match=r"prompt 1 has \d+ tokens, the model has 128 positions"):
        generator.generate(text[:2000])


@pytest.mark.parametrize("beams", [1, 2])
def test_a_token_mask_that_allows_nothing_is_refused_with_its_row(
    generators: dict[str, TextGenerator], beams: int
) -> None:
    def none_of(made: tuple[int, ...]) -> np.ndarray:
        return np.full(512, len(made) < 3)

    own = [None, {"allowed_tokens": none_of}]
    with pytest.raises(UsageError, match="prompt 2: no token is allowed after 3 generated ones"):
        generators["grows"].generate(PROMPTS[:2], per_prompt=own, num_beams=beams)


def test_a_token_mask_that_allows_fewer_texts_than_n_is_refused_with_its_row(
    generators: dict[str, TextGenerator],
) -> None:
    def one_of(made: tuple[int, ...]) -> np.ndarray:
        return np.arange(512) == 60 + len(made)

    generator = generators["grows"]
    own = [None, {"allowed_tokens": one_of}]
    options: dict[str, Any] = {"num_beams": 2, "max_new_tokens": 3}
    with pytest.raises(UsageError, match="prompt 2: n is 2 texts, of which its mask allows 1:"):
        generator.generate(PROMPTS[:2], per_prompt=own, n=2, **options)
    _, best = generator.generate(PROMPTS[:2], per_prompt=own, **options)
    assert best.token_ids == (60, 61, 62)


def test_cancelling_a_beam_search_ends_all_texts_of_its_prompt(
    generators: dict[str, TextGenerator],
) -> None:
    def one_of(made: tuple[int, ...]) -> np.ndarray:
        return np.arange(512) == 60 + len(made)

    results = {}
    own = [{"num_beams": 3, "n": 3}, {"num_beams": 2, "n": 2, "allowed_tokens": one_of}, None]
    with generators["grows"].stream(PROMPTS, max_new_tokens=NEW, per_prompt=own) as stream:
        stream.cancel(1)
        stream.cancel(3)
        for piece in stream:
            if piece.result is not None:
                results[piece.row] = piece.result
    reasons = [results[row].finish_reason for row in range(6)]
    assert reasons == ["cancelled"] * 5 + ["length"]
    assert [len(results[row].token_ids) for row in range(5)] == [1, 1, 1, 1, 0]


def test_a_batch_beyond_the_memory_budget_is_refused_with_figures(
    generators: dict[str, TextGenerator],
) -> None:
    session = generators["grows"].session
    small = TextGenerator(session, cache_budget=1 << 20)
    # 2 layers × keys and values × 2 heads × 16 values of 4 bytes: 512 bytes per token, twice.
    beams: dict[str, Any] = {"num_beams": 8, "max_new_tokens": 100}
    assert small.generate(PROMPTS[:1], **beams) == generators["grows"].generate(
        PROMPTS[:1], **beams
    )
    with pytest.raises(BudgetError, match=r"16 rows of 1\d\d tokens take \d MiB .* is 1 MiB"):
        small.generate(PROMPTS[1:], **beams)
    # The row of the longer prompt has ended; the other one is as long as both: 2 × 200 tokens.
    own = [{"max_new_tokens": 5}, {"max_new_tokens": 100}]
    uneven = TextGenerator(session, cache_budget=400_000)
    with pytest.raises(BudgetError, match="2 rows of 200 tokens"):
        uneven.generate([[7] * 100, [7]], per_prompt=own)
    with pytest.raises(UsageError, match="cache_budget is 0"):
        TextGenerator(session, cache_budget=0)


def test_a_cache_in_place_takes_no_more_memory_than_estimated(
    generators: dict[str, TextGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms = []
    run = HeldAdapters.run_with_ort_values

    def recorded(self: HeldAdapters, names: Any, feeds: Any, **options: Any) -> Any:
        rooms.append({tuple(value.shape()) for value in options["buffers"].values()})
        return run(self, names, feeds, **options)

    monkeypatch.setattr(HeldAdapters, "run_with_ort_values", recorded)
    prompts = [[7] * 9, [8] * 20]
    generators["in place"].generate(prompts, max_new_tokens=30, num_beams=2)
    generators["in place"].score(prompts)
    assert rooms[0] == {(2, 2, 50, 16)}
    assert max(shape[2] for shapes in rooms for shape in shapes) == 50
    assert rooms[-1] == {(2, 2, 20, 16)}


def test_texts_that_cannot_be_scored_are_refused(generators: dict[str, TextGenerator]) -> None:
    score = generators["grows"].score
    for texts, message in (
        ([], "there are no texts"),
        (["It is so", "A"], "text 2 has 1 tokens, expected 2 or more"),
        ([[7] * 129], "text 1 has 129 tokens, the model has 128 positions"),
    ):
        with pytest.raises(UsageError, match=message):
            score(texts)
    assert len(score([[7] * 128])[0].logprobs) == 127


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"num_beams": 2}])
def test_logits_that_are_not_finite_are_refused(
    generators: dict[str, TextGenerator], options: dict[str, Any], value: float
) -> None:
    generator = generators["grows"]
    logits = np.zeros((1, 512), np.float16)
    logits[0, :5] = -np.inf  # forbids these tokens, which is valid
    call = Call.of("A", None, 0, False, None, None, options)
    assert read_request(generator._reader, call, 0).sequences.advance(logits)
    logits[0, 7] = value
    for given in (logits, np.full_like(logits, -np.inf)):
        sequences = read_request(generator._reader, call, 0).sequences
        with pytest.raises(RunError, match="prompt 1: the graph gave logits that are not finite"):
            sequences.advance(given)


def test_a_text_is_not_scored_by_logits_that_are_not_finite(
    generators: dict[str, TextGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = HeldAdapters.run_with_ort_values

    def overflowing(self: HeldAdapters, names: Any, feeds: Any, **options: Any) -> Any:
        logits, *present = run(self, names, feeds, **options)
        values = logits.numpy().copy()
        values[1, -1, 7] = np.inf
        return [onnxruntime.OrtValue.ortvalue_from_numpy(values), *present]

    monkeypatch.setattr(HeldAdapters, "run_with_ort_values", overflowing)
    with pytest.raises(RunError, match="text 2: the graph gave logits that are not finite"):
        generators["grows"].score([PROMPTS[0], PROMPTS[2]])
