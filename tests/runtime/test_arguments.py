"""Arguments of a wrong type are refused by name, and numpy's numbers count as Python's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import loradeploy as ld
from loradeploy.errors import UnknownAdapterError, UsageError, shown
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.runtime.feeds import feeds, random_ids


@pytest.fixture(scope="module")
def session(tiny_llama_bundle: Path, llama_adapters: dict[str, Path]) -> AdapterSession:
    session = AdapterSession(tiny_llama_bundle)
    session.load("small", llama_adapters["small"])
    return session


@pytest.fixture(scope="module")
def generator(session: AdapterSession) -> TextGenerator:
    return TextGenerator(session)


USERS: dict[str, Callable[[Any], Any]] = {
    "TextGenerator": ld.TextGenerator,
    "TextClassifier": ld.TextClassifier,
    "TextPairScorer": ld.TextPairScorer,
    "TokenClassifier": ld.TokenClassifier,
    "TextEmbedder": ld.TextEmbedder,
    "ImageClassifier": ld.ImageClassifier,
    "ImageEmbedder": ld.ImageEmbedder,
    "SpeechRecognizer": ld.SpeechRecognizer,
    "ImageTextGenerator": lambda value: ld.ImageTextGenerator(value, value),
    "Engine": ld.Engine,
}


@pytest.mark.parametrize("name", USERS)
def test_a_path_instead_of_a_session_is_refused_with_what_to_write(name: str) -> None:
    with pytest.raises(UsageError, match=rf"give {name}\(AdapterSession\('bundle'\)\)"):
        USERS[name]("bundle")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"session_options": {"intra_op_num_threads": 1}}, "`session_options` is {"),
        ({"host_budget": "2 GB"}, "host_budget is '2 GB'"),
        ({"device_budget": 1.5}, "device_budget is 1.5"),
        ({"device_budget": True}, "device_budget is True"),
        *[
            ({name: value}, f"`{name}` is {value!r}: give True or False")
            for name in ("check_device", "capture_graphs", "map_weights", "require_certificate")
            for value in ("no", 0, None)
        ],
    ],
    ids=str,
)
def test_settings_of_a_session_have_their_types(
    what: dict[str, Any], message: str, tiny_llama_bundle: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        AdapterSession(tiny_llama_bundle, **what)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *[({"on_text": value}, "`on_text` is") for value in ("print", 1, [])],
        ({"on_result": True}, "`on_result` is True"),
        ({"embeds": True}, "embeds is True"),
        ({"embeds": {"a": None}}, "embeds is {"),
        ({"prompts": np.array("a")}, "the prompts are array"),
        ({"prompts": [np.array(1)]}, r"prompt 1 is array\(1\)"),
        ({"prompts": [np.array([[1, 2]])]}, r"prompt 1 is array\(\[\[1, 2\]\]\)"),
        ({"seed": np.array(1)}, "a seed is array"),
        ({"chat": "no"}, "`chat` is 'no': give True or False"),
        ({"per_prompt": np.array(None)}, "per_prompt is"),
        *[({"top_k": value}, "top_k is") for value in (False, "", [], np.array([1]), {})],
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"temperature": 10**5000}, "temperature is a int that cannot be shown"),
        ({"temperature": 1, "top_p": 10**5000}, "top_p is a int that cannot be shown"),
        ({"presence_penalty": 10**400}, "presence_penalty is"),
        ({"frequency_penalty": -(10**400)}, "frequency_penalty is"),
        ({"repetition_penalty": 10**400}, "repetition_penalty is"),
        ({"logit_bias": {5: 10**400}}, "logit_bias of 5 is"),
        ({"logit_bias": {10**5000: 1.0}}, "logit_bias names the token a int"),
        ({"max_new_tokens": 2**63}, "at most"),
        ({"num_beams": 10**400}, "at most"),
        ({"n": 2**31, "temperature": 1.0}, "n is 2147483648: give at most 65536"),
    ],
    ids=lambda value: shown(value, 40),
)
def test_arguments_of_a_generation_have_their_types(
    arguments: dict[str, Any], message: str, generator: TextGenerator
) -> None:
    expected = generator.generate(["a"], max_new_tokens=2)
    with pytest.raises(UsageError, match=message) as raised:
        generator.generate(**{"prompts": ["a"], "max_new_tokens": 2, **arguments})
    assert len(str(raised.value)) < 300
    assert generator.generate(["a"], max_new_tokens=2) == expected


@pytest.mark.parametrize("value", ["no", "", 0, None])
def test_replacing_an_adapter_is_true_or_false(
    value: Any, session: AdapterSession, llama_adapters: dict[str, Path]
) -> None:
    before = session.adapters
    for load in (session.load, session.register):
        with pytest.raises(UsageError, match=f"`replace` is {value!r}: give True or False"):
            load("small", llama_adapters["large"], replace=value)
    assert session.adapters == before


def test_a_function_that_raises_leaves_the_generator_usable(generator: TextGenerator) -> None:
    expected = generator.generate(["a", "b"], ["small", None], max_new_tokens=3)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("on_text", "on_result"):
        with pytest.raises(KeyboardInterrupt):
            generator.generate(["a", "b"], ["small", None], max_new_tokens=3, **{name: fail})
    assert generator.generate(["a", "b"], ["small", None], max_new_tokens=3) == expected


# Of 8 and 16 bits, whose sums with the number of a prompt's tokens overflow.
@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.int64])
def test_numpy_integers_are_counted_like_pythons(
    kind: Callable[[int], Any], generator: TextGenerator
) -> None:
    prompt = list(range(3, 63))
    expected = generator.generate([prompt], max_new_tokens=66)
    assert generator.generate([prompt], max_new_tokens=kind(66)) == expected
    several = generator.generate(["a"] * 3, max_new_tokens=2, temperature=1.0, n=kind(100))
    assert len(several) == 300
    batched = generator.generate(["a"] * 150, max_new_tokens=1, batch_size=kind(100))
    assert len(batched) == 150


def test_numpy_numbers_choose_the_tokens_of_pythons(generator: TextGenerator) -> None:
    given = {"temperature": 0.5, "top_p": 0.75, "presence_penalty": 1, "frequency_penalty": -0.5}
    expected = generator.generate(["a"], max_new_tokens=8, seed=3, **given)  # type: ignore[arg-type]
    for kind in (np.float16, np.float32, np.float64):
        own: Any = {name: kind(value) for name, value in given.items()}
        assert generator.generate(["a"], max_new_tokens=8, seed=3, **own) == expected


@pytest.mark.parametrize("mask", [[[True], [True, False]], [[1], [2, 3]]], ids=str)
def test_a_mask_that_is_no_array_is_refused(mask: Any, generator: TextGenerator) -> None:
    with pytest.raises(UsageError, match="prompt 1: allowed_tokens gave no array"):
        generator.generate(["a"], allowed_tokens=lambda made: mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *[({"prompt": value}, "the prompt is") for value in (None, 3, np.array(1), {"a"}, b"a")],
        *[({"scope": value}, "`scope` is") for value in ([], 3, b"a")],
        *[({name: "no"}, f"`{name}` is 'no'") for name in ("chat", "shorten")],
        *[({"deadline": value}, "deadline is") for value in ("1", 10**400, float("nan"), True)],
    ],
    ids=lambda value: shown(value, 40),
)
def test_arguments_of_a_request_have_their_types(
    arguments: dict[str, Any], message: str, generator: TextGenerator
) -> None:
    with ld.Engine(generator) as engine:
        expected = generator.generate(["a"], "small", max_new_tokens=2)[0].token_ids
        with pytest.raises(UsageError, match=message):
            engine.submit(**{"prompt": "a", **arguments})
        after = engine.submit("a", "small", max_new_tokens=2).result(30)
        assert after.generations[0].token_ids == expected


@pytest.mark.parametrize(
    "names", [[["logits"]], [{}], [None], [1], range(10**12)], ids=lambda value: str(value)[:20]
)
def test_requested_outputs_are_names(names: Any, session: AdapterSession) -> None:
    with pytest.raises(UsageError, match="no output is named"):
        session.run(names, feeds(session.manifest, random_ids(1, 3)))


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        (["logits"], r"`buffers` is \['logits'\]"),
        (True, "`buffers` is True"),
        (np.zeros(2), "`buffers` is array"),
        ({"logits": np.zeros((1, 3, 512), np.float32)}, "the buffer of 'logits' is array"),
        ({"logits": None}, "the buffer of 'logits' is None"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_buffers_are_ort_values_by_name(
    buffers: Any, message: str, session: AdapterSession
) -> None:
    values = feeds(session.manifest, random_ids(1, 3))
    with pytest.raises(UsageError, match=message):
        session.run_with_ort_values(["logits"], values, buffers=buffers)


@pytest.mark.parametrize("shape", [(1,), (0,), (5, 5, 512), (1, 3, 256)])
def test_a_buffer_of_another_shape_is_refused(
    shape: tuple[int, ...], session: AdapterSession
) -> None:
    values = feeds(session.manifest, random_ids(1, 3))
    expected = session.run(["logits"], values, "small")[0]
    buffer = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
    with pytest.raises(ld.RunError, match="onnxruntime cannot run"):
        session.run_with_ort_values(["logits"], values, "small", buffers={"logits": buffer})
    assert np.array_equal(session.run(["logits"], values, "small")[0], expected)


def test_the_message_of_a_long_name_is_short(session: AdapterSession) -> None:
    with pytest.raises(UnknownAdapterError) as raised:
        session.pin("x" * 10**6)
    assert len(str(raised.value)) < 200
